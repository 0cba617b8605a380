"""Softmax of attention scores."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_softmax"]


def attention_softmax(scores: Tensor) -> Tensor:
    """Normalise over the last axis, in float32 for half precision, in the dtype of the scores."""
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)
