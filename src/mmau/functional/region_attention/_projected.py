"""Attention in the usual order: a key and a value for every token, then a kernel for the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau.functional.region_attention._flash import flash_context
from mmau.functional.region_attention._softmax import attention_softmax

__all__ = ["projected_attention"]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, allowed: Tensor | None) -> Tensor:
    """Return the attention that a fused kernel keeps to itself, `(b, h, m, p)`."""
    scores = query @ key.transpose(-1, -2)
    if mask is None or allowed is None:
        return attention_softmax(scores)
    return attention_softmax(scores.masked_fill(~allowed, -torch.inf)).masked_fill(~mask, 0)


def projected_attention(
    queries: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    *,
    flash: bool,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with keys and values.

    Args:
        queries: `(b, m, h, i)`, scaled.
        tokens: `(b, p, e)`, zero where the mask is false.
        key_weight: `(h, i, e)`.
        value_weight: `(h, i, e)`.
        mask: `(b, p)` bool or `None`.
        flash: Whether flash-attn computes the context, instead of torch.
        return_attention: Whether to compute the attention, too.

    Returns:
        The context `(b, m, h, i)`, zero where no token is usable, and the attention `(b, h, m, p)`
        or `None`.
    """
    by_head = (*tokens.shape[:2], *queries.shape[2:])
    key = F.linear(tokens, key_weight.flatten(0, 1)).view(by_head)
    value = F.linear(tokens, value_weight.flatten(0, 1)).view(by_head)
    allowed = None
    if mask is not None:
        mask = mask[:, None, None]
        # A kernel may give anything for a row without tokens. So it looks at all of them: they are
        # zero, and so is the context.
        allowed = mask | ~mask.any(dim=-1, keepdim=True)

    query, keys, values = (x.transpose(1, 2) for x in (queries, key, value))
    attention = _weights(query, keys, mask, allowed) if return_attention else None
    if flash:
        context = flash_context(queries, key, value)
    elif attention is not None:
        context = (attention @ values).transpose(1, 2)
    else:
        context = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=allowed, scale=1.0
        ).transpose(1, 2)
    return context, attention
