"""Folded attention: the keys' matrix goes to the queries, the values' behind the mean.

With `b` frames, `m` queries, `p` tokens of width `e`, and `h` heads of width `i`:

    asked = queries key_weight        (b, m h, e)    one query per head, in the space of the tokens
    attention = softmax(asked F^T)    (b, m h, p)    the tokens F are keys ...
    found = attention F               (b, m h, e)    ... and values at once
    context = found value_weight^T    (b, m, h, i)

Heads lie beside each other within a query, so that both halves are plain matrix products of
contiguous tensors and nothing is copied from one layout to another. Frames are taken a few at a
time, because `asked`, `found` and their gradients are larger than everything else but the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mmau.functional.region_attention._softmax import attention_softmax

__all__ = ["folded_attention"]

# Numbers in one `asked`: stays in the caches of a CPU, keeps a GPU busy.
PART_OF_A_CPU, PART_OF_A_GPU = 2**20, 2**26


def _parts(queries: Tensor, d_visual: int) -> list[slice]:
    """Cut the frames."""
    num_frames, num_queries, num_heads, _ = queries.shape
    if torch.compiler.is_compiling():  # a trace must hold for any number of frames
        return [slice(None)]
    most = PART_OF_A_CPU if queries.device.type == "cpu" else PART_OF_A_GPU
    step = max(1, most // max(1, num_queries * num_heads * d_visual))
    return [slice(start, start + step) for start in range(0, max(1, num_frames), step)]


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _per_head(rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply `(..., h, i)` by one matrix `(h, i, o)` per head, to a contiguous `(..., h, o)`."""
    by_head = rows.flatten(0, -3).transpose(0, 1)
    shape = (*rows.shape[:-1], weight.shape[-1])
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # neither of them knows `out=`
        return torch.bmm(by_head, weight).transpose(0, 1).reshape(shape)
    if out is None:
        out = rows.new_empty(shape)
    torch.bmm(by_head, weight, out=out.flatten(0, -3).transpose(0, 1))
    return out


