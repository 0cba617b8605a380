"""Scores of a ranking, whatever the thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from mmau.metrics._input import ArrayLike, scores_and_labels

__all__ = ["average_precision"]


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
    scores, labels = scores_and_labels(prob, target, None)
    result = torch.full((scores.shape[-1],), torch.nan, dtype=torch.float64)
    for c in range(scores.shape[-1]):
        known = (labels[:, c] == 0) | (labels[:, c] == 1)
        ranked, order = scores[known, c].sort(descending=True)
        hits = (labels[known, c][order] == 1).double()
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
