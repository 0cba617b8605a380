"""Curves and thresholds from counts that can be merged, without keeping the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmau._checks import check_range
from mmau.action_units import AU_NAMES
from mmau.evaluation.counts import (
    ArrayLike,
    AUCounts,
    check_names,
    f1_of_counts,
    scores_and_labels,
    sum_over_processes,
)


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


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """Precision and recall of every Action Unit at every edge of a histogram."""

    thresholds: Tensor
    """`(k)`, float64, rising from 0: decisions are `prob >= threshold`."""
    precision: Tensor
    """`(c, k)`, float64; NaN where nothing is predicted."""
    recall: Tensor
    """`(c, k)`, float64; NaN for Action Units without positives."""
    f1: Tensor
    """`(c, k)`, float64; NaN for Action Units without positives."""


class ScoreHistogram:
    """Scores of positives and negatives, counted in bins: any threshold, in one mergeable pass.

    The counts are int64, so the order in which batches, videos or processes are added makes no
    difference. At the edges of the bins, multiples of 1 / `num_bins`, the numbers are exact: they
    are what `AUCounts` counts at that threshold. Between the edges nothing is known, which costs
    about 1e-4 of F1 at 1024 bins (see `best_thresholds` of `mmau.calibration` for the exact search,
    which needs all scores at once).

    Args:
        au_names: Names of the columns, or their number.
        num_bins: Number of bins of equal width over [0, 1], a power of two, so that the edges are
            exact floating point numbers.

    Raises:
        ValueError: If `num_bins` is not a power of two from 2 to 65536.

    Examples:
        >>> import torch
        >>> histogram = ScoreHistogram(1, num_bins=4)
        >>> prob, target = torch.tensor([[0.1], [0.6], [0.9]]), torch.tensor([[0], [1], [1]])
        >>> histogram.update(prob, target).best_thresholds()
        tensor([0.5000], dtype=torch.float64)
        >>> histogram.curve().precision
        tensor([[0.6667, 1.0000, 1.0000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, au_names: Sequence[str] | int = AU_NAMES, *, num_bins: int = 1024) -> None:
        if not 2 <= num_bins <= 65536 or num_bins & (num_bins - 1):
            raise ValueError(
                f"`num_bins` must be a power of two from 2 to 65536; got {num_bins!r}."
            )
        self.au_names = check_names(au_names)
        self.num_bins = num_bins
        self.counts = torch.zeros(len(self.au_names), 2, num_bins, dtype=torch.int64)
        """`(c, 2, k)`: entries labelled 0, entries labelled 1, per bin."""

    def __repr__(self) -> str:
        labelled = self.counts.sum((1, 2)).tolist()
        listed = (f"{name}: {n}" for name, n in zip(self.au_names, labelled, strict=True))
        return f"ScoreHistogram({self.num_bins} bins; {', '.join(listed)})"

    def update(self, prob: ArrayLike, target: ArrayLike) -> ScoreHistogram:
        """Count a batch, a clip or a video.

        Args:
            prob: `(..., c)`, probability in [0, 1].
            target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.

        Returns:
            Itself, so that calls can be chained.

        Raises:
            ValueError: As `AUCounts.update`.
        """
        num_columns = len(self.au_names)
        scores, labels = scores_and_labels(prob, target, num_columns)
        known = (labels == 0) | (labels == 1)
        column = torch.arange(num_columns, device=scores.device).expand(scores.shape)[known]
        # Multiplying by a power of two is exact, so a score on an edge lands in the bin above it.
        bins = (scores[known] * self.num_bins).long().clamp(max=self.num_bins - 1)
        cell = (2 * column + labels[known].long()) * self.num_bins + bins
        counted = torch.bincount(cell, minlength=self.counts.numel())
        self.counts += counted.reshape(self.counts.shape).cpu()
        return self

    def merge(self, other: ScoreHistogram) -> ScoreHistogram:
        """Add the counts of another part of the data.

        Args:
            other: Histogram of the same Action Units and bins.

        Returns:
            Itself.

        Raises:
            ValueError: If the Action Units or the bins differ.
        """
        if (other.au_names, other.num_bins) != (self.au_names, self.num_bins):
            raise ValueError(
                f"`other` must have the same {self.num_bins} bins and Action Units, "
                f"{', '.join(self.au_names)}; got {other.num_bins} bins and "
                f"{', '.join(other.au_names)}."
            )
        self.counts += other.counts
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ScoreHistogram:
        """Return the sum over all processes of a distributed run; see `AUCounts.all_reduce`.

        Args:
            group: Process group; the default one if left out.

        Returns:
            A new histogram, the same in every process.

        Raises:
            ValueError: If the processes count different Action Units or bins.
        """
        total = ScoreHistogram(self.au_names, num_bins=self.num_bins)
        total.counts = sum_over_processes(self.counts, self.au_names, group)
        return total

    @property
    def thresholds(self) -> Tensor:
        """`(k)`, float64: the lower edges of the bins."""
        return torch.arange(self.num_bins, dtype=torch.float64) / self.num_bins

    def counts_at_thresholds(self) -> Tensor:
        """Return what `AUCounts` counts at every edge, `(c, k, 4)`, int64: tp, fp, fn, tn."""
        at_or_above = self.counts.flip(-1).cumsum(-1).flip(-1)
        below = self.counts.sum(-1, keepdim=True) - at_or_above
        cells = (at_or_above[:, 1], at_or_above[:, 0], below[:, 1], below[:, 0])
        return torch.stack(cells, dim=-1)

    def counts_at(self, thresholds: Tensor) -> AUCounts:
        """Return the counts at one edge per Action Unit.

        Args:
            thresholds: `(c)`, multiples of 1 / `num_bins` below 1.

        Returns:
            The counts.

        Raises:
            ValueError: If a threshold is not an edge.
        """
        index = (thresholds.double() * self.num_bins).round().long()
        edge = index.double() / self.num_bins
        if thresholds.shape != (len(self.au_names),) or not torch.equal(edge, thresholds.double()):
            raise ValueError(
                f"`thresholds` must be one multiple of 1/{self.num_bins} per Action Unit; got "
                f"{thresholds.tolist()}."
            )
        if bool(((index < 0) | (index >= self.num_bins)).any()):
            raise ValueError(f"`thresholds` must be in [0, 1); got {thresholds.tolist()}.")
        counts = AUCounts(self.au_names)
        counts.counts = self.counts_at_thresholds()[torch.arange(len(index)), index]
        return counts

    def curve(self) -> PrecisionRecallCurve:
        """Return precision, recall and F1 at every edge."""
        counts = self.counts_at_thresholds()
        true_positive, false_positive, false_negative, _ = counts.double().unbind(-1)
        return PrecisionRecallCurve(
            self.thresholds,
            precision=true_positive / (true_positive + false_positive),
            recall=true_positive / (true_positive + false_negative),
            f1=f1_of_counts(counts.double()),
        )

    def best_thresholds(self, *, default: float = 0.5) -> Tensor:
        """Find the edges with the highest F1; of equally good ones the highest.

        Args:
            default: Threshold of Action Units without positives.

        Returns:
            `(c)`, float64, for decisions `prob >= threshold`.
        """
        f1 = f1_of_counts(self.counts_at_thresholds().double())
        best = self.num_bins - 1 - f1.nan_to_num(-1).flip(-1).argmax(-1)
        found = best.double() / self.num_bins
        return torch.where(f1.isnan().all(-1), default, found)


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
