"""Which patches of a Vision Transformer lie under the landmarks of each facial region."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_choice, check_mask, check_range, check_shapes

__all__ = ["PatchRegions", "landmark_patches"]

# Coordinates below this many pixels, all of them, are normalised ones; and the other way round.
_UNIT_LIMIT = 2.0


class PatchRegions(NamedTuple):
    """The patches of each region, as weights of a mean over patches."""

    weights: Tensor
    """`(..., m, p)` float32, at least 0, each row sums to 1."""
    valid: Tensor
    """`(..., m)` bool, False where no landmark of the region is usable: that row is 1 / p."""


def _check_sizes(name: str, size: tuple[int, int], what: str) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"`{name}` must be two positive numbers (height, width) {what}; got {size!r}."
        )


def _check_unit(landmarks: Tensor, usable: Tensor, coords: str) -> None:
    """Refuse normalised coordinates where pixels are meant, and pixels where normalised are.

    Reads the values, so it is left out while a graph is being traced.
    """
    if torch.compiler.is_compiling() or not bool(usable.any()):
        return
    points = landmarks[usable]
    if coords == "pixel" and bool((points.abs() < _UNIT_LIMIT).all()):
        raise ValueError(
            "`landmarks` are all below 2, which cannot be pixels; pass coords='normalized' if they "
            "run from 0 to 1, and NaN or visible=False for a face that was not found."
        )
    if coords == "normalized" and bool((points.abs() > _UNIT_LIMIT).all()):
        raise ValueError(
            "`landmarks` are all above 2, which cannot be normalised; pass coords='pixel' if they "
            "are in pixels of the image."
        )


def _scatter_points(cell: Tensor, use: Tensor, num_patches: int) -> Tensor:
    """Mark each region's cells once: `(b, m, j)` cells -> `(b, m, p)` bool."""
    # Points that do not count go to one extra cell, which is cut off: no loop, no branch.
    target = torch.where(use, cell, num_patches)
    marked = torch.zeros(*cell.shape[:2], num_patches + 1, dtype=torch.bool, device=cell.device)
    return marked.scatter_(2, target, True)[..., :num_patches]


