"""Scores of probabilities that need no threshold: of their ranking, and of their meaning."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmau._checks import check_range
from mmau.evaluation.counts import ArrayLike, check_scores


def average_precision(prob: ArrayLike, target: ArrayLike) -> Tensor:
    r"""Score the ranking of each Action Unit, whatever the thresholds.

    $$ \text{AP} = \sum_n (R_n - R_{n-1}) P_n $$

    over the distinct scores in falling order, without interpolation; a random ranking scores the
    positive rate.

    Args:
        prob: `(..., c)`, any score in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.

    Returns:
        `(c)`, float64; NaN for Action Units without positives.

    Raises:
        ValueError: As `AUCounts.update`.

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.9], [0.8], [0.7]])
        >>> average_precision(prob, torch.tensor([[1], [0], [1]]))  # (1 + 2/3) / 2
        tensor([0.8333], dtype=torch.float64)
    """
    scores, positive, known = check_scores(prob, target)
    result = torch.full((scores.shape[-1],), torch.nan, dtype=torch.float64)
    for c in range(scores.shape[-1]):
        ranked, order = scores[known[:, c], c].sort(descending=True)
        hits = positive[known[:, c], c][order].double()
        if not bool(hits.any()):
            continue
        # Equal scores enter together: only the last of a run is a point of the curve.
        last = torch.ones_like(ranked, dtype=torch.bool)
        last[:-1] = ranked[1:] != ranked[:-1]
        true_positive = hits.cumsum(0)
        rank = torch.arange(1, len(ranked) + 1, device=ranked.device)
        precision, recall = (true_positive / rank)[last], (true_positive / hits.sum())[last]
        result[c] = (precision * recall.diff(prepend=recall.new_zeros(1))).sum()
    return result


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
    """Compare predicted probabilities with observed rates, in bins of equal width over [0, 1].

    A calibrated model lies on the diagonal. The sigmoid of a model trained with the asymmetric loss
    does not; its `posterior` does.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
        num_bins: Number of bins, at least 1.

    Returns:
        `predicted` and `observed`, both `(c, k)`, and `num_entries` of each bin.

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
    scores, positive, known = check_scores(prob, target)
    num_columns = scores.shape[-1]
    cell, seen = bin_cells(scores, known, num_bins), scores[known]
    size, shape = num_columns * num_bins, (num_columns, num_bins)
    count = torch.bincount(cell, minlength=size).reshape(shape)
    total = torch.bincount(cell, weights=seen, minlength=size).reshape(shape)
    hits = torch.bincount(cell, weights=positive[known].double(), minlength=size).reshape(shape)
    return ReliabilityCurve(total / count, hits / count, count)


def bin_cells(scores: Tensor, known: Tensor, num_bins: int) -> Tensor:
    """Return `column * num_bins + bin` of every labelled entry."""
    column = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)[known]
    return column * num_bins + (scores[known] * num_bins).long().clamp(max=num_bins - 1)


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
        >>> calibration_error(torch.full((4, 1), 0.5), target)  # observed: 0.25
        tensor([0.2500], dtype=torch.float64)
    """
    curve = reliability_curve(prob, target, num_bins=num_bins)
    distance = (curve.observed - curve.predicted).abs().nan_to_num(0) * curve.num_entries
    return distance.sum(-1) / curve.num_entries.sum(-1)