def _forward(
    queries: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention, `found` and context; `into` are places for the last two."""
    asked = _per_head(queries, key_weight).flatten(1, 2)
    scores = torch.bmm(asked, tokens.transpose(1, 2))
    if mask is None:
        attention = attention_softmax(scores)
    else:
        attention = attention_softmax(scores.masked_fill(~mask, -torch.inf))
        # A row without any token is 0/0 by now: it attends to nothing.
        attention = attention.masked_fill(~mask, 0)
    found = torch.bmm(attention, tokens, out=into[0])
    by_query = found.view(*queries.shape[:3], tokens.shape[2])
    context = _per_head(by_query, value_weight.transpose(1, 2), into[1])
    return attention, found, context


class _FoldedAttention(torch.autograd.Function):
    """Folded attention, with the gradient of the tokens in one buffer.

    Autograd would build that gradient twice, for the tokens as keys and as values, and add the two.
    The attention is an output, so that it can be returned with a gradient of its own. `asked` is
    computed again in `backward`, because it costs little and is a third of what would be saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        tokens: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        for_value = ctx.needs_input_grad[3]
        parts = _parts(queries, tokens.shape[2])
        found: Tensor | None
        if len(parts) == 1:
            attention, found, context = _forward(queries, tokens, key_weight, value_weight, mask)
        else:
            batch, num_queries, num_heads, _ = queries.shape
            rows = (batch, num_queries * num_heads)
            context = queries.new_empty(queries.shape)
            attention = queries.new_empty(*rows, tokens.shape[1])
            found = queries.new_empty(*rows, tokens.shape[2]) if for_value else None
            for part in parts:
                given = (queries[part], tokens[part], key_weight, value_weight, _cut(mask, part))
                attention[part] = _forward(*given, (_cut(found, part), context[part]))[0]
        found = found if for_value else None
        ctx.save_for_backward(queries, tokens, key_weight, value_weight, mask, attention, found)
        ctx.set_materialize_grads(False)
        return context, attention

    @staticmethod
    def backward(
        ctx: Any, d_context: Tensor | None, d_attention: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, mask, attention, found = ctx.saved_tensors
        if d_context is None and d_attention is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            return _differentiable(inputs, mask, ctx.needs_input_grad, d_context, d_attention)
        queries, tokens, key_weight, value_weight = inputs
        for_queries, for_tokens, for_key, for_value, _ = ctx.needs_input_grad
        d_visual = tokens.shape[2]
        d_queries = d_tokens = d_key_weight = d_value_weight = None
        if for_value and d_context is not None:
            rows = found.view(*queries.shape[:3], d_visual).flatten(0, 1).transpose(0, 1)
            d_value_weight = torch.bmm(d_context.flatten(0, 1).permute(1, 2, 0), rows)

        parts = _parts(queries, d_visual)
        whole = len(parts) == 1
        if not whole:
            d_tokens = tokens.new_empty(tokens.shape) if for_tokens else None
            d_queries = queries.new_empty(queries.shape) if for_queries else None
        for part in parts:
            d_found, total = None, _cut(d_attention, part)
            if d_context is not None:
                d_found = _per_head(d_context[part], value_weight).flatten(1, 2)
                through = torch.bmm(d_found, tokens[part].transpose(1, 2))
                total = through if total is None else total + through
            assert total is not None
            d_scores = torch._softmax_backward_data(total, attention[part], -1, attention.dtype)
            if for_tokens:
                place = _cut(d_tokens, part)
                asked = _per_head(queries[part], key_weight).flatten(1, 2)
                if d_found is None:  # only the attention was used
                    place = torch.bmm(d_scores.transpose(1, 2), asked, out=place)
                else:
                    place = torch.bmm(attention[part].transpose(1, 2), d_found, out=place)
                    place.baddbmm_(d_scores.transpose(1, 2), asked)
                del asked
                d_tokens = place if whole else d_tokens
            if for_queries or for_key:
                del d_found  # makes room
                d_asked = torch.bmm(d_scores, tokens[part])
                d_asked = d_asked.view(*queries[part].shape[:3], d_visual)
                if for_queries:
                    place = _cut(d_queries, part)
                    place = _per_head(d_asked, key_weight.transpose(1, 2), place)
                    d_queries = place if whole else d_queries
                if for_key:
                    left = queries[part].flatten(0, 1).permute(1, 2, 0)
                    right = d_asked.flatten(0, 1).transpose(0, 1)
                    if d_key_weight is None:
                        d_key_weight = torch.bmm(left, right)
                    else:
                        d_key_weight.baddbmm_(left, right)
        return d_queries, d_tokens, d_key_weight, d_value_weight, None


def _differentiable(
    inputs: list[Tensor],
    mask: Tensor | None,
    needed: Sequence[bool],
    d_context: Tensor | None,
    d_attention: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients by autograd, which then knows how to differentiate them again."""
    queries, tokens, key_weight, value_weight = inputs
    attention, _, context = _forward(queries, tokens, key_weight, value_weight, mask)
    pairs = [(context, d_context), (attention, d_attention)]
    used = [(out, gradient) for out, gradient in pairs if gradient is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=False) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            wanted,
            [gradient for _, gradient in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return (*(next(found) if need else None for need in needed[:4]), None)


# `Function.apply` is untyped in torch.
_folded_attention = cast("Callable[..., tuple[Tensor, Tensor]]", _FoldedAttention.apply)


def folded_attention(
    queries: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend without a key or a value for any token.

    Args:
        queries: `(b, m, h, i)`, scaled.
        tokens: `(b, p, e)`, zero where the mask is false.
        key_weight: `(h, i, e)`.
        value_weight: `(h, i, e)`.
        mask: `(b, p)` bool or `None`.

    Returns:
        The context `(b, m, h, i)`, zero where no token is usable, and the attention `(b, h, m, p)`.
    """
    batch, num_queries, num_heads, _ = queries.shape
    usable = None if mask is None else mask.unsqueeze(1)
    context, attention = _folded_attention(queries, tokens, key_weight, value_weight, usable)
    by_query = attention.view(batch, num_queries, num_heads, tokens.shape[1])
    return context, by_query.transpose(1, 2)
