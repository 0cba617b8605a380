"""Attention over patches as pictures."""

from __future__ import annotations

from torch import Tensor

from mmau._checks import check_shapes

__all__ = ["attention_on_grid"]


def attention_on_grid(attention: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Lay the attention out on the patch grid, without a copy.

    Args:
        attention: `(..., p)`, one weight for each patch, row by row from the top left.
        grid_size: Rows `h` and columns `w` of the grid, in patches.

    Returns:
        `(..., h, w)`, a view.

    Raises:
        ValueError: If the grid has another number of patches.

    Examples:
        >>> import torch
        >>> attention_on_grid(torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4, 0.0]), (2, 3))
        tensor([[0.1000, 0.2000, 0.3000],
                [0.0000, 0.4000, 0.0000]])
    """
    check_shapes(attention=(attention, "... p"))
    rows, columns = grid_size
    if rows * columns != attention.shape[-1]:
        raise ValueError(
            f"`attention` covers {attention.shape[-1]} patches, but a grid of {rows} rows and "
            f"{columns} columns has {rows * columns}."
        )
    return attention.view(*attention.shape[:-1], rows, columns)
