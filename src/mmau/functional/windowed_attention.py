"""Attention between two clocks: each query sees the keys around its own time, and a null key."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes
from mmau.functional._windowed_blocks import attend, attend_in_blocks, find_key_blocks

__all__ = ["WINDOWED_ATTENTION_IMPLEMENTATIONS", "windowed_attention"]

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

    per head $h$ with its slope $\alpha_h$. The null key is at no time and always seen, so a query
    without a key gets the null value. Times may be irregular, differ from clip to clip, be in any
    order, and NaN or infinite: such a query or key is far from everything.

    `"dense"` computes all scores. `"local"` sorts by time and computes, for blocks of queries, the
    scores of the keys that one of them can see: the same up to rounding, and its cost grows with
    the length instead of its square. `"auto"` is local where that saves at least a quarter of the
    scores; for few scores it is dense, and so it is where a graph is being traced, whose shapes
    cannot depend on times.

    Args:
        query: `(b, t, d)`, the heads side by side.
        key: `(b, s, d)`.
        value: `(b, s, d)`.
        query_time: `(b, t)` float32 or float64, seconds.
        key_time: `(b, s)` float32 or float64, seconds on the same clock.
        window: Largest distance in time that is seen, in seconds, positive.
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
    for name, times in (("query_time", query_time), ("key_time", key_time)):
        if times.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"`{name}` must be float32 or float64 seconds; got {times.dtype}.")
    num_heads, width = slopes.shape[0], query.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"the heads must divide the width; got {num_heads} `slopes` and a width of {width}."
        )
    usable = torch.isfinite(key_time)
    if key_mask is not None:
        usable = usable & key_mask
    clock = query_time.to(torch.float64)
    # Keys that may not be seen are infinitely late, and so out of every window.
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
