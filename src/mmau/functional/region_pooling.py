"""The mean patch token of each region and of the whole image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmau._checks import check_shapes

__all__ = ["PooledRegions", "check_region_weights", "region_pooling"]


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
    """Refuse weights that are not of these patches.

    Args:
        patch_tokens: `(..., p, d)`.
        weights: `(..., m, p)`.

    Raises:
        ValueError: If the leading axes or the number of patches differ.
    """
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
