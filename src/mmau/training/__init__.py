"""Small functions that a training loop calls; the loop itself is in the recipe."""

from __future__ import annotations

from mmau._pool import share_longest_first
from mmau.training.log import MetricsLog
from mmau.training.optim import (
    SubmoduleAverage,
    parameter_groups,
    set_learning_rates,
    warmup_cosine_factor,
)
from mmau.training.sampler import (
    ItemKey,
    StepOrder,
    gather_by_name,
    sum_over_ranks,
)
from mmau.training.state import (
    BestSoFar,
    NotFiniteError,
    Resumable,
    StateFileError,
    StateFiles,
    check_finite,
    differing_settings,
    seed_everything,
)

__all__ = [
    "BestSoFar",
    "ItemKey",
    "MetricsLog",
    "NotFiniteError",
    "Resumable",
    "StateFileError",
    "StateFiles",
    "StepOrder",
    "SubmoduleAverage",
    "check_finite",
    "differing_settings",
    "gather_by_name",
    "parameter_groups",
    "seed_everything",
    "set_learning_rates",
    "share_longest_first",
    "sum_over_ranks",
    "warmup_cosine_factor",
]
