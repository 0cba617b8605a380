"""Smoothing over time that respects gaps and real timestamps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes

__all__ = ["smooth"]


def smooth(
    prob: Tensor,
    timestamps: Tensor,
    width: float | Sequence[float],
    *,
    valid: Tensor | None = None,
    max_gap: float = 0.5,
) -> Tensor:
    """Average each probability over the time around its frame, without crossing a gap.

    Frame i becomes the mean over the frames within `width` / 2 seconds of it in the same stretch of
    usable frames, so a width of 0 changes nothing. A stretch ends where a frame is not valid and
    where two frames are further apart than `max_gap`.

    Args:
        prob: `(t, c)`, probability of one video.
        timestamps: `(t)`, seconds, increasing.
        width: Width of the average in seconds, one number or one per Action Unit. The best width
            differs: brows want a fraction of a second, cheeks several.
        valid: `(t)`, bool, True where the frame has a face; all if left out. Other frames are
            returned as they are and influence nothing.
        max_gap: Longest time between two frames of one stretch, in seconds.

    Returns:
        `(t, c)`, in the dtype of `prob`.

    Raises:
        TypeError: If `valid` is not bool.
        ValueError: If shapes differ, the timestamps do not increase, a usable probability is NaN,
            or a number is out of range.

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.0], [0.9], [0.0], [0.6]])
        >>> smooth(prob, torch.tensor([0.0, 0.1, 0.2, 5.0]), 0.25).flatten()
        tensor([0.4500, 0.3000, 0.4500, 0.6000])
    """
    check_shapes(prob=(prob, "t c"), timestamps=(timestamps, "t"), valid=(valid, "t"))
    check_mask("valid", valid)
    check_range("max_gap", max_gap, 0, open_low=True)
    widths = torch.as_tensor(width, dtype=torch.float64).expand(prob.shape[-1]).tolist()
    for value in widths:
        check_range("width", value, 0, open_high=True)
    times = timestamps.double()
    if not bool((times.diff() > 0).all()):
        raise ValueError("`timestamps` must increase from frame to frame.")
    usable = torch.ones_like(times, dtype=torch.bool) if valid is None else valid
    frames = usable.nonzero().flatten()
    if len(frames) == 0:
        return prob.clone()
    starts_stretch = torch.ones_like(frames, dtype=torch.bool)
    starts_stretch[1:] = (frames.diff() > 1) | (times[frames].diff() > max_gap)
    # Stretches are moved further apart than any window reaches, so one search finds all windows.
    stretch = starts_stretch.cumsum(0)
    clock = times[frames] + stretch * (max(widths) + 1)
    values = prob[frames].double()
    if bool(values.isnan().any()):
        raise ValueError("`prob` is NaN in a usable frame; mark such frames in `valid`.")
    total = torch.cat([values.new_zeros(1, prob.shape[-1]), values.cumsum(0)])
    result = prob.clone()
    for c, value in enumerate(widths):
        if value == 0:
            continue
        # A nanosecond, because timestamps of a regular clock are rounded.
        first = torch.searchsorted(clock, clock - value / 2 - 1e-9)
        end = torch.searchsorted(clock, clock + value / 2 + 1e-9)
        mean = (total[end, c] - total[first, c]) / (end - first)
        # Differences of long sums may leave [0, 1] by a rounding error.
        result[frames, c] = mean.clamp(0, 1).to(prob.dtype)
    return result
