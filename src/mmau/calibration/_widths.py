"""Widths of smoothing per Action Unit, chosen on other videos than they are judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmau._checks import check_shapes
from mmau.calibration._cross_fit import deal_folds
from mmau.calibration._smoothing import SmoothingKind, TimeUnit, check_widths, smooth
from mmau.calibration._thresholds import (
    SHRINKAGE,
    fit_thresholds,
    num_positive_groups,
    shrink_thresholds,
)
from mmau.metrics import AUCounts, ScoreHistogram

__all__ = ["WIDTHS", "CrossFittedSmoothing", "choose_widths", "cross_fitted_smoothing"]

WIDTHS = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Widths that are tried, in seconds, unless others are given."""


@dataclass(frozen=True)
class CrossFittedSmoothing:
    """What `cross_fitted_smoothing` returns; every mapping is by name of the video."""

    prob: dict[str, Tensor]
    """`(t, c)`, smoothed."""
    decisions: dict[str, Tensor]
    """`(t, c)`, bool; `AUCounts.update` takes them as they are."""
    thresholds: dict[str, Tensor]
    """`(c)`, float64, chosen on other videos."""
    widths: dict[str, Tensor]
    """`(c)`, float64, chosen on other videos."""


def choose_widths(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    timestamps: Mapping[str, Tensor],
    *,
    widths: Sequence[float] = WIDTHS,
    kind: SmoothingKind = "mean",
    unit: TimeUnit = "seconds",
    max_gap: float = 0.5,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> Tensor:
    """Choose for each Action Unit the width of smoothing with the highest cross-fitted F1.

    For every width the videos are smoothed, and each fold is scored with thresholds that were
    chosen on the others; the counts are pooled over the folds. Of equally good widths the smallest
    wins, so an Action Unit without positives is not smoothed. The search looks at thresholds that
    are multiples of 1/1024. The chosen widths may be shipped, but their score is optimistic: report
    that of `cross_fitted_smoothing`.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1]; a frame with a NaN is not
            used.
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        timestamps: The same names to `(t)` seconds.
        widths: Widths to choose from, in `unit`.
        kind: As `smooth`.
        unit: What the widths count, `"seconds"` or `"frames"`.
        max_gap: Longest time between two frames that are smoothed together, in seconds.
        groups: Name to what must stay together, such as the source video or the subject.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth; 0 for none.

    Returns:
        `(c)`, float64.

    Raises:
        ValueError: If the names differ, there are fewer than two groups, or as `smooth`.

    Examples:
        >>> import torch
        >>> truth = (torch.arange(60) // 20 == 1).long()[:, None]
        >>> noisy = 0.5 + 0.1 * (2 * truth - 1) + 0.2 * torch.tensor([1.0, -1.0] * 30)[:, None]
        >>> names, clock = ("a", "b", "c"), torch.arange(60) / 30
        >>> choose_widths(
        ...     dict.fromkeys(names, noisy), dict.fromkeys(names, truth),
        ...     dict.fromkeys(names, clock), widths=(0, 0.2, 2),
        ... )
        tensor([0.2000], dtype=torch.float64)
    """
    fold_of = deal_folds(probs, targets, groups, num_folds=num_folds, seed=seed)
    tried = _Tried.smooth_all(probs, targets, timestamps, widths, kind, unit, max_gap, fold_of)
    positive = _positive_groups(targets, groups, fold_of)
    return tried.best(tuple(range(max(fold_of.values()) + 1)), positive, default, shrinkage)


def cross_fitted_smoothing(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    timestamps: Mapping[str, Tensor],
    *,
    widths: Sequence[float] = WIDTHS,
    kind: SmoothingKind = "mean",
    unit: TimeUnit = "seconds",
    max_gap: float = 0.5,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> CrossFittedSmoothing:
    """Smooth and decide every video with widths and thresholds that were chosen on other videos.

    For each fold, `choose_widths` and `fit_thresholds` see all other folds only: a choice within a
    choice. With two folds there is nothing left to cross-fit the width on; it is then the one whose
    F1 is highest on the other fold, with the thresholds tuned on the same fold.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1]; a frame with a NaN is not
            used.
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        timestamps: The same names to `(t)` seconds.
        widths: Widths to choose from, in `unit`.
        kind: As `smooth`.
        unit: What the widths count, `"seconds"` or `"frames"`.
        max_gap: Longest time between two frames that are smoothed together, in seconds.
        groups: Name to what must stay together, such as the source video or the subject.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing; the folds are those of `cross_fitted_thresholds`.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth; 0 for none.

    Returns:
        Smoothed probabilities and decisions, and what was chosen.

    Raises:
        ValueError: As `choose_widths`.
    """
    fold_of = deal_folds(probs, targets, groups, num_folds=num_folds, seed=seed)
    tried = _Tried.smooth_all(probs, targets, timestamps, widths, kind, unit, max_gap, fold_of)
    positive = _positive_groups(targets, groups, fold_of)
    num_folds = max(fold_of.values()) + 1
    found = CrossFittedSmoothing({}, {}, {}, {})
    for fold in range(num_folds):
        others = tuple(other for other in range(num_folds) if other != fold)
        chosen = tried.best(others, positive, default, shrinkage)
        smoothed = {
            name: _smooth(prob, timestamps[name], chosen, kind, unit, max_gap)
            for name, prob in probs.items()
        }
        elsewhere = {name: prob for name, prob in smoothed.items() if fold_of[name] != fold}
        threshold = fit_thresholds(
            elsewhere, targets, groups=groups, default=default, shrinkage=shrinkage
        )
        for name in (name for name in probs if fold_of[name] == fold):
            found.prob[name] = smoothed[name]
            found.decisions[name] = smoothed[name] >= threshold.to(smoothed[name].device)
            found.thresholds[name] = threshold
            found.widths[name] = chosen
    # In the order of `probs`, not of the folds.
    return CrossFittedSmoothing(
        *({name: part[name] for name in probs} for part in vars(found).values())
    )


# -------------------------------------------------------------------------------------- internals
def _smooth(
    prob: Tensor,
    timestamps: Tensor,
    width: float | Tensor,
    kind: SmoothingKind,
    unit: TimeUnit,
    max_gap: float,
) -> Tensor:
    valid = ~prob.isnan().any(-1)
    return smooth(prob, timestamps, width, kind=kind, unit=unit, valid=valid, max_gap=max_gap)


def _positive_groups(
    targets: Mapping[str, Tensor], groups: Mapping[str, str] | None, fold_of: Mapping[str, int]
) -> Tensor:
    """`(f, c)`: groups with a positive label, per fold; groups never straddle folds."""
    folds = range(max(fold_of.values()) + 1)
    return torch.stack(
        [
            num_positive_groups({n: targets[n] for n in fold_of if fold_of[n] == fold}, groups)
            for fold in folds
        ]
    )


@dataclass(frozen=True)
class _Tried:
    """Every width on every fold, as histograms: all else is sums of them."""

    widths: tuple[float, ...]
    folds: list[list[ScoreHistogram]]
    """Per width, per fold."""

    @classmethod
    def smooth_all(
        cls,
        probs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        timestamps: Mapping[str, Tensor],
        widths: Sequence[float],
        kind: SmoothingKind,
        unit: TimeUnit,
        max_gap: float,
        fold_of: Mapping[str, int],
    ) -> _Tried:
        tried = tuple(sorted({float(width) for width in widths}))
        if not tried:
            raise ValueError("`widths` must hold at least one width; got none.")
        check_widths("widths", tried, kind, unit)
        missing = sorted(set(probs) ^ set(timestamps))
        if missing:
            raise ValueError(
                f"`probs` and `timestamps` must hold the same videos; {len(missing)} are in one "
                f"of them only, such as {missing[0]!r}."
            )
        for name, prob in probs.items():
            # Named after the video, since a set of hundreds has one that is wrong.
            check_shapes(
                sizes=None,
                **{
                    f"probs[{name!r}]": (prob, "t c"),
                    f"targets[{name!r}]": (targets[name], "t c"),
                    f"timestamps[{name!r}]": (timestamps[name], "t"),
                },
            )
        num_columns = next(iter(probs.values())).shape[-1]
        folds = []
        for width in tried:
            counted = [ScoreHistogram(num_columns) for _ in range(max(fold_of.values()) + 1)]
            for name, prob in probs.items():
                smoothed = _smooth(prob, timestamps[name], width, kind, unit, max_gap)
                counted[fold_of[name]].update(smoothed, targets[name])
            folds.append(counted)
        return cls(tried, folds)

    def best(
        self, folds: tuple[int, ...], positive: Tensor, default: float, shrinkage: float
    ) -> Tensor:
        """Return the width of highest F1 over some folds, `(c)`; of equals the smallest."""
        scores = []
        for counted in self.folds:
            scored = AUCounts(counted[0].au_names)
            for fold in folds:
                rest = [other for other in folds if other != fold] or [fold]
                tuned = ScoreHistogram(counted[0].au_names)
                for other in rest:
                    tuned.merge(counted[other])
                threshold = shrink_thresholds(
                    tuned.best_thresholds(default=default),
                    positive[rest].sum(0),
                    default=default,
                    shrinkage=shrinkage,
                )
                bins = tuned.num_bins
                edge = (threshold * bins).round().clamp(0, bins - 1) / bins
                scored.merge(counted[fold].counts_at(edge))
            scores.append(scored.f1().nan_to_num(-1))
        return torch.tensor(self.widths, dtype=torch.float64)[torch.stack(scores).argmax(0)]
