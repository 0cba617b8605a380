"""Smoothing over time that respects gaps and real timestamps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes

__all__ = [
    "SMOOTHING_KINDS",
    "TIME_UNITS",
    "ExponentialSmoother",
    "SmoothingKind",
    "TimeUnit",
    "check_widths",
    "smooth",
]

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
