"""Values for frames that have none, from their neighbours in time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes

__all__ = ["FilledGaps", "fill_gaps"]


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
