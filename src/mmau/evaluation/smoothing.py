"""Smoothing over time that respects gaps and real timestamps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes
from mmau.evaluation.counts import AUCounts
from mmau.evaluation.ranking import ScoreHistogram
from mmau.evaluation.thresholds import (
    SHRINKAGE,
    deal_folds,
    fit_thresholds,
    num_positive_groups,
    shrink_thresholds,
)

SmoothingKind: TypeAlias = Literal["mean", "median", "exponential"]
TimeUnit: TypeAlias = Literal["seconds", "frames"]
SMOOTHING_KINDS: tuple[SmoothingKind, ...] = ("mean", "median", "exponential")
TIME_UNITS: tuple[TimeUnit, ...] = ("seconds", "frames")

# Elements that a median gathers at once: bounds the memory of a long video with a wide window.
MEDIAN_CHUNK = 2_000_000


def smooth(
    prob: Tensor,
    timestamps: Tensor,
    width: float | Sequence[float] | Tensor,
    *,
    kind: SmoothingKind = "mean",
    unit: TimeUnit = "seconds",
    valid: Tensor | None = None,
    max_gap: float = 0.5,
) -> Tensor:
    r"""Smooth each probability over the time around its frame, without crossing a gap.

    `"mean"` and `"median"` look at the frames within `width` / 2 seconds on either side.
    `"exponential"` looks back only, so it can run on a live stream: frame i becomes

    $$ \frac{\sum_{j \le i} e^{-(t_i - t_j) / w}\, p_j}{\sum_{j \le i} e^{-(t_i - t_j) / w}} $$

    with `width` as the time constant w: a frame that long ago weighs 1/e. Only frames of the same
    stretch take part. A stretch ends where a frame is not valid, where two frames are further apart
    than `max_gap`, and where the clock jumps back, as it does in some spliced files. A width of 0
    changes nothing.

    Args:
        prob: `(t, c)`, probability in [0, 1] of one video.
        timestamps: `(t)`, seconds, in the order of the frames.
        width: Width of the window, or the time constant; one number or one per Action Unit. The
            best width differs: brows want a fraction of a second, cheeks several.
        kind: `"mean"`, `"median"` or `"exponential"`.
        unit: What `width` counts, `"seconds"` or `"frames"`. A window in frames has an odd number
            of them, or 0.
        valid: `(t)`, bool, True where the frame is to be used; all if left out. Other frames are
            returned as they are and influence nothing.
        max_gap: Longest time between two frames of one stretch, in seconds.

    Returns:
        `(t, c)`, in the dtype of `prob`.

    Raises:
        TypeError: If `valid` is not bool.
        ValueError: If shapes differ, a timestamp is not finite, a usable probability is NaN or
            outside [0, 1], or an option is out of range.

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.0], [0.9], [0.0], [0.6]])
        >>> times = torch.tensor([0.0, 0.1, 0.2, 5.0])
        >>> smooth(prob, times, 0.25).flatten()
        tensor([0.4500, 0.3000, 0.4500, 0.6000])
        >>> smooth(prob, times, 3, kind="median", unit="frames").flatten()
        tensor([0.4500, 0.0000, 0.4500, 0.6000])
    """
    check_shapes(prob=(prob, "t c"), timestamps=(timestamps, "t"), valid=(valid, "t"))
    check_mask("valid", valid)
    check_choice("kind", kind, SMOOTHING_KINDS)
    check_choice("unit", unit, TIME_UNITS)
    check_range("max_gap", max_gap, 0, open_low=True)
    widths = torch.as_tensor(width, dtype=torch.float64).expand(prob.shape[-1]).tolist()
    check_widths("width", widths, kind, unit)
    times = timestamps.to(prob.device, torch.float64)
    if not bool(times.isfinite().all()):
        raise ValueError("`timestamps` must be finite.")
    usable = None if valid is None else valid.to(prob.device)
    stretches = _stretches(times, usable, max_gap)
    frames = stretches.frames
    if len(frames) == 0:
        return prob.clone()
    values = prob[frames].double()
    if bool(values.isnan().any()):
        raise ValueError("`prob` is NaN in a usable frame; mark such frames in `valid`.")
    if float(values.amin()) < 0 or float(values.amax()) > 1:
        raise ValueError(
            f"`prob` must be in [0, 1]; got values from {float(values.amin()):g} to "
            f"{float(values.amax()):g}. Are these logits?"
        )
    clock = times[frames] if unit == "seconds" else frames.double()
    result = prob.clone()
    # Action Units of one width go together: a search of the windows serves all of them.
    for value in sorted(set(widths) - {0.0}):
        columns = [c for c, one in enumerate(widths) if one == value]
        if kind == "exponential":
            smoothed = _exponential(values[:, columns], clock, stretches.number, value)
        else:
            reach = value / 2 if unit == "seconds" else (value - 1) / 2
            first, end = _windows(clock, stretches.number, reach)
            average = _mean if kind == "mean" else _median
            smoothed = average(values[:, columns], first, end)
        # Differences of long sums may leave [0, 1] by a rounding error.
        result[frames[:, None], torch.tensor(columns, device=prob.device)] = smoothed.clamp(
            0, 1
        ).to(prob.dtype)
    return result


class ExponentialSmoother:
    """`smooth(..., kind="exponential")` for a live stream: one frame in, one frame out.

    Frame by frame it gives what `smooth` gives for the whole video, in memory that does not grow.

    Args:
        width: Time constant, one number per Action Unit; 0 for none.
        unit: What `width` counts, `"seconds"` or `"frames"`.
        max_gap: Longest time between two frames of one stretch, in seconds.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> smoother = ExponentialSmoother([1.0], unit="frames")
        >>> for i, prob in enumerate([0.0, 1.0]):  # 1 / (1 + 1 / e)
        ...     smoothed = smoother.step(torch.tensor([prob]), i / 30)
        >>> smoothed
        tensor([0.7311])
    """

    def __init__(
        self, width: Sequence[float], *, unit: TimeUnit = "seconds", max_gap: float = 0.5
    ) -> None:
        check_choice("unit", unit, TIME_UNITS)
        check_range("max_gap", max_gap, 0, open_low=True)
        check_widths("width", [float(value) for value in width], "exponential", unit)
        self.width = torch.tensor([float(value) for value in width], dtype=torch.float64)
        self.unit: TimeUnit = unit
        self.max_gap = max_gap
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the start of a video."""
        self._total = torch.zeros_like(self.width)
        self._weight = torch.zeros_like(self.width)
        self._time: float | None = None

    def step(self, prob: Tensor, timestamp: float, *, valid: bool = True) -> Tensor:
        """Smooth the next frame.

        Args:
            prob: `(c)`, probability in [0, 1].
            timestamp: Seconds; a jump back begins a new stretch, as does a gap.
            valid: Whether the frame is to be used; if not, it comes back as it is and the next
                frame starts afresh.

        Returns:
            `(c)`, in the dtype of `prob`.

        Raises:
            ValueError: If the shape is wrong, the timestamp is not finite, or a usable probability
                is NaN.
        """
        check_shapes(sizes={"c": len(self.width)}, prob=(prob, "c"))
        if not math.isfinite(timestamp):
            raise ValueError(f"`timestamp` must be finite; got {timestamp!r}.")
        if not valid:
            self.reset()
            self._time = timestamp
            return prob.clone()
        if bool(prob.isnan().any()):
            raise ValueError("`prob` is NaN in a usable frame; mark such frames in `valid`.")
        passed = float("inf") if self._time is None else timestamp - self._time
        if passed > self.max_gap or passed < 0:
            self.reset()
        since = passed if self.unit == "seconds" else 1.0
        # A width of 0 forgets everything, frames of the same time included.
        decay = torch.exp(-since / self.width).where(self.width > 0, 0.0)
        value = prob.double().to(self.width.device)
        self._total = decay * self._total + value
        self._weight = decay * self._weight + 1
        self._time = timestamp
        return (self._total / self._weight).clamp(0, 1).to(prob)


