"""Hierarchical Granularity Alignment: patch tokens to one token per facial region."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._autocast import autocast_dtype
from mmau._checks import check_choice, check_mask, check_range, check_shapes
from mmau.functional.region_attention import (
    REGION_ATTENTION_IMPLEMENTATIONS,
    check_region_weights,
    choose_region_attention,
    pool_shared_tokens,
    region_attention,
    require_region_attention,
)


class HGAOutput(NamedTuple):
    """What `HGA` returns."""

    tokens: Tensor
    """`(..., m, d)`, one aligned token per region."""
    attention: Tensor | None
    """`(..., heads, m, p)`, how each region attends to the patches, if asked for; rows sum to 1."""

    def attention_maps(self, grid_size: tuple[int, int]) -> Tensor:
        """Lay the attention out on the patch grid.

        Args:
            grid_size: Rows `h` and columns `w` of the grid, in patches.

        Returns:
            `(..., heads, m, h, w)`, a view of `attention`.

        Raises:
            ValueError: If the attention was not asked for, or the grid has another number of
                patches.
        """
        if self.attention is None:
            raise ValueError("there is no attention: call `HGA` with `return_attention=True`.")
        rows, columns = grid_size
        if rows * columns != self.attention.shape[-1]:
            raise ValueError(
                f"`attention` covers {self.attention.shape[-1]} patches, but a grid of {rows} "
                f"rows and {columns} columns has {rows * columns}."
            )
        return self.attention.view(*self.attention.shape[:-1], rows, columns)


def _pooling_rows(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Append the weights of the overall mean, and leave masked patches out of both."""
    num_frames, _, num_patches = weights.shape
    if mask is None:
        even = weights.new_full((num_frames, 1, num_patches), 1 / num_patches)
        return torch.cat((weights, even), dim=1)
    usable = mask.unsqueeze(1).to(weights.dtype)
    even = usable / usable.sum(dim=-1, keepdim=True).clamp_min(1)
    kept = weights * usable
    share = kept.sum(dim=-1, keepdim=True)
    local = torch.where(share > 0, kept / share.where(share > 0, 1.0), even)
    return torch.cat((local, even), dim=1)


