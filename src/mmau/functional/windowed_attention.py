"""Attention between two clocks: each query attends to the keys around its time, and a null key."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes
from mmau.functional.time_alignment import check_seconds

WINDOWED_ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("auto", "dense", "local")
"""What `implementation` accepts."""

_SMALL = 2**13
"""Scores per head and clip up to which looking for blocks costs more than it saves."""


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_time: Tensor,
    key_time: Tensor,
    *,
    window: float,
    slopes: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    key_mask: Tensor | None = None,
    implementation: Literal["auto", "dense", "local"] = "auto",
) -> Tensor:
    r"""Attend from each query to the keys within a window of time, and to one null key.

    $$ A_{t \cdot} = \operatorname{softmax}_s \big( q_t k_s / \sqrt{d_h} - \alpha_h |\tau_t -
    \tau_s| \big), \quad |\tau_t - \tau_s| \le \text{window} $$

    per head $h$ with its slope $\alpha_h$. The null key has no time and always takes part, so a
    query without a key gets the null value. Times may be irregular, differ from clip to clip, be
    in any order, and NaN or infinite: such a query or key is far from everything.

    `"dense"` computes all scores. `"local"` sorts by time and computes, for blocks of queries, the
    scores of the keys that are near one of them: the same up to rounding, and its cost grows with
    the length instead of its square. `"auto"` is local where that saves at least a quarter of the
    scores; for few scores it is dense, and so it is where a graph is being traced, whose shapes
    cannot depend on times.

    Args:
        query: `(b, t, d)`, the heads side by side.
        key: `(b, s, d)`.
        value: `(b, s, d)`.
        query_time: `(b, t)` float32 or float64, seconds.
        key_time: `(b, s)` float32 or float64, seconds on the same clock.
        window: Largest distance in time between a query and its keys, in seconds, positive.
        slopes: `(heads,)`, decay of each head in nats per second, at least 0. No gradient.
        null_key: `(d,)`.
        null_value: `(d,)`.
        key_mask: `(b, s)` bool, True for keys to use. What it excludes, NaN too, has no influence.
        implementation: `"auto"`, `"dense"` or `"local"`.

    Returns:
        `(b, t, d)`.

    Raises:
        TypeError: If the mask is not bool, or times are of low precision.
        ValueError: If shapes do not fit, the heads do not divide the width, or an option is out of
            range.

    References:
        Press et al., *ALiBi*, ICLR 2022, for a bias that is linear in the distance.

    Examples:
        >>> one = torch.ones(1, 3, 1)
        >>> value, times = torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[0.0, 0.1, 5.0]])
        >>> windowed_attention(
        ...     0 * one, one, value, times, times, window=1.0, slopes=torch.zeros(1),
        ...     null_key=torch.zeros(1), null_value=torch.zeros(1),
        ... ).flatten()
        tensor([1.0000, 1.0000, 4.5000])
    """
    check_shapes(
        query=(query, "b t d"),
        key=(key, "b s d"),
        value=(value, "b s d"),
        query_time=(query_time, "b t"),
        key_time=(key_time, "b s"),
        key_mask=(key_mask, "b s"),
        slopes=(slopes, "h"),
        null_key=(null_key, "d"),
        null_value=(null_value, "d"),
    )
    check_mask("key_mask", key_mask)
    check_range("window", window, 0, open_low=True)
    check_choice("implementation", implementation, WINDOWED_ATTENTION_IMPLEMENTATIONS)
    check_seconds(query_time=query_time, key_time=key_time)
    num_heads, width = slopes.shape[0], query.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"the heads must divide the width; got {num_heads} `slopes` and a width of {width}."
        )
    usable = torch.isfinite(key_time)
    if key_mask is not None:
        usable = usable & key_mask
    clock = query_time.to(torch.float64)
    # Keys that must not be used are infinitely late, and so out of every window.
    key_clock = torch.where(usable, key_time.to(torch.float64), torch.inf)
    blocks = None
    if implementation == "local":
        blocks = find_key_blocks(clock, key_clock, window)
    elif implementation == "auto" and not torch.compiler.is_compiling():
        dense = clock.shape[1] * key_clock.shape[1]
        if dense > _SMALL:
            blocks = find_key_blocks(clock, key_clock, window)
            if 4 * blocks.num_scores > 3 * dense:  # copying the keys has its price too
                blocks = None
    if blocks is not None:
        return attend_in_blocks(
            query,
            key,
            value,
            blocks,
            window=window,
            slopes=slopes,
            null_key=null_key,
            null_value=null_value,
        )

    def with_null(rows: Tensor, null: Tensor) -> Tensor:
        # A weight of zero does not stop a NaN.
        rows = torch.where(usable.unsqueeze(-1), rows, 0.0)
        return torch.cat((null.to(rows.dtype).expand(len(rows), 1, -1), rows), dim=1)

    key, value = with_null(key, null_key), with_null(value, null_value)
    return attend(query, key, value, clock, key_clock, window, slopes)


_SIZES = (32, 64, 128)
"""Queries per block that are tried."""
_ROW = 32
"""What it costs to copy one key and its value, in scores."""
_MARGIN = 1e-6
"""Seconds by which blocks look further than the window, so that no rounding hides a key."""


class KeyBlocks(NamedTuple):
    """Which keys each block of queries needs."""

    query_order: Tensor | None
    """`(b, t)` int64, queries by time; `None` if they are in order, or nearly."""
    clock: Tensor
    """`(b, blocks, size)` float64, seconds of the ordered queries; NaN where there is none."""
    rows: Tensor
    """`(b, blocks, n)` int64, the key of each place, or -1."""
    key_clock: Tensor
    """`(b, blocks, n)` float64, seconds of these keys; infinite where there is none."""
    num_scores: int
    """Scores per head and clip."""


def find_key_blocks(clock: Tensor, key_clock: Tensor, window: float) -> KeyBlocks:
    """Cut the queries into blocks in the order of time, and find the keys of each block."""
    query_order = None
    if bool((clock.diff(dim=1) < 0).any()):
        query_order = clock.argsort(dim=1)
        clock = clock.gather(1, query_order)
    key_order = None
    if bool((key_clock.diff(dim=1) < 0).any()):
        key_order = key_clock.argsort(dim=1)
        key_clock = key_clock.gather(1, key_order)

    tried = []
    for size in _SIZES:
        blocks = F.pad(clock, (0, -clock.shape[1] % size), value=torch.nan)
        blocks = blocks.view(len(clock), blocks.shape[1] // size, size)
        there = torch.isfinite(blocks)
        first = torch.where(there, blocks, torch.inf).amin(-1) - (window + _MARGIN)
        last = torch.where(there, blocks, -torch.inf).amax(-1) + (window + _MARGIN)
        start = torch.searchsorted(key_clock, first)
        stop = torch.searchsorted(key_clock, last, right=True)
        tried.append((blocks, start, stop))
    # One look at the device for all sizes.
    longest = torch.stack([(stop - start).amax().clamp(min=0) for _, start, stop in tried]).tolist()
    costs = [
        blocks.shape[1] * (blocks.shape[2] + _ROW) * (length + 1)
        for (blocks, _, _), length in zip(tried, longest, strict=True)
    ]
    best = costs.index(min(costs))
    (blocks, start, stop), length = tried[best], longest[best]

    place = start.unsqueeze(-1) + torch.arange(length, device=clock.device)
    there = place < stop.unsqueeze(-1)
    flat = torch.where(there, place, 0).flatten(1)
    seconds = key_clock.gather(1, flat).view(place.shape)
    rows = flat if key_order is None else key_order.gather(1, flat)
    return KeyBlocks(
        query_order,
        blocks,
        torch.where(there, rows.view(place.shape), -1),
        torch.where(there, seconds, torch.inf),
        blocks.shape[1] * blocks.shape[2] * (length + 1),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clock: Tensor,
    key_clock: Tensor,
    window: float,
    slopes: Tensor,
) -> Tensor:
    """Attend to keys within the window; the first of `(b, 1 + s, d)` is the null key."""
    num_heads = slopes.shape[0]
    # The difference of two long clocks, taken before the precision is lowered.
    distance = (clock.unsqueeze(2) - key_clock.unsqueeze(1)).abs()
    exact = torch.float64 if slopes.dtype == torch.float64 else torch.float32
    bias = F.pad(distance.to(exact), (1, 0)).unsqueeze(1) * -slopes.to(exact).view(-1, 1, 1)
    within = F.pad(distance <= window, (1, 0), value=True).unsqueeze(1)
    bias = bias.masked_fill(~within, -torch.inf).to(query.dtype)

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=bias)
    return out.transpose(1, 2).flatten(-2)


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KeyBlocks,
    *,
    window: float,
    slopes: Tensor,
    null_key: Tensor,
    null_value: Tensor,
) -> Tensor:
    """Attend block by block: the same as `attend` up to rounding."""
    (batch, length, width), num_keys = query.shape, key.shape[1]
    num_blocks, size = blocks.clock.shape[1:]
    if blocks.query_order is not None:
        order = blocks.query_order.unsqueeze(-1).expand_as(query)
        query = query.gather(1, order)
    query = F.pad(query, (0, 0, 0, num_blocks * size - length))

    # Row 0 is the null key. It also stands in for places without a key, which are infinitely late.
    offset = torch.arange(batch, device=query.device).view(-1, 1, 1) * num_keys + 1
    rows = F.pad(torch.where(blocks.rows >= 0, blocks.rows + offset, 0), (1, 0)).flatten()

    def pick(x: Tensor, null: Tensor) -> Tensor:
        table = torch.cat((null.to(x.dtype).view(1, -1), x.reshape(-1, width)))
        return F.embedding(rows, table).view(batch * num_blocks, -1, width)

    out = attend(
        query.reshape(-1, size, width),
        pick(key, null_key),
        pick(value, null_value),
        blocks.clock.flatten(0, 1),
        blocks.key_clock.flatten(0, 1),
        window,
        slopes,
    )
    out = out.view(batch, num_blocks * size, width)[:, :length]
    if blocks.query_order is not None:
        back = blocks.query_order.argsort(dim=1)
        out = out.gather(1, back.unsqueeze(-1).expand_as(out))
    return out
