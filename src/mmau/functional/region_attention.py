"""Pooling of patch tokens by region, and attention from regions to patches.

Three ways of the same attention: folded (no key or value for any token), torch's fused kernels, and
flash-attn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._autocast import autocast_dtype, without_autocast
from mmau._checks import check_choice, check_mask, check_shapes
from mmau._optional import require


class PooledRegions(NamedTuple):
    """What `region_pooling` returns, by the names of the paper."""

    local: Tensor
    """`(..., m, d)`, mean token of each region, $f_{loc}$."""
    overall: Tensor
    """`(..., d)`, mean of all tokens, $f_{glob}$."""


def region_pooling(patch_tokens: Tensor, weights: Tensor) -> PooledRegions:
    r"""Average patch tokens over the patches of each region, and over all patches.

    $$ f^{loc}_m = \frac{1}{|P_m|} \sum_{p \in P_m} F_p, \qquad
    f^{glob} = \frac{1}{N} \sum_p F_p $$

    Args:
        patch_tokens: `(..., p, d)`, patch tokens without CLS or register tokens.
        weights: `(..., m, p)`, weights of `LandmarkToPatch`; rows sum to 1. Same leading axes.

    Returns:
        The mean of each region and the overall mean, in the dtype of the tokens.

    Raises:
        ValueError: If the leading axes differ, or if the number of tokens is not that of the
            patches; tokens in excess are most likely CLS or register tokens.

    References:
        Section 3.2 of the paper.

    Examples:
        >>> tokens = torch.tensor([[1.0], [3.0], [8.0]])
        >>> local, overall = region_pooling(tokens, torch.tensor([[0.5, 0.5, 0.0]]))
        >>> local, overall
        (tensor([[2.]]), tensor([4.]))
    """
    check_region_weights(patch_tokens, weights)
    local = torch.matmul(weights.to(patch_tokens.dtype), patch_tokens)
    return PooledRegions(local, patch_tokens.mean(dim=-2))


def check_region_weights(patch_tokens: Tensor, weights: Tensor) -> None:
    """Refuse weights that are not of these patches."""
    check_shapes(patch_tokens=(patch_tokens, "... p d"), weights=(weights, "... m n"))
    num_tokens, num_patches = patch_tokens.shape[-2], weights.shape[-1]
    if num_tokens != num_patches:
        surplus = num_tokens - num_patches
        cause = "were the landmarks mapped onto another grid size?"
        if 0 < surplus <= 16:
            cause = (
                f"the {surplus} in excess are most likely the CLS token or register tokens, which "
                f"come first: pass patch_tokens[..., {surplus}:, :]."
            )
        raise ValueError(
            f"`patch_tokens` has {num_tokens} tokens, but `weights` covers {num_patches} patches; "
            f"{cause}"
        )
    if patch_tokens.shape[:-2] != weights.shape[:-2]:
        raise ValueError(
            "`patch_tokens` and `weights` must have the same leading axes; got "
            f"{tuple(patch_tokens.shape)} and {tuple(weights.shape)}."
        )


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
        The context, and the attention or `None`.

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
    check_choice("implementation", implementation, REGION_ATTENTION_IMPLEMENTATIONS)
    if implementation == "auto":
        implementation = choose_region_attention(
            num_queries, num_tokens, d_model, d_visual, num_heads
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
        if implementation == "folded":
            context, attention = folded_attention(heads, tokens, *matrices, mask)
        else:
            if implementation == "flash":
                check_flash(heads, mask)
            context, attention = projected_attention(
                heads,
                tokens,
                *matrices,
                mask,
                flash=implementation == "flash",
                return_attention=return_attention,
            )
    context = context.reshape(*leading, num_queries, d_model)
    # Rows of the attention sum to one, so the bias passes through it unchanged.
    if value_bias is not None:
        context = context + value_bias
    if attention is None or not return_attention:
        return RegionAttention(context, None)
    return RegionAttention(context, attention.reshape(*leading, num_heads, num_queries, num_tokens))


# --------------------------------------------------------------------------- which implementation

REGION_ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("auto", "folded", "sdpa", "flash")
"""What `implementation` accepts."""


def choose_region_attention(
    num_queries: int, num_tokens: int, d_model: int, d_visual: int, num_heads: int
) -> Literal["folded", "sdpa"]:
    """Return the implementation that needs fewer multiply-adds; they are counted in pairs."""
    folded = num_queries * d_visual * (d_model + num_heads * num_tokens)
    projected = num_tokens * d_model * (d_visual + num_queries)
    return "folded" if folded <= projected else "sdpa"


def require_region_attention(implementation: str) -> None:
    """Load what an implementation needs, so that a module refuses it when it is built."""
    check_choice("implementation", implementation, REGION_ATTENTION_IMPLEMENTATIONS)
    if implementation == "flash":
        load_flash_attention()


# -------------------------------------------------------------------------------- keys and values


def attention_softmax(scores: Tensor) -> Tensor:
    """Normalise over the last axis, in float32 for half precision, in the dtype of the scores."""
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)


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
    """Attend with keys and values."""
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
        flash_attention = load_flash_attention()
        context = flash_attention(queries, key, value, softmax_scale=1.0, causal=False)
    elif attention is not None:
        context = (attention @ values).transpose(1, 2)
    else:
        context = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=allowed, scale=1.0
        ).transpose(1, 2)
    return context, attention


DEVICE = "cuda"
"""Where flash-attn runs; tests with a stand-in change it."""
LARGEST_HEAD = 256
_LOADED: dict[str, Callable[..., Tensor]] = {}


def load_flash_attention() -> Callable[..., Tensor]:
    """Return the kernel, or say how to install it.

    A module calls this once when it is built: the compiler cannot trace an import.
    """
    if "flash_attn" not in _LOADED:
        library = require("flash_attn", purpose="attention with 'flash'", extra="gpu")
        _LOADED["flash_attn"] = cast("Callable[..., Tensor]", library.flash_attn_func)
    return _LOADED["flash_attn"]


def check_flash(queries: Tensor, mask: Tensor | None) -> None:
    """Refuse what the kernel cannot do, and load it; `queries` have the dtype that it gets."""
    if queries.device.type != DEVICE:
        raise ValueError(
            f"`implementation='flash'` needs tensors on a CUDA device; got {queries.device}. "
            "'folded' and 'sdpa' run anywhere."
        )
    if queries.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "`implementation='flash'` needs float16 or bfloat16, by autocast or by `.to`; got "
            f"{queries.dtype}."
        )
    if queries.shape[-1] > LARGEST_HEAD:
        raise ValueError(
            f"`implementation='flash'` needs heads of at most {LARGEST_HEAD} channels; got "
            f"{queries.shape[-1]}."
        )
    if mask is not None:
        raise ValueError("`implementation='flash'` takes no `mask`; use 'folded' or 'sdpa'.")
    load_flash_attention()


# ----------------------------------------------------------------------------------------- folded

CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
"""Numbers in one `asked`: stays in the caches of a CPU, keeps a GPU busy."""


def _chunks(queries: Tensor, d_visual: int) -> list[slice]:
    """Cut the frames into chunks."""
    num_frames, num_queries, num_heads, _ = queries.shape
    if torch.compiler.is_compiling():  # a trace must hold for any number of frames
        return [slice(None)]
    most = CPU_CHUNK if queries.device.type == "cpu" else GPU_CHUNK
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
        chunks = _chunks(queries, tokens.shape[2])
        found: Tensor | None
        if len(chunks) == 1:
            attention, found, context = _forward(queries, tokens, key_weight, value_weight, mask)
        else:
            batch, num_queries, num_heads, _ = queries.shape
            rows = (batch, num_queries * num_heads)
            context = queries.new_empty(queries.shape)
            attention = queries.new_empty(*rows, tokens.shape[1])
            found = queries.new_empty(*rows, tokens.shape[2]) if for_value else None
            for part in chunks:
                inputs = (queries[part], tokens[part], key_weight, value_weight, _cut(mask, part))
                attention[part] = _forward(*inputs, (_cut(found, part), context[part]))[0]
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

        chunks = _chunks(queries, d_visual)
        whole = len(chunks) == 1
        if not whole:
            d_tokens = tokens.new_empty(tokens.shape) if for_tokens else None
            d_queries = queries.new_empty(queries.shape) if for_queries else None
        for part in chunks:
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
    """Attend without a key or a value for any token."""
    batch, num_queries, num_heads, _ = queries.shape
    usable = None if mask is None else mask.unsqueeze(1)
    context, attention = _folded_attention(queries, tokens, key_weight, value_weight, usable)
    by_query = attention.view(batch, num_queries, num_heads, tokens.shape[1])
    return context, by_query.transpose(1, 2)


# ------------------------------------------------------------------ pooling beside another reader


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
        # The buffer was just made by the backward of the only reader. It is left alone if a second
        # derivative may still need it, or if it is an expanded view.
        if torch.is_grad_enabled() or not d_tokens.is_contiguous():
            return torch.baddbmm(d_tokens, spread, d_pooled), d_rows
        return d_tokens.baddbmm_(spread, d_pooled), d_rows


# `Function.apply` is untyped in torch.
_pool_shared = cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", _PoolShared.apply)


def pool_shared_tokens(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows tokens`, and the tokens for **one** further reader, which share a gradient."""
    check_shapes(tokens=(tokens, "b p e"), rows=(rows, "b r p"))
    if torch.is_grad_enabled() and tokens.requires_grad:
        return _pool_shared(tokens, rows)
    return torch.bmm(rows, tokens), tokens