class HGA(nn.Module):
    r"""Align each facial region with the whole face: local mean, attention over all patches, MLP.

    $$ \hat f_m = \text{MHCA}(Q = f^{loc}_m W_Q,\; K = F W_K,\; V = F W_V), \qquad
    \tilde f_m = \text{MLP}([\hat f_m \,\|\, f^{loc}_m \,\|\, f^{glob}]) $$

    with $f^{loc}$ and $f^{glob}$ of `region_pooling`. The MLP has one hidden layer with GELU. Its
    first matrix is kept as three, one for each part of the concatenation, so that nothing is
    concatenated and the global part is computed once per frame. The keys have no bias: no output
    depends on it. Both means are one matrix product, and the gradients of means, keys and values
    with respect to the patch tokens are added up in one buffer.

    Args:
        d_visual: Width of the patch tokens.
        d_model: Width `d` of the region tokens and of the attention.
        num_heads: Number of attention heads, a divisor of `d_model`.
        d_hidden: Width of the hidden layer of the MLP; `d_model` if left out.
        attention: `"folded"`, `"sdpa"`, `"flash"` (flash-attn: CUDA, half precision), or `"auto"`:
            `"folded"` or `"sdpa"`, whichever needs fewer multiply-adds at the number of regions and
            patches. All are exact. `print` shows what `"auto"` chose.

    Shape:
        - patch_tokens: `(..., p, d_visual)`, without CLS or register tokens
        - weights: `(..., m, p)`, from `LandmarkToPatch`
        - output: `HGAOutput`, tokens `(..., m, d)`

    Raises:
        ValueError: If a width is not positive, the heads do not divide `d_model`, or the attention
            is unknown.
        MissingDependencyError: If the attention is `"flash"` and flash-attn is not installed.

    References:
        Section 3.2 of the paper, which has `d_visual = d_model = 768`. A wider encoder, such as
        DINOv2-L with 1024, is mapped by the query, key and value projections.

    Examples:
        >>> hga = HGA(d_visual=32, d_model=16, num_heads=4)
        >>> weights = torch.full((2, 13, 9), 1 / 9)
        >>> out = hga(torch.randn(2, 9, 32), weights, return_attention=True)
        >>> out.tokens.shape, out.attention.shape, out.attention_maps((3, 3)).shape
        (torch.Size([2, 13, 16]), torch.Size([2, 4, 13, 9]), torch.Size([2, 4, 13, 3, 3]))
    """

    def __init__(
        self,
        d_visual: int,
        d_model: int = 768,
        num_heads: int = 8,
        *,
        d_hidden: int | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        d_hidden = d_model if d_hidden is None else d_hidden
        check_range("d_visual", d_visual, 1)
        check_range("d_model", d_model, 1)
        check_range("d_hidden", d_hidden, 1)
        check_choice("attention", attention, REGION_ATTENTION_IMPLEMENTATIONS)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                "`num_heads` must divide `d_model`; got "
                f"{num_heads} heads and a width of {d_model}."
            )
        self.d_visual, self.d_model, self.d_hidden = d_visual, d_model, d_hidden
        self.num_heads, self.attention = num_heads, attention
        self._chosen: dict[tuple[int, int], str] = {}
        require_region_attention(attention)
        self.to_query = nn.Linear(d_visual, d_model)
        self.to_key = nn.Linear(d_visual, d_model, bias=False)
        self.to_value = nn.Linear(d_visual, d_model)
        self.to_output = nn.Linear(d_model, d_model)
        self.hidden_attended = nn.Linear(d_model, d_hidden)
        self.hidden_local = nn.Linear(d_visual, d_hidden, bias=False)
        self.hidden_overall = nn.Linear(d_visual, d_hidden, bias=False)
        self.to_token = nn.Linear(d_hidden, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; the split layer as the one `nn.Linear` that it stands for."""
        for layer in (self.to_query, self.to_key, self.to_value, self.to_output, self.to_token):
            layer.reset_parameters()
        bound = 1 / math.sqrt(self.d_model + 2 * self.d_visual)
        for layer in (self.hidden_attended, self.hidden_local, self.hidden_overall):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.uniform_(self.hidden_attended.bias, -bound, bound)

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, *, d_hidden: int | None = None
    ) -> HGA:
        """Build the module around the weights of an `nn.MultiheadAttention`; the MLP is new.

        Args:
            attention: Attention whose queries, keys and values have one width. Its key bias, which
                has no effect, is dropped; so is its dropout.
            d_hidden: Width of the hidden layer of the MLP.

        Returns:
            A module with `d_visual = d_model = attention.embed_dim`, on the same device and in the
            same dtype.

        Raises:
            ValueError: If keys or values have another width, or `add_bias_kv` or `add_zero_attn` is
                set, which has no counterpart here.

        Examples:
            >>> HGA.from_multihead_attention(nn.MultiheadAttention(16, 4)).num_heads
            4
        """
        d_model = attention.embed_dim
        if attention.kdim != d_model or attention.vdim != d_model:
            raise ValueError(
                "`attention` must have keys and values as wide as its queries; got "
                f"{attention.kdim} and {attention.vdim} against {d_model}."
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("`attention` must not use `add_bias_kv` or `add_zero_attn`.")
        hga = cls(d_model, d_model, attention.num_heads, d_hidden=d_hidden)
        hga.to(attention.out_proj.weight)
        weights = dict(attention.named_parameters())  # a bias that is switched off is not in it
        zero = torch.zeros_like(attention.out_proj.weight[0])
        query, key, value = weights["in_proj_weight"].chunk(3)
        query_bias, _, value_bias = weights.get("in_proj_bias", zero.repeat(3)).chunk(3)
        with torch.no_grad():
            hga.to_query.weight.copy_(query)
            hga.to_query.bias.copy_(query_bias)
            hga.to_key.weight.copy_(key)
            hga.to_value.weight.copy_(value)
            hga.to_value.bias.copy_(value_bias)
            hga.to_output.weight.copy_(weights["out_proj.weight"])
            hga.to_output.bias.copy_(weights.get("out_proj.bias", zero))
        return hga

    def forward(
        self,
        patch_tokens: Tensor,
        weights: Tensor,
        *,
        mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> HGAOutput:
        """Align the regions of each frame.

        Args:
            patch_tokens: `(..., p, d_visual)`.
            weights: `(..., m, p)`, rows sum to 1, same leading axes.
            mask: `(..., p)` bool, true where a patch may be used, or `None`. The others have no
                influence and get no gradient, even if they are NaN; a region without any usable
                patch falls back to the overall mean.
            return_attention: Whether to return the attention, too.

        Returns:
            Region tokens, and the attention or `None`.

        Raises:
            TypeError: If the mask is not boolean.
            ValueError: If a shape is wrong; names CLS or register tokens if there are a few too
                many tokens for the grid.
        """
        check_shapes(
            patch_tokens=(patch_tokens, "... p d_visual"),
            mask=(mask, "... p"),
            sizes={"d_visual": self.d_visual},
        )
        check_mask("mask", mask)
        check_region_weights(patch_tokens, weights)
        if mask is not None and mask.shape != patch_tokens.shape[:-1]:
            raise ValueError(
                "`mask` must have one value for each patch, "
                f"{tuple(patch_tokens.shape[:-1])}; got {tuple(mask.shape)}."
            )
        *leading, num_regions, num_patches = weights.shape
        num_frames = math.prod(leading)
        tokens = patch_tokens.reshape(num_frames, num_patches, self.d_visual)
        dtype = autocast_dtype(tokens)
        if dtype is not None:
            tokens = tokens.to(dtype)  # once for all that read them
        if mask is not None:
            mask = mask.reshape(num_frames, num_patches)
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0)
        rows = _pooling_rows(weights.reshape(num_frames, num_regions, num_patches), mask)
        pooled, tokens = pool_shared_tokens(tokens, rows.to(tokens.dtype))
        local, overall = torch.split(pooled, [num_regions, 1], dim=1)
        local = local.contiguous()
        context, attention = region_attention(
            self.to_query(local),
            tokens,
            self.to_key.weight,
            self.to_value.weight,
            self.to_value.bias,
            num_heads=self.num_heads,
            mask=mask,
            implementation=self._implementation(num_regions, num_patches),
            return_attention=return_attention,
        )
        hidden = (
            self.hidden_attended(self.to_output(context))
            + self.hidden_local(local)
            + self.hidden_overall(overall)
        )
        out = self.to_token(F.gelu(hidden)).reshape(*leading, num_regions, self.d_model)
        if attention is not None:
            attention = attention.reshape(*leading, *attention.shape[1:])
        return HGAOutput(out, attention)

    def _implementation(self, num_regions: int, num_patches: int) -> str:
        """Decide once for each number of regions and patches, and remember it for `print`."""
        if self.attention != "auto":
            return self.attention
        key = (num_regions, num_patches)
        if key in self._chosen:
            return self._chosen[key]
        chosen = choose_region_attention(
            num_regions, num_patches, self.d_model, self.d_visual, self.num_heads
        )
        if not torch.compiler.is_compiling():  # a trace must not depend on what it has written
            self._chosen[key] = chosen
        return chosen

    def extra_repr(self) -> str:
        """Widths and attention, as `print` shows them."""
        shown = self.attention
        if shown == "auto":
            surplus = self.num_heads * self.d_visual - self.d_model
            # The number of regions at which folding stops to pay on a large grid.
            bound = (
                f" up to {self.d_model * self.d_visual // surplus} regions of a large grid"
                if surplus > 0
                else ""
            )
            shown = f"auto: folded{bound}"
            for (num_regions, num_patches), chosen in self._chosen.items():
                shown += f"; {chosen} for {num_regions} regions of {num_patches} patches"
        return (
            f"d_visual={self.d_visual}, d_model={self.d_model}, num_heads={self.num_heads}, "
            f"d_hidden={self.d_hidden}, attention={shown!r}"
        )


class RegionMerge(nn.Module):
    r"""Merge the region tokens of a frame into one feature.

    `"flatten"` projects all regions side by side, so that the feature keeps who is who; `"mean"`
    averages them first; `"attention"` averages them with weights
    $\operatorname{softmax}_m(w^\top \tilde f_m)$ that start equal.

    Args:
        num_regions: Number `m` of regions.
        d_model: Width `d` of the region tokens.
        d_out: Width of the feature.
        mode: `"flatten"`, `"mean"` or `"attention"`.

    Shape:
        - tokens: `(..., m, d)`
        - output: `(..., d_out)`

    Raises:
        ValueError: If a size is not positive or the mode is unknown.

    References:
        The paper stacks the regions (3.2) and does not say how they become $x^v_t$ (3.3).

    Examples:
        >>> import torch
        >>> RegionMerge(13, 16, 32)(torch.randn(2, 5, 13, 16)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        num_regions: int,
        d_model: int,
        d_out: int,
        *,
        mode: Literal["flatten", "mean", "attention"] = "flatten",
    ) -> None:
        super().__init__()
        check_range("num_regions", num_regions, 1)
        check_range("d_model", d_model, 1)
        check_range("d_out", d_out, 1)
        check_choice("mode", mode, ("flatten", "mean", "attention"))
        self.num_regions, self.d_model, self.d_out, self.mode = num_regions, d_model, d_out, mode
        self.to_out = nn.Linear(d_model * (num_regions if mode == "flatten" else 1), d_out)
        self.to_score = nn.Linear(d_model, 1, bias=False) if mode == "attention" else None
        if self.to_score is not None:
            nn.init.zeros_(self.to_score.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Merge the regions.

        Args:
            tokens: `(..., m, d)`.

        Returns:
            `(..., d_out)`.

        Raises:
            ValueError: If the shape is wrong.
        """
        check_shapes(tokens=(tokens, "... m d"), sizes={"m": self.num_regions, "d": self.d_model})
        if self.mode == "flatten":
            merged = tokens.flatten(-2)
        elif self.to_score is None:
            merged = tokens.mean(dim=-2)
        else:
            share = self.to_score(tokens).softmax(dim=-2)
            merged = (share * tokens).sum(dim=-2)
        out: Tensor = self.to_out(merged)
        return out

    def extra_repr(self) -> str:
        """Sizes and mode, as `print` shows them."""
        return f"num_regions={self.num_regions}, d_model={self.d_model}, mode={self.mode!r}"
