"""Attention of few queries over many tokens that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_choice, check_shapes

__all__ = [
    "REGION_ATTENTION_IMPLEMENTATIONS",
    "RegionAttention",
    "choose_region_attention",
    "region_attention",
]

REGION_ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("auto", "folded", "sdpa")
"""What `implementation` accepts."""


class RegionAttention(NamedTuple):
    """What `region_attention` returns."""

    context: Tensor
    """`(..., m, d)`, heads side by side."""
    attention: Tensor | None
    """`(..., heads, m, p)`, rows sum to 1, if asked for."""


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the tokens, in float32 for half precision, in the dtype of the scores."""
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)


class _SharedAttention(torch.autograd.Function):
    """`softmax(queries tokens^T) tokens`: the tokens are keys and values at once.

    Autograd would build the gradient of the tokens twice, as keys and as values, and add the two;
    here both go into one buffer. The attention is an output, not hidden in `ctx`, so that it can be
    returned with a gradient and second derivatives are right.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(queries, tokens.transpose(1, 2))
        attention = _softmax(scores)
        ctx.save_for_backward(queries, tokens, attention)
        ctx.set_materialize_grads(False)
        return torch.bmm(attention, tokens), attention

    @staticmethod
    def backward(
        ctx: Any, d_context: Tensor | None, d_attention: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        queries, tokens, attention = ctx.saved_tensors
        if d_context is None:  # only the attention was used
            d_context = torch.zeros_like(queries)
        total = torch.bmm(d_context, tokens.transpose(1, 2))
        if d_attention is not None:
            total = total + d_attention
        d_scores = torch._softmax_backward_data(total, attention, -1, attention.dtype)
        d_queries = d_tokens = None
        if ctx.needs_input_grad[0]:
            d_queries = torch.bmm(d_scores, tokens)
        if ctx.needs_input_grad[1]:
            d_tokens = torch.bmm(attention.transpose(1, 2), d_context)
            d_tokens.baddbmm_(d_scores.transpose(1, 2), queries)
        return d_queries, d_tokens


# `Function.apply` is untyped in torch.
_shared_attention = cast(
    "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", _SharedAttention.apply
)


def _folded(
    queries: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Move the key projection to the queries and the value projection behind the mean."""
    batch, num_queries, d_model = queries.shape
    num_tokens, d_visual = tokens.shape[1:]
    per_head = (num_heads, d_model // num_heads, d_visual)

    heads = queries.view(batch * num_queries, *per_head[:2]).transpose(0, 1)
    asked = torch.bmm(heads, key_weight.view(per_head))  # heads, b m, d_visual
    asked = asked.view(num_heads, batch, num_queries, d_visual).transpose(0, 1)
    asked = asked.reshape(batch, num_heads * num_queries, d_visual)
    found, attention = _shared_attention(asked, tokens)
    found = found.view(batch, num_heads, num_queries, d_visual).transpose(0, 1)
    found = found.reshape(num_heads, batch * num_queries, d_visual)
    context = torch.bmm(found, value_weight.view(per_head).transpose(1, 2))
    context = context.transpose(0, 1).reshape(batch, num_queries, d_model)
    return context, attention.view(batch, num_heads, num_queries, num_tokens)


def _projected(
    queries: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    num_heads: int,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention as it is usually written: keys and values of every token."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(1, 2)

    query, key = split(queries), split(F.linear(tokens, key_weight))
    value = split(F.linear(tokens, value_weight))
    attention = None
    if return_attention:
        # The fused kernel keeps its weights to itself.
        scores = query @ key.transpose(-1, -2)
        attention = _softmax(scores)
        context = attention @ value
    else:
        context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return context.transpose(1, 2).flatten(-2), attention


def choose_region_attention(
    num_queries: int, num_tokens: int, d_model: int, d_visual: int, num_heads: int
) -> Literal["folded", "sdpa"]:
    r"""Return the implementation that needs fewer multiply-adds.

    $$ \text{folded} = 2 M D D_v + 2 M h N D_v, \qquad \text{sdpa} = 2 N D D_v + 2 M N D $$

    Args:
        num_queries: Number `M` of queries of one frame.
        num_tokens: Number `N` of tokens of one frame.
        d_model: Width `D` of the queries.
        d_visual: Width `D_v` of the tokens.
        num_heads: Number `h` of heads.

    Returns:
        `"folded"` or `"sdpa"`.

    Examples:
        >>> choose_region_attention(12, 256, 768, 768, 8)
        'folded'
        >>> choose_region_attention(77, 256, 768, 768, 8)
        'sdpa'
    """
    folded = num_queries * d_visual * (d_model + num_heads * num_tokens)
    projected = num_tokens * d_model * (d_visual + num_queries)
    return "folded" if folded <= projected else "sdpa"


def region_attention(
    queries: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    num_heads: int,
    implementation: str = "auto",
    return_attention: bool = False,
) -> RegionAttention:
    r"""Let a few queries attend to many tokens, without a key and a value for every token.

    $$ A_h = \operatorname{softmax}\!\big( (q_h W_{K,h})\, F^\top / \sqrt{d_h} \big), \qquad
    \text{context}_h = (A_h F)\, W_{V,h}^\top + b_{V,h} $$

    The brackets are the whole trick: `"folded"` multiplies in this order, `"sdpa"` computes
    $F W_K^\top$ and $F W_V^\top$ first. Both are exact and have the same gradients. A bias of
    the keys would move all scores of a row by the same amount, which softmax does not see, so
    there is none. Softmax runs in float32 under autocast.

    Args:
        queries: `(..., m, d)`, projected queries, not yet scaled.
        tokens: `(..., p, e)`, shared tokens of width `e`, same leading axes.
        key_weight: `(d, e)`, as in `nn.Linear(e, d).weight`.
        value_weight: `(d, e)`, likewise.
        value_bias: `(d,)`, or `None`.
        num_heads: Number of heads, a divisor of `d`.
        implementation: `"folded"`, `"sdpa"`, or `"auto"`: the one with fewer multiply-adds.
        return_attention: Whether to return the attention. Free when folded; `"sdpa"` then
            leaves the fused kernel.

    Returns:
        The context, and the attention or `None`.

    Raises:
        ValueError: If a shape is wrong, the heads do not divide `d`, or the implementation is
            unknown.

    References:
        Section 3.2 of the paper; the folding is ours.

    Examples:
        >>> eye = torch.eye(2)
        >>> found = region_attention(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]),
        ...                          eye, eye, num_heads=1, return_attention=True)
        >>> found.context, found.attention
        (tensor([[[1., 2.]]]), tensor([[[[0.5000, 0.5000]]]]))
    """
    check_choice("implementation", implementation, REGION_ATTENTION_IMPLEMENTATIONS)
    check_shapes(
        queries=(queries, "... m d"),
        tokens=(tokens, "... p e"),
        key_weight=(key_weight, "d e"),
        value_weight=(value_weight, "d e"),
        value_bias=(value_bias, "d"),
    )
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
    if implementation == "auto":
        implementation = choose_region_attention(
            num_queries, num_tokens, d_model, d_visual, num_heads
        )
    device = queries.device.type
    if torch.is_autocast_enabled(device) and queries.dtype != torch.float64:
        # Cast by hand: what an autograd function saves must have the dtype that it computes in.
        dtype = torch.get_autocast_dtype(device)
        queries, tokens = queries.to(dtype), tokens.to(dtype)
        key_weight, value_weight = key_weight.to(dtype), value_weight.to(dtype)
        value_bias = None if value_bias is None else value_bias.to(dtype)
    scaled = queries * (d_model // num_heads) ** -0.5
    scaled = scaled.reshape(math.prod(leading), num_queries, d_model)
    tokens = tokens.reshape(math.prod(leading), num_tokens, d_visual)
    attention: Tensor | None
    with torch.autocast(device, enabled=False):
        if implementation == "folded":
            context, attention = _folded(scaled, tokens, key_weight, value_weight, num_heads)
        else:
            context, attention = _projected(
                scaled, tokens, key_weight, value_weight, num_heads, return_attention
            )
    # Rows of the attention sum to one, so the bias passes through it unchanged.
    if value_bias is not None:
        context = context + value_bias
    return RegionAttention(
        context.view(*leading, num_queries, d_model),
        attention.view(*leading, num_heads, num_queries, num_tokens)
        if return_attention and attention is not None
        else None,
    )
