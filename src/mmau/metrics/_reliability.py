"""Whether a probability of 0.3 comes true three times in ten."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmau._checks import check_range
from mmau.metrics._input import ArrayLike, scores_and_labels

__all__ = ["ReliabilityCurve", "calibration_error", "reliability_curve"]


class ReliabilityCurve(NamedTuple):
    """What `reliability_curve` returns, per Action Unit and bin."""

    predicted: Tensor
    """`(c, k)`, float64: mean probability of the entries in the bin; NaN where there are none."""
    observed: Tensor
    """`(c, k)`, float64: share of them that is labelled 1; NaN where there are none."""
    num_entries: Tensor
    """`(c, k)`, int64: labelled entries in the bin."""


def reliability_curve(
    prob: ArrayLike, target: ArrayLike, *, num_bins: int = 15
) -> ReliabilityCurve:
    """Compare what was predicted with what came true, in bins of equal width over [0, 1].

    A calibrated model lies on the diagonal. The sigmoid of a model trained with the asymmetric loss
    does not; its `posterior` does.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
        num_bins: Number of bins, at least 1.

    Returns:
        The curve.

    Raises:
        ValueError: As `AUCounts.update`, or if `num_bins` is below 1.

    Examples:
        >>> import torch
        >>> prob, target = torch.tensor([[0.2], [0.4], [0.9]]), torch.tensor([[0], [1], [1]])
        >>> curve = reliability_curve(prob, target, num_bins=2)
        >>> curve.predicted, curve.observed, curve.num_entries
        (tensor([[0.3000, 0.9000]], dtype=torch.float64),
         tensor([[0.5000, 1.0000]], dtype=torch.float64), tensor([[2, 1]]))
    """
    check_range("num_bins", num_bins, 1)
    scores, labels = scores_and_labels(prob, target, None)
    known = (labels == 0) | (labels == 1)
    num_columns = scores.shape[-1]
    column = torch.arange(num_columns, device=scores.device).expand(scores.shape)[known]
    seen, positive = scores[known], (labels[known] == 1).double()
    cell = column * num_bins + (seen * num_bins).long().clamp(max=num_bins - 1)
    size, shape = num_columns * num_bins, (num_columns, num_bins)
    count = torch.bincount(cell, minlength=size).reshape(shape)
    total = torch.bincount(cell, weights=seen, minlength=size).reshape(shape)
    hits = torch.bincount(cell, weights=positive, minlength=size).reshape(shape)
    return ReliabilityCurve(total / count, hits / count, count)


def calibration_error(prob: ArrayLike, target: ArrayLike, *, num_bins: int = 15) -> Tensor:
    r"""Average the distance between the reliability curve and the diagonal.

    $$ \text{ECE} = \sum_k \frac{n_k}{n} \, |\text{observed}_k - \text{predicted}_k| $$

    Args:
        prob: `(..., c)`, probability in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
        num_bins: Number of bins of equal width, at least 1.

    Returns:
        `(c)`, float64, in [0, 1]; NaN for Action Units without labels.

    Raises:
        ValueError: As `reliability_curve`.

    Examples:
        >>> import torch
        >>> target = torch.tensor([[1], [0], [0], [0]])
        >>> calibration_error(torch.full((4, 1), 0.5), target)  # a quarter came true
        tensor([0.2500], dtype=torch.float64)
    """
    curve = reliability_curve(prob, target, num_bins=num_bins)
    distance = (curve.observed - curve.predicted).abs().nan_to_num(0) * curve.num_entries
    return distance.sum(-1) / curve.num_entries.sum(-1)
