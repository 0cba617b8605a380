"""Smoothing over time that respects gaps and real timestamps, and averages over models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes

SmoothingKind: TypeAlias = Literal["mean", "median", "exponential"]
TimeUnit: TypeAlias = Literal["seconds", "frames"]
SMOOTHING_KINDS: tuple[SmoothingKind, ...] = ("mean", "median", "exponential")
TIME_UNITS: tuple[TimeUnit, ...] = ("seconds", "frames")

# Elements that a median gathers at once: bounds the memory of a long video with a wide window.
MEDIAN_CHUNK = 2_000_000


def smooth(
    prob: Tensor,
    timestamps: Tensor,
    window: float | Sequence[float] | Tensor,
    *,
    kind: SmoothingKind = "mean",
    unit: TimeUnit = "seconds",
    valid: Tensor | None = None,
    max_gap: float = 0.5,
) -> Tensor:
    r"""Smooth each probability over the time around its frame, without crossing a gap.

    `"mean"` and `"median"` look at the frames within `window` / 2 seconds on either side.
    `"exponential"` looks back only, so it can run on a live stream: frame i becomes

    $$ \frac{\sum_{j \le i} e^{-(t_i - t_j) / w}\, p_j}{\sum_{j \le i} e^{-(t_i - t_j) / w}} $$

    with `window` as the time constant w: a frame that long ago weighs 1/e. Only frames of the same
    segment take part. A segment ends where a frame is not valid, where two frames are further apart
    than `max_gap`, and where the clock jumps back, as it does in some spliced files. A window of 0
    changes nothing.

    Args:
        prob: `(t, c)`, probability in [0, 1] of one video.
        timestamps: `(t)`, seconds, in the order of the frames.
        window: Width of the window, or the time constant; one number or one per Action Unit. The
            best one differs: brows want a fraction of a second, cheeks several.
        kind: `"mean"`, `"median"` or `"exponential"`.
        unit: What `window` counts, `"seconds"` or `"frames"`. A window in frames has an odd number
            of them, or 0.
        valid: `(t)`, bool, True where the frame is to be used; all if left out. Other frames are
            returned as they are and influence nothing.
        max_gap: Longest time between two frames of one segment, in seconds.

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
    windows = torch.as_tensor(window, dtype=torch.float64).expand(prob.shape[-1]).tolist()
    check_windows("window", windows, kind, unit)
    times = timestamps.to(prob.device, torch.float64)
    if not bool(times.isfinite().all()):
        raise ValueError("`timestamps` must be finite.")
    frames, segment = _split_segments(times, valid, max_gap)
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
    # Action Units of one window go together: one search of its frames serves all of them.
    for value in sorted(set(windows) - {0.0}):
        columns = [c for c, one in enumerate(windows) if one == value]
        if kind == "exponential":
            smoothed = _exponential(values[:, columns], clock, segment, value)
        else:
            reach = value / 2 if unit == "seconds" else (value - 1) / 2
            first, end = _windows(clock, segment, reach)
            average = _mean if kind == "mean" else _median
            smoothed = average(values[:, columns], first, end)
        # Differences of long sums may leave [0, 1] by a rounding error.
        result[frames[:, None], torch.tensor(columns, device=prob.device)] = smoothed.clamp(
            0, 1
        ).to(prob.dtype)
    return result


class ExponentialSmoother:
    """`smooth(..., kind="exponential")` for a live stream: frame by frame, in constant memory."""

    def __init__(
        self, windows: Sequence[float], *, unit: TimeUnit = "seconds", max_gap: float = 0.5
    ) -> None:
        self.windows = torch.tensor(windows, dtype=torch.float64)
        self.unit: TimeUnit = unit
        self.max_gap = max_gap
        self.reset()

    def reset(self) -> None:
        """Start afresh, as at the first frame of a video."""
        self._total = torch.zeros_like(self.windows)
        self._weight = torch.zeros_like(self.windows)
        self._time: float | None = None

    def step(self, prob: Tensor, timestamp: float, *, valid: bool = True) -> Tensor:
        """Smooth the next frame, `(c)`; one that is not valid is returned as it is."""
        check_shapes(sizes={"c": len(self.windows)}, prob=(prob, "c"))
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
        # A window of 0 keeps nothing, frames of the same time included.
        decay = torch.exp(-since / self.windows).where(self.windows > 0, 0.0)
        value = prob.double().to(self.windows.device)
        self._total = decay * self._total + value
        self._weight = decay * self._weight + 1
        self._time = timestamp
        return (self._total / self._weight).clamp(0, 1).to(prob)


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
    # The odds of an exact 0 or 1 are not finite: one certain model would outvote all others.
    odds = stacked.clamp(1e-7, 1 - 1e-7).logit()
    return (share * odds).sum(0).sigmoid().to(probs[0].dtype)


# -------------------------------------------------------------------------------------- internals
def check_windows(name: str, windows: Sequence[float], kind: str, unit: str) -> None:
    """Check smoothing windows: finite, not negative, odd where they count frames."""
    for value in windows:
        check_range(name, value, 0, float("inf"), open_high=True)
        if unit == "frames" and kind != "exponential" and value != 0 and value % 2 != 1:
            raise ValueError(
                f"`{name}` in frames must be an odd number of frames, or 0; got {value:g}."
            )


def _split_segments(times: Tensor, valid: Tensor | None, max_gap: float) -> tuple[Tensor, Tensor]:
    """Return the usable frames, and the number of the segment of each, both `(n)` and rising."""
    usable = torch.ones_like(times, dtype=torch.bool) if valid is None else valid.to(times.device)
    frames = usable.nonzero().flatten()
    starts = torch.ones_like(frames, dtype=torch.bool)
    passed = times[frames].diff()
    starts[1:] = (frames.diff() > 1) | (passed > max_gap) | (passed < 0)
    return frames, starts.cumsum(0)


def _windows(clock: Tensor, segment: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return first and end row of each window, both `(n)`."""
    # Segments follow each other further apart than any window reaches, so that one search over
    # one rising clock finds all windows.
    passed = clock.diff(prepend=clock[:1])
    passed[1:] = torch.where(segment.diff() > 0, 2 * reach + 1, passed[1:])
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


def _exponential(values: Tensor, clock: Tensor, segment: Tensor, window: float) -> Tensor:
    """Weighted mean of the past, by doubling: after k rounds a sum reaches 2^k frames back."""
    total, weight = values.clone(), values.new_ones(len(values), 1)
    step = 1
    while step < len(values):
        together = segment[step:] == segment[:-step]
        decay = torch.exp((clock[:-step] - clock[step:]) / window).where(together, 0)
        if not bool(decay.any()):
            break
        total[step:] = total[step:] + decay[:, None] * total[:-step]
        weight[step:] = weight[step:] + decay[:, None] * weight[:-step]
        step *= 2
    return total / weight
