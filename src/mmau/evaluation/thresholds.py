"""Thresholds and smoothing windows with the highest F1, and their cross-validation by video.

The search for thresholds is exact. The search for windows tries many thresholds per window and
fold, so it looks at multiples of 1/1024 only: then a fold is a histogram, and several are its sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_choice, check_range
from mmau.evaluation.counts import ArrayLike, check_scores, f1_of_counts
from mmau.evaluation.ranking import bin_cells
from mmau.evaluation.smoothing import (
    SMOOTHING_KINDS,
    TIME_UNITS,
    SmoothingKind,
    TimeUnit,
    check_windows,
    smooth,
)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    r"""How thresholds and smoothing are chosen on annotated videos.

    A threshold that was chosen on few videos is drawn towards `default`:

    $$
    \text{logit}(\tau') = \frac{v}{v + s} \text{logit}(\tau) + \frac{s}{v + s} \text{logit}(\tau_0)
    $$

    with v the number of videos in which the Action Unit occurs, s the `shrinkage` and $\tau_0$ the
    default. Frames do not count: a smile of a thousand frames is one observation of where to cut.
    With v = s the threshold lies halfway (in log-odds); with v = 0 it is the default. An Action
    Unit that occurs in a hundred videos hardly moves.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> FitOptions(smoothing_kind="exponential").windows  # time constants, in seconds
        (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
    """

    smoothing: bool = True
    """Whether probabilities are smoothed before the threshold."""
    smoothing_kind: SmoothingKind = "mean"
    """`"mean"`, `"median"`, or `"exponential"` for live streams; see `smooth`."""
    smoothing_unit: TimeUnit = "seconds"
    """What the windows count, `"seconds"` or `"frames"`."""
    windows: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
    """Smoothing windows to choose from, for each Action Unit."""
    max_gap: float = 0.5
    """Longest time between two frames that are smoothed together, in seconds."""
    default: float = 0.5
    """Threshold to draw towards, in (0, 1), and that of an Action Unit without positives."""
    shrinkage: float = 2.0
    """How many videos the default is worth, at least 0."""
    num_folds: int = 5
    """Folds of the cross-validation, at least 2; with fewer videos, one fold per video."""
    seed: int = 0
    """Seed of the split into folds; the same seed and names give the same folds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(sorted({float(one) for one in self.windows})))
        if not self.windows:
            raise ValueError("`windows` must hold at least one smoothing window; got none.")
        check_choice("smoothing_kind", self.smoothing_kind, SMOOTHING_KINDS)
        check_choice("smoothing_unit", self.smoothing_unit, TIME_UNITS)
        check_windows("windows", self.windows, self.smoothing_kind, self.smoothing_unit)
        check_range("max_gap", self.max_gap, 0, float("inf"), open_low=True, open_high=True)
        check_range("default", self.default, 0, 1, open_low=True, open_high=True)
        check_range("shrinkage", self.shrinkage, 0, float("inf"), open_high=True)
        check_range("num_folds", self.num_folds, 2)


def best_thresholds(prob: ArrayLike, target: ArrayLike, *, default: float = 0.5) -> Tensor:
    """Find the thresholds with the highest F1, exactly, among all that make a difference.

    A threshold lies halfway between two neighbouring scores, or at the lowest score; of equally
    good ones the highest wins. On the data it was found on, its F1 is optimistic: score with
    `evaluate_trials`.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
        default: Threshold of Action Units without positives, which have no best one.

    Returns:
        `(c)`, float64, for decisions `prob >= threshold`.

    Raises:
        ValueError: As `AUCounts.update`, or if `default` is outside [0, 1].

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.1], [0.2], [0.4], [0.3]])
        >>> best_thresholds(prob, torch.tensor([[0], [1], [1], [0]]))
        tensor([0.1500], dtype=torch.float64)
    """
    check_range("default", default, 0, 1)
    scores, positive, known = check_scores(prob, target)
    found = [
        _best_threshold(scores[known[:, c], c], positive[known[:, c], c], default)
        for c in range(scores.shape[-1])
    ]
    return torch.tensor(found, dtype=torch.float64)


def _best_threshold(scores: Tensor, positive: Tensor, default: float) -> float:
    if not bool(positive.any()):
        return default
    ranked, order = scores.sort(descending=True)
    true_positive = positive[order].cumsum(0).double()
    predicted = torch.arange(1, len(ranked) + 1, device=scores.device)
    f1 = 2 * true_positive / (predicted + true_positive[-1])
    # A threshold cannot separate equal scores: only the last of a run is a possible cut.
    f1[:-1][ranked[1:] == ranked[:-1]] = -1
    best = int(f1.argmax())
    above = float(ranked[best])
    if best + 1 == len(ranked):
        return above
    below = float(ranked[best + 1])
    middle = (above + below) / 2
    # The middle of two adjacent floats rounds to one of them; then only `above` separates.
    return middle if below < middle <= above else above


# -------------------------------------------------------------------------------------- internals
def shrink_thresholds(thresholds: Tensor, num_groups: Tensor, options: FitOptions) -> Tensor:
    """Draw thresholds `(c)`, each chosen on so many groups of videos, towards the default."""
    thresholds, count = thresholds.double(), num_groups.double()
    if options.shrinkage == 0:
        return torch.where(count > 0, thresholds, options.default)
    share = count / (count + options.shrinkage)
    start = torch.tensor(options.default, dtype=torch.float64).logit()
    # A threshold of exactly 0 or 1 has no log-odds.
    logits = thresholds.clamp(1e-6, 1 - 1e-6).logit()
    return (share * logits + (1 - share) * start).sigmoid()


def fit_thresholds(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    groups: Mapping[str, str],
    options: FitOptions,
) -> Tensor:
    """Choose thresholds `(c)` on all of some videos; `targets` and `groups` may hold more."""
    prob = torch.cat(list(probs.values()))
    target = torch.cat([targets[name] for name in probs])
    best = best_thresholds(prob, target, default=options.default)
    return shrink_thresholds(best, num_positive_groups(probs, targets, groups), options)


def num_positive_groups(
    names: Collection[str], targets: Mapping[str, Tensor], groups: Mapping[str, str]
) -> Tensor:
    """Count the groups of videos in which each Action Unit is labelled 1 at least once."""
    occurs: dict[str, Tensor] = {}
    for name in names:
        here = (targets[name] == 1).any(0).cpu()
        occurs[groups[name]] = occurs.get(groups[name], here) | here
    return torch.stack(list(occurs.values())).sum(0)


def split_folds(groups: Mapping[str, str], options: FitOptions) -> dict[str, int]:
    """Split groups of videos into folds, by name: the order of a mapping does not matter."""
    ordered = sorted(set(groups.values()))
    if len(ordered) < 2:
        raise ValueError(
            f"cross-validation by video needs at least 2 videos or groups; got {len(ordered)}."
        )
    num_folds = min(options.num_folds, len(ordered))
    drawn = np.random.default_rng(options.seed).permutation(len(ordered))
    fold_of_group = {ordered[j]: i % num_folds for i, j in enumerate(drawn)}
    return {name: fold_of_group[group] for name, group in groups.items()}


class Choice(NamedTuple):
    """What `CrossValidation.fit` chose, per Action Unit."""

    windows: Tensor
    """`(c)`, float64."""
    thresholds: Tensor
    """`(c)`, float64."""


class HeldOut(NamedTuple):
    """What `CrossValidation.held_out` returns for one video."""

    prob: Tensor
    """`(t, c)`, smoothed."""
    decisions: Tensor
    """`(t, c)`, bool."""
    choice: Choice
    """Made on the other folds."""


class CrossValidation:
    """Smoothing windows and thresholds, chosen on some folds of the videos and used on others.

    Every mapping is by name of the video or trial: probabilities and labels `(t, c)`, times `(t)`,
    and the group that must stay together. A frame with a NaN is not used.
    """

    def __init__(
        self,
        probs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        timestamps: Mapping[str, Tensor],
        groups: Mapping[str, str],
        options: FitOptions,
    ) -> None:
        self.probs, self.targets, self.timestamps = probs, targets, timestamps
        self.groups, self.options = groups, options
        self.fold_of = split_folds(groups, options)
        self.folds = range(max(self.fold_of.values()) + 1)
        names = [[name for name in probs if self.fold_of[name] == fold] for fold in self.folds]
        self._positive = torch.stack([num_positive_groups(n, targets, groups) for n in names])
        # Per window `(f, c, 2, k)`, one histogram per fold.
        self._histograms = [
            torch.stack([self._histogram_of(names_of_fold, window) for names_of_fold in names])
            for window in (options.windows if options.smoothing else ())
        ]

    def fit(self, folds: Collection[int]) -> Choice:
        """Choose windows and thresholds on some folds.

        A window is chosen by the F1 that it has within these folds, each scored with thresholds
        from the others. Of a single fold it is the F1 at the thresholds of that same fold.
        """
        windows = self._best_windows(folds)
        smoothed = {
            name: self._smooth(name, windows) for name in self.probs if self.fold_of[name] in folds
        }
        return Choice(windows, fit_thresholds(smoothed, self.targets, self.groups, self.options))

    def held_out(self) -> dict[str, HeldOut]:
        """Smooth and decide every video with what was chosen on the other folds only."""
        chosen = [self.fit([other for other in self.folds if other != f]) for f in self.folds]
        found = {}
        for name in self.probs:
            choice = chosen[self.fold_of[name]]
            prob = self._smooth(name, choice.windows)
            found[name] = HeldOut(prob, prob >= choice.thresholds.to(prob.device), choice)
        return found

    def _smooth(self, name: str, window: float | Tensor) -> Tensor:
        prob, options = self.probs[name], self.options
        if not options.smoothing:
            return prob
        return smooth(
            prob,
            self.timestamps[name],
            window,
            kind=options.smoothing_kind,
            unit=options.smoothing_unit,
            valid=~prob.isnan().any(-1),
            max_gap=options.max_gap,
        )

    def _histogram_of(self, names: Collection[str], window: float) -> Tensor:
        counted = [score_histogram(self._smooth(n, window), self.targets[n]) for n in names]
        return torch.stack(counted).sum(0)

    def _best_windows(self, folds: Collection[int]) -> Tensor:
        """Return the window of highest F1, `(c)`; of equals the smallest."""
        num_columns = self._positive.shape[-1]
        if not self.options.smoothing:
            return torch.zeros(num_columns, dtype=torch.float64)
        columns, scores = torch.arange(num_columns), []
        for of_folds in self._histograms:
            counts = torch.zeros(num_columns, 4, dtype=torch.int64)
            for fold in folds:
                rest = [other for other in folds if other != fold] or [fold]
                best = best_edges(of_folds[rest].sum(0), self.options.default)
                threshold = shrink_thresholds(best, self._positive[rest].sum(0), self.options)
                edge = (threshold * NUM_BINS).round().clamp(0, NUM_BINS - 1).long()
                counts += counts_at_edges(of_folds[fold])[columns, edge]
            scores.append(f1_of_counts(counts.double()).nan_to_num(-1))
        best_window = torch.stack(scores).argmax(0)
        return torch.tensor(self.options.windows, dtype=torch.float64)[best_window]


NUM_BINS = 1024
"""A power of two: multiplying by it is exact, so a score on an edge lands in the bin above it."""


def score_histogram(prob: Tensor, target: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Count entries labelled 0 and entries labelled 1 per bin of the score, `(c, 2, k)`, int64."""
    scores, positive, known = check_scores(prob, target)
    size = scores.shape[-1] * num_bins
    cells = bin_cells(scores, known, num_bins) + size * positive[known]
    counted = torch.bincount(cells, minlength=2 * size)
    return counted.reshape(2, -1, num_bins).transpose(0, 1).cpu()


def counts_at_edges(histogram: Tensor) -> Tensor:
    """Return what `AUCounts` counts at every lower edge of a bin, `(c, k, 4)`, int64."""
    at_or_above = histogram.flip(-1).cumsum(-1).flip(-1)
    below = histogram.sum(-1, keepdim=True) - at_or_above
    cells = (at_or_above[:, 1], at_or_above[:, 0], below[:, 1], below[:, 0])
    return torch.stack(cells, dim=-1)


def best_edges(histogram: Tensor, default: float) -> Tensor:
    """Return the edges with the highest F1, `(c)`; of equals the highest."""
    f1, num_bins = f1_of_counts(counts_at_edges(histogram).double()), histogram.shape[-1]
    best = num_bins - 1 - f1.nan_to_num(-1).flip(-1).argmax(-1)
    return torch.where(f1.isnan().all(-1), default, best.double() / num_bins)
