"""Region tokens of a frame to one visual feature."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes

__all__ = ["RegionMerge"]


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
