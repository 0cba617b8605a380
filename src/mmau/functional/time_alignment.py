"""Features on one clock to the timestamps of another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes


class AlignedFeatures(NamedTuple):
    """What `interpolate_features` returns."""

    aligned: Tensor
    """`(b, t, a)`, features at the query times, zero where not valid."""
    valid: Tensor
    """`(b, t)` bool, True where a usable feature is near enough."""


def interpolate_features(
    features: Tensor,
    feature_times: Tensor,
    query_times: Tensor,
    *,
    feature_mask: Tensor | None = None,
    max_gap: float = 0.04,
) -> AlignedFeatures:
    r"""Interpolate features linearly onto the timestamps of video frames.

    $$ y(t) = (1 - w)\, x_l + w\, x_r, \qquad w = \frac{t - t_l}{t_r - t_l} $$

    with $l$ and $r$ the last usable feature at or before $t$ and the first one after it. If
    only one of them is within `max_gap` of $t$, its value is held; if neither is, the frame is not
    valid and its feature is zero. Nothing is NaN unless a usable feature is; what a mask excludes
    reaches neither the result nor a gradient.

    Args:
        features: `(b, s, a)`, one row per window of the signal.
        feature_times: `(b, s)` seconds, centre of each window, ascending along `s`.
        query_times: `(b, t)` seconds on the same clock, in any order; NaN is not valid.
        feature_mask: `(b, s)` bool, True for features to use; all if left out. Times are ignored
            where it is False.
        max_gap: Largest distance from a frame to a usable feature, in seconds. The default spans
            two features at 50 Hz, and a last window that ends before the audio does.

    Returns:
        The aligned features and the mask of valid frames.

    Raises:
        TypeError: If the mask is not bool, or times are not float32 or float64.
        ValueError: If shapes do not fit or `max_gap` is not positive.

    Examples:
        >>> features = torch.tensor([[[0.0], [10.0]]])
        >>> times = torch.tensor([[0.00, 0.02]])
        >>> aligned, valid = interpolate_features(features, times, torch.tensor([[0.005, 9.0]]))
        >>> aligned.flatten(), valid
        (tensor([2.5000, 0.0000]), tensor([[ True, False]]))
    """
    check_shapes(
        features=(features, "b s a"),
        feature_times=(feature_times, "b s"),
        query_times=(query_times, "b t"),
        feature_mask=(feature_mask, "b s"),
    )
    check_mask("feature_mask", feature_mask)
    check_range("max_gap", max_gap, 0, open_low=True)
    check_seconds(feature_times=feature_times, query_times=query_times)
    (batch, num_features, width), num_queries = features.shape, query_times.shape[1]
    if num_features == 0:
        empty = features.new_zeros(batch, num_queries, width)
        return AlignedFeatures(empty, torch.zeros_like(query_times, dtype=torch.bool))

    usable = torch.isfinite(feature_times)
    if feature_mask is not None:
        usable = usable & feature_mask
    clock, query = feature_times.to(torch.float64), query_times.to(torch.float64)
    # Features that are not usable take over the time of the last usable one, which keeps the order;
    # the feature after the place of a query is then always a usable one.
    index = torch.arange(num_features, device=features.device).expand(batch, -1)
    before = torch.where(usable, index, -1).cummax(dim=1).values
    filled = torch.where(before >= 0, clock.gather(1, before.clamp(min=0)), -torch.inf)
    place = torch.searchsorted(filled, query.contiguous(), right=True) - 1
    last = num_features - 1
    left = torch.where(place >= 0, before.gather(1, place.clamp(min=0)), -1)
    right = place + 1
    to_left = torch.where(left >= 0, query - clock.gather(1, left.clamp(min=0)), torch.inf)
    to_right = torch.where(right <= last, clock.gather(1, right.clamp(max=last)) - query, torch.inf)
    left_near, right_near = to_left <= max_gap, to_right <= max_gap
    valid = left_near | right_near
    both = left_near & right_near
    share = torch.where(both, to_left / (to_left + to_right), right_near.to(torch.float64))
    share = share.to(features.dtype).unsqueeze(-1)
    # Two reads instead of a sum over all features: what is not usable is never touched.
    start = torch.where(left_near, left, right).clamp(0, last)
    stop = torch.where(right_near, right, left).clamp(0, last)

    def read(position: Tensor) -> Tensor:
        rows = features.gather(1, position.unsqueeze(-1).expand(-1, -1, width))
        return torch.where(valid.unsqueeze(-1), rows, 0.0)

    return AlignedFeatures(torch.lerp(read(start), read(stop), share), valid)


def check_seconds(**times: Tensor | None) -> None:
    """Refuse times of low precision, in which a long video has no frames."""
    for name, seconds in times.items():
        if seconds is not None and seconds.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"`{name}` must be float32 or float64 seconds; got {seconds.dtype}.")
