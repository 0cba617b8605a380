"""Small functions that a training loop calls; the loop itself is in the recipe."""

from __future__ import annotations

from mmau.training.averaging import SubmoduleAverage
from mmau.training.parameter_groups import parameter_groups
from mmau.training.schedule import warmup_cosine, warmup_cosine_factor

__all__ = ["SubmoduleAverage", "parameter_groups", "warmup_cosine", "warmup_cosine_factor"]
