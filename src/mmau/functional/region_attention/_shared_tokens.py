"""Pooling of tokens that other layers read, too, with one gradient for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from mmau._checks import check_shapes

__all__ = ["pool_shared_tokens"]


class _PoolShared(torch.autograd.Function):
    """`rows tokens`, and the tokens again, whose gradient arrives here first.

    Autograd would build one gradient of the size of all tokens for the pooling, another for the
    attention, and add them into a third. Whoever reads the second output hands its gradient to
    `backward`, which adds the little that the pooling contributes to that buffer.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, rows)
        ctx.set_materialize_grads(False)
        return torch.bmm(rows, tokens), tokens.view_as(tokens)

    @staticmethod
    def backward(
        ctx: Any, d_pooled: Tensor | None, d_tokens: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        tokens, rows = ctx.saved_tensors
        if d_pooled is None:
            return d_tokens, None
        d_rows = None
        if ctx.needs_input_grad[1]:
            d_rows = torch.bmm(d_pooled, tokens.transpose(1, 2))
        spread = rows.transpose(1, 2)
        if d_tokens is None:
            return torch.bmm(spread, d_pooled), d_rows
        # The buffer was made by the backward of the only reader a moment ago. It is left alone if a
        # second derivative may still need it, or if it is an expanded view.
        if torch.is_grad_enabled() or not d_tokens.is_contiguous():
            return torch.baddbmm(d_tokens, spread, d_pooled), d_rows
        return d_tokens.baddbmm_(spread, d_pooled), d_rows


# `Function.apply` is untyped in torch.
_pool_shared = cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", _PoolShared.apply)


def pool_shared_tokens(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Average tokens that another layer is going to read as well.

    The second result holds the tokens themselves. Give it to **one** reader and leave the argument
    alone: then the gradients of the pooling and of the reader are added up in one buffer, instead
    of three tensors of the size of all tokens. Values and gradients are those of `rows @ tokens`.

    Args:
        tokens: `(b, p, e)`.
        rows: `(b, r, p)`, one row of weights for each mean, in the dtype of the tokens.

    Returns:
        The means `(b, r, e)`, and the tokens `(b, p, e)` to read from.

    Raises:
        ValueError: If a shape is wrong.

    Examples:
        >>> tokens = torch.tensor([[[1.0], [3.0]]], requires_grad=True)
        >>> means, shared = pool_shared_tokens(tokens, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
        >>> (means.sum() + shared.square().sum()).backward()
        >>> means.tolist(), tokens.grad.tolist()
        ([[[2.0], [3.0]]], [[[2.5], [7.5]]])
    """
    check_shapes(tokens=(tokens, "b p e"), rows=(rows, "b r p"))
    if torch.is_grad_enabled() and tokens.requires_grad:
        return _pool_shared(tokens, rows)
    return torch.bmm(rows, tokens), tokens