# -------------------------------------------------------------------------------------- internals
def check_widths(name: str, widths: Sequence[float], kind: str, unit: str) -> None:
    """Check widths of smoothing: finite, not negative, odd where they count frames."""
    for value in widths:
        check_range(name, value, 0, float("inf"), open_high=True)
        if unit == "frames" and kind != "exponential" and value != 0 and value % 2 != 1:
            raise ValueError(
                f"`{name}` in frames must be an odd number of frames, or 0; got {value:g}."
            )


class _Stretches(NamedTuple):
    frames: Tensor
    """`(n)`, int64: the usable frames."""
    number: Tensor
    """`(n)`, int64: which stretch each of them belongs to, rising."""


def _stretches(times: Tensor, valid: Tensor | None, max_gap: float) -> _Stretches:
    usable = torch.ones_like(times, dtype=torch.bool) if valid is None else valid
    frames = usable.nonzero().flatten()
    starts = torch.ones_like(frames, dtype=torch.bool)
    passed = times[frames].diff()
    starts[1:] = (frames.diff() > 1) | (passed > max_gap) | (passed < 0)
    return _Stretches(frames, starts.cumsum(0))


def _windows(clock: Tensor, stretch: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return first and end row of each window, both `(n)`."""
    # Stretches follow each other further apart than any window reaches, so that one search over
    # one rising clock finds all windows.
    passed = clock.diff(prepend=clock[:1])
    passed[1:] = torch.where(stretch.diff() > 0, 2 * reach + 1, passed[1:])
    apart = passed.cumsum(0)
    # A microsecond, because timestamps of a regular clock are rounded.
    first = torch.searchsorted(apart, apart - reach - 1e-6)
    return first, torch.searchsorted(apart, apart + reach + 1e-6)


def _mean(values: Tensor, first: Tensor, end: Tensor) -> Tensor:
    total = torch.cat([values.new_zeros(1, values.shape[1]), values.cumsum(0)])
    return (total[end] - total[first]) / (end - first)[:, None]


def _median(values: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Middle value of each window; the mean of the two middle ones where their number is even."""
    longest = int((end - first).max())
    offsets = torch.arange(longest, device=values.device)
    result = torch.empty_like(values)
    rows = max(1, MEDIAN_CHUNK // (longest * values.shape[1]))
    for start in range(0, len(values), rows):
        here = slice(start, start + rows)
        index = first[here, None] + offsets
        inside = index < end[here, None]
        window = values[index.clamp(max=len(values) - 1)]
        window = window.masked_fill(~inside[..., None], torch.nan)
        # torch's median of an even number is the lower one; mirrored, it is the upper one.
        low = window.nanmedian(1).values
        even = (end[here] - first[here]) % 2 == 0
        if bool(even.any()):
            high = -(-window[even]).nanmedian(1).values
            low[even] = (low[even] + high) / 2
        result[here] = low
    return result


def _exponential(values: Tensor, clock: Tensor, stretch: Tensor, width: float) -> Tensor:
    """Weighted mean of the past, by doubling: after k rounds a sum reaches 2^k frames back."""
    total, weight = values.clone(), values.new_ones(len(values), 1)
    step = 1
    while step < len(values):
        together = stretch[step:] == stretch[:-step]
        decay = torch.exp((clock[:-step] - clock[step:]) / width).where(together, 0)
        if not bool(decay.any()):
            break
        total[step:] = total[step:] + decay[:, None] * total[:-step]
        weight[step:] = weight[step:] + decay[:, None] * weight[:-step]
        step *= 2
    return total / weight


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


# Odds of an exact 0 or 1 are not finite: one certain model would outvote all others.
CERTAIN = 1e-7


def ensemble(
    probs: Sequence[Tensor],
    *,
    average: Literal["logit", "probability"] = "logit",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Average the probabilities of several models or checkpoints.

    `"logit"` averages log-odds, $\sigma(\sum_k w_k\, \text{logit}(p_k))$: a model that is sure
    counts for more, and the result is sharp where all agree. `"probability"` averages
    $\sum_k w_k\, p_k$: the result is never surer than the surest model. Models that were trained
    with different losses mean different things by one number: give their posteriors
    (`loss.posterior(logits)`), not their sigmoids.

    Args:
        probs: At least one `(..., c)` tensor in [0, 1], all of one shape. NaN stays NaN.
        average: `"logit"` or `"probability"`. For `"logit"`, probabilities are kept 1e-7 away from
            0 and 1.
        weights: One weight per model, not negative, not all 0; equal if left out. They are divided
            by their sum.

    Returns:
        `(..., c)`, in the dtype of the first.

    Raises:
        ValueError: If there is nothing to average, shapes differ, a probability is outside [0, 1],
            or an option is out of range.

    Examples:
        >>> import torch
        >>> models = [torch.tensor([0.5]), torch.tensor([0.9])]
        >>> ensemble(models), ensemble(models, average="probability")  # odds 1 and 9: 3
        (tensor([0.7500]), tensor([0.7000]))
    """
    check_choice("average", average, ("logit", "probability"))
    if len(probs) == 0:
        raise ValueError("`probs` must hold the probabilities of at least one model; got none.")
    for i, prob in enumerate(probs):
        check_shapes(sizes=None, **{f"probs[{i}]": (prob, "... c")})
        if prob.shape != probs[0].shape:
            raise ValueError(
                f"`probs` must have one shape; got {tuple(probs[0].shape)} and, at {i}, "
                f"{tuple(prob.shape)}."
            )
        if bool(((prob < 0) | (prob > 1)).any()):
            raise ValueError(
                f"`probs[{i}]` must be in [0, 1]; got values from {float(prob.min()):g} to "
                f"{float(prob.max()):g}. Are these logits?"
            )
    given = [1.0] * len(probs) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(probs):
        raise ValueError(f"`weights` must be {len(probs)} numbers; got {len(given)}.")
    for weight in given:
        check_range("weights", weight, 0, float("inf"), open_high=True)
    if sum(given) == 0:
        raise ValueError("`weights` must not all be 0.")
    stacked = torch.stack([prob.double() for prob in probs])
    share = torch.tensor(given, dtype=torch.float64, device=stacked.device) / sum(given)
    share = share.reshape(-1, *[1] * probs[0].dim())
    if average == "probability":
        return (share * stacked).sum(0).to(probs[0].dtype)
    odds = stacked.clamp(CERTAIN, 1 - CERTAIN).logit()
    return (share * odds).sum(0).sigmoid().to(probs[0].dtype)


class FilledGaps(NamedTuple):
    """What `fill_gaps` returns."""

    prob: Tensor
    """`(t, c)`, with the short gaps filled."""
    valid: Tensor
    """`(t)`, bool: frames that had a value or have one now."""


def fill_gaps(
    prob: Tensor, timestamps: Tensor, valid: Tensor, *, max_gap: float = 0.5
) -> FilledGaps:
    r"""Draw a straight line in time through short gaps.

    $$ p_i = \frac{t_b - t_i}{t_b - t_a}\, p_a + \frac{t_i - t_a}{t_b - t_a}\, p_b $$

    where a and b are the nearest valid frames before and after frame i, so the nearer one weighs
    more. A gap is filled if a and b are at most `max_gap` apart and frame i lies between them in
    time. Longer gaps, and those before the first and after the last valid frame, stay as they are:
    nothing is made up there.

    Args:
        prob: `(t, c)`, probability of one video; what stands in frames that are not valid is not
            read and may be NaN.
        timestamps: `(t)`, seconds, in the order of the frames.
        valid: `(t)`, bool, True where a frame has a value.
        max_gap: Longest gap that is filled, in seconds from value to value.

    Returns:
        The values, and which frames have one.

    Raises:
        TypeError: If `valid` is not bool.
        ValueError: If shapes differ, a timestamp is not finite, or `max_gap` is not above 0.

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.2], [float("nan")], [0.6]])
        >>> valid = torch.tensor([True, False, True])
        >>> filled = fill_gaps(prob, torch.tensor([0.0, 0.1, 0.4]), valid)  # a quarter of the way
        >>> filled.prob.flatten(), filled.valid
        (tensor([0.2000, 0.3000, 0.6000]), tensor([True, True, True]))
    """
    check_shapes(prob=(prob, "t c"), timestamps=(timestamps, "t"), valid=(valid, "t"))
    check_mask("valid", valid)
    check_range("max_gap", max_gap, 0, open_low=True)
    times, valid = timestamps.to(prob.device, torch.float64), valid.to(prob.device)
    if not bool(times.isfinite().all()):
        raise ValueError("`timestamps` must be finite.")
    num_frames = len(times)
    if num_frames == 0:
        return FilledGaps(prob.clone(), valid.clone())
    frame = torch.arange(num_frames, device=times.device)
    before = torch.where(valid, frame, -1).cummax(0).values
    after = torch.where(valid, frame, num_frames).flip(0).cummin(0).values.flip(0)
    between = ~valid & (before >= 0) & (after < num_frames)
    before, after, frame = before[between], after[between], frame[between]
    # A microsecond, because timestamps of a regular clock are rounded.
    short = times[after] - times[before] <= max_gap + 1e-6
    # Some files have frames of one time, or a clock that jumps back: no line leads through those.
    short &= (times[before] < times[frame]) & (times[frame] < times[after])
    before, after, frame = before[short], after[short], frame[short]
    share = ((times[frame] - times[before]) / (times[after] - times[before]))[:, None]
    result, known = prob.clone(), valid.clone()
    line = (1 - share) * prob[before].double() + share * prob[after].double()
    result[frame], known[frame] = line.to(prob.dtype), True
    return FilledGaps(result, known)
