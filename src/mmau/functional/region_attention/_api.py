"""The function: checks, dtypes, and the choice of the implementation."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from mmau._autocast import autocast_dtype, without_autocast
from mmau._checks import check_mask, check_shapes
from mmau.functional.region_attention._choice import resolve_region_attention
from mmau.functional.region_attention._flash import check_flash, load_flash_attention
from mmau.functional.region_attention._folded import folded_attention
from mmau.functional.region_attention._projected import projected_attention

__all__ = ["RegionAttention", "region_attention"]


class RegionAttention(NamedTuple):
    """What `region_attention` returns."""

    context: Tensor
    """`(..., m, d)`, heads side by side."""
    attention: Tensor | None
    """`(..., heads, m, p)`, rows sum to 1, if asked for."""


def region_attention(
    queries: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    num_heads: int,
    mask: Tensor | None = None,
    implementation: str = "auto",
    return_attention: bool = False,
) -> RegionAttention:
    r"""Let a few queries attend to many tokens, without a key and a value for every token.

    $$ A_h = \operatorname{softmax}\!\big( (q_h W_{K,h})\, F^\top / \sqrt{d_h} \big), \qquad
    \text{context}_h = (A_h F)\, W_{V,h}^\top + b_{V,h} $$

    The brackets are the whole trick: `"folded"` multiplies in this order; `"sdpa"` and `"flash"`
    compute $F W_K^\top$ and $F W_V^\top$ first. All are exact and have the same gradients. A bias
    of the keys would move all scores of a row by the same amount, which softmax does not see, so
    there is none. Half precision, as under autocast, keeps its softmax in float32.

    A token that the mask leaves out has no influence and gets no gradient, even if it is NaN. A
    frame without any usable token has an attention of zero, and its context is the value bias.

    Args:
        queries: `(..., m, d)`, projected queries, not yet scaled.
        tokens: `(..., p, e)`, shared tokens of width `e`, same leading axes.
        key_weight: `(d, e)`, as in `nn.Linear(e, d).weight`.
        value_weight: `(d, e)`, likewise.
        value_bias: `(d,)`, or `None`.
        num_heads: Number of heads, a divisor of `d`.
        mask: `(..., p)` bool, true where a token may be used, or `None`.
        implementation: `"folded"`, `"sdpa"` (torch's fused kernels), `"flash"` (flash-attn: CUDA,
            half precision, no mask), or `"auto"`: the one of the first two with fewer
            multiply-adds.
        return_attention: Whether to return the attention. Free when folded; the others compute it
            beside their fused kernel, or instead of it.

    Returns:
        The context, and the attention or `None`; `attention_on_grid` makes pictures of it.

    Raises:
        TypeError: If the mask is not boolean.
        ValueError: If a shape is wrong, the heads do not divide `d`, the implementation is
            unknown, or it is `"flash"` and the input is not for it.
        MissingDependencyError: If it is `"flash"` and flash-attn is not installed.

    References:
        Section 3.2 of the paper; the folding is ours.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> found = region_attention(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]),
        ...                          eye, eye, num_heads=1, return_attention=True)
        >>> found.context, found.attention
        (tensor([[[1., 2.]]]), tensor([[[[0.5000, 0.5000]]]]))
    """
    check_shapes(
        queries=(queries, "... m d"),
        tokens=(tokens, "... p e"),
        key_weight=(key_weight, "d e"),
        value_weight=(value_weight, "d e"),
        value_bias=(value_bias, "d"),
        mask=(mask, "... p"),
    )
    check_mask("mask", mask)
    (num_queries, d_model), (num_tokens, d_visual) = queries.shape[-2:], tokens.shape[-2:]
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(
            f"`num_heads` must divide the width of the queries; got {num_heads} heads and a width "
            f"of {d_model}."
        )
    leading = queries.shape[:-2]
    if tokens.shape[:-2] != leading:
        raise ValueError(
            "`queries` and `tokens` must have the same leading axes; got "
            f"{tuple(queries.shape)} and {tuple(tokens.shape)}."
        )
    if mask is not None and mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"`mask` must have one value for each of the tokens, {tuple(tokens.shape[:-1])}; got "
            f"{tuple(mask.shape)}."
        )
    chosen = resolve_region_attention(
        implementation,
        num_queries=num_queries,
        num_tokens=num_tokens,
        d_model=d_model,
        d_visual=d_visual,
        num_heads=num_heads,
    )
    dtype = autocast_dtype(queries)
    if dtype is not None:
        # Cast by hand: what an autograd function saves must have the dtype that it computes in.
        queries, tokens = queries.to(dtype), tokens.to(dtype)
        key_weight, value_weight = key_weight.to(dtype), value_weight.to(dtype)
        value_bias = None if value_bias is None else value_bias.to(dtype)
    num_frames = math.prod(leading)
    d_head = d_model // num_heads
    heads = (queries * d_head**-0.5).reshape(num_frames, num_queries, num_heads, d_head)
    heads = heads.contiguous()
    tokens = tokens.reshape(num_frames, num_tokens, d_visual)
    if mask is not None:
        mask = mask.reshape(num_frames, num_tokens)
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0)  # zero times NaN would be NaN
    per_head = (num_heads, d_head, d_visual)
    matrices = (key_weight.reshape(per_head), value_weight.reshape(per_head))
    attention: Tensor | None
    with without_autocast(queries.device.type):
        if chosen == "folded":
            context, attention = folded_attention(heads, tokens, *matrices, mask)
        else:
            if chosen == "flash":
                check_flash(heads, mask)
                load_flash_attention()
            context, attention = projected_attention(
                heads,
                tokens,
                *matrices,
                mask,
                flash=chosen == "flash",
                return_attention=return_attention,
            )
    context = context.reshape(*leading, num_queries, d_model)
    # Rows of the attention sum to one, so the bias passes through it unchanged.
    if value_bias is not None:
        context = context + value_bias
    if attention is None or not return_attention:
        return RegionAttention(context, None)
    return RegionAttention(context, attention.reshape(*leading, num_heads, num_queries, num_tokens))