def _mark_boxes(column: Tensor, row: Tensor, use: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mark the bounding box of each region's cells: `(b, m, j)` -> `(b, m, p)` bool."""
    height, width = grid_size

    def between(index: Tensor, size: int) -> Tensor:
        low = index.masked_fill(~use, size).amin(-1, keepdim=True)
        high = index.masked_fill(~use, -1).amax(-1, keepdim=True)
        steps = torch.arange(size, device=index.device)
        return (steps >= low) & (steps <= high)

    rows, columns = between(row, height), between(column, width)
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(-2)


def landmark_patches(
    landmarks: Tensor,
    regions: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    *,
    visible: Tensor | None = None,
    mode: Literal["points", "bbox"] = "points",
    coords: Literal["pixel", "normalized"] = "pixel",
    ring: int = 0,
) -> PatchRegions:
    r"""Find the patches under the landmarks of each region, as weights of a mean over patches.

    $$ P_m = \{ \lfloor y_k h / H \rfloor\, w + \lfloor x_k w / W \rfloor : k \in R_m \}, \qquad
    \text{weights}_{m p} = [p \in P_m] / |P_m| $$

    with the grid $h \times w$ and the image $H \times W$. $P_m$ is a set: a patch under five
    landmarks counts once. Landmarks that are not visible, NaN, infinite or outside the image (its
    right and lower border belong to it) do not count. A region without any is given all patches,
    with weight 1 / p, and `valid=False`.

    Args:
        landmarks: `(..., k, 2)` float32 or float64, x right then y down, in pixels of the image or
            normalised; the origin is the top-left corner of the top-left pixel. Lower precision is
            refused: its steps are as coarse as a patch.
        regions: `(m, j)` int64, indices of the landmarks of each region, padded with -1.
        grid_size: Rows and columns `(h, w)` of the patch grid, `p = h * w`, row by row.
        image_size: Height and width `(H, W)` of the image in pixels; not used if normalised.
        visible: `(..., k)` bool, False for landmarks to leave out.
        mode: `"points"`, the patches under the landmarks (the paper); `"bbox"`, all patches of
            their bounding box.
        coords: `"pixel"` (x from 0 to W) or `"normalized"` (x from 0 to 1).
        ring: Number of rings of neighbouring patches to add around each region, at least 0.

    Returns:
        The weights and which regions are valid.

    Raises:
        TypeError: If `landmarks` is not float32 or float64, or `visible` is not bool.
        ValueError: If a shape or size is wrong, `regions` names a landmark that does not exist, or
            the coordinates are obviously in the other unit.

    References:
        Section 3.2 of the paper.

    Examples:
        >>> landmarks = torch.tensor([[10.0, 10.0], [20.0, 10.0], [200.0, 100.0]])
        >>> regions = torch.tensor([[0, 1], [2, -1]])
        >>> landmark_patches(landmarks, regions, (2, 2), (224, 224)).weights
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]])
    """
    check_shapes(landmarks=(landmarks, "... k 2"), regions=(regions, "m j"))
    check_mask("visible", visible)
    if visible is not None and visible.shape != landmarks.shape[:-1]:
        raise ValueError(
            f"`visible` must have shape {tuple(landmarks.shape[:-1])}, one flag per landmark; got "
            f"{tuple(visible.shape)}."
        )
    check_choice("mode", mode, ("points", "bbox"))
    check_choice("coords", coords, ("pixel", "normalized"))
    check_range("ring", ring, 0)
    _check_sizes("grid_size", grid_size, "in patches")
    _check_sizes("image_size", image_size, "in pixels")
    if landmarks.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "`landmarks` must be float32 or float64, since coarser numbers move points to other "
            f"patches; got {landmarks.dtype}."
        )
    (grid_h, grid_w), num_patches = grid_size, grid_size[0] * grid_size[1]
    num_points, num_regions = landmarks.shape[-2], regions.shape[0]
    if not torch.compiler.is_compiling() and bool((regions >= num_points).any()):
        raise ValueError(
            f"`regions` names landmark {int(regions.max())}, but there are {num_points} landmarks."
        )
    leading = landmarks.shape[:-2]
    points = landmarks.reshape(-1, num_points, 2)

    usable = torch.isfinite(points).all(-1)
    if visible is not None:
        usable = usable & visible.reshape(-1, num_points)
    _check_unit(points, usable, coords)
    extent = (1, 1) if coords == "normalized" else (image_size[1], image_size[0])
    inside = (points >= 0) & (points <= points.new_tensor(extent))
    usable = usable & inside.all(-1)
    # Before any cast to integers: NaN and infinity have no integer. Multiplied before it is
    # divided, so that a point on the border of two patches is found there exactly.
    points = torch.where(usable.unsqueeze(-1), points, 0.0)
    cells = points * points.new_tensor((grid_w, grid_h)) / points.new_tensor(extent)
    column = cells[..., 0].floor().long().clamp_(max=grid_w - 1)
    row = cells[..., 1].floor().long().clamp_(max=grid_h - 1)

    member = regions.clamp(min=0)
    use = usable[:, member] & (regions >= 0)
    if mode == "points":
        marked = _scatter_points((row * grid_w + column)[:, member], use, num_patches)
    else:
        marked = _mark_boxes(column[:, member], row[:, member], use, grid_size)
    if ring:
        image = marked.reshape(-1, 1, grid_h, grid_w).to(torch.float32)
        marked = F.max_pool2d(image, 2 * ring + 1, 1, ring).reshape(marked.shape) > 0
    count = marked.sum(-1, keepdim=True)
    valid = count > 0
    weights = torch.where(valid, marked.to(torch.float32) / count.clamp(min=1), 1.0 / num_patches)
    return PatchRegions(
        weights.view(*leading, num_regions, num_patches), valid.view(*leading, num_regions)
    )
