"""What every metric checks about scores and labels."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ArrayLike", "scores_and_labels"]

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any]
"""A tensor or a numpy array."""


def scores_and_labels(
    prob: ArrayLike, target: ArrayLike, num_columns: int | None
) -> tuple[Tensor, Tensor]:
    """Check and flatten to `(n, c)`, scores as float64 so that thresholds compare exactly."""
    scores, labels = torch.as_tensor(prob).detach(), torch.as_tensor(target).detach()
    expected = "(..., c)" if num_columns is None else f"(..., {num_columns})"
    if scores.dim() == 0 or (num_columns is not None and scores.shape[-1] != num_columns):
        raise ValueError(f"`prob` must have shape {expected}; got {tuple(scores.shape)}.")
    if scores.shape != labels.shape:
        raise ValueError(
            f"`prob` and `target` must have the same shape; got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}."
        )
    scores = scores.reshape(-1, scores.shape[-1]).double()
    labels = labels.reshape(scores.shape).to(scores.device)
    known = (labels == 0) | (labels == 1)
    other = ~(known | (labels == -1) | labels.isnan())
    if bool(other.any()):
        raise ValueError(
            f"`target` must be 0 or 1, or -1 or NaN for no label; got {int(other.sum())} other "
            f"values, such as {labels[other][0].item():g}."
        )
    seen = scores[known]
    if bool(seen.isnan().any()):
        raise ValueError(
            f"`prob` is NaN at {int(seen.isnan().sum())} of {seen.numel()} labelled entries; "
            "give these frames a prediction or mark their labels as -1."
        )
    if seen.numel() and (float(seen.amin()) < 0 or float(seen.amax()) > 1):
        raise ValueError(
            f"`prob` must be in [0, 1]; got values from {float(seen.amin()):g} to "
            f"{float(seen.amax()):g}. Are these logits?"
        )
    return scores, labels
