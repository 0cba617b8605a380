"""Which patches of a Vision Transformer lie under the landmarks of each facial region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmau._checks import check_choice, check_mask, check_range, check_shapes

PATCH_MODES: tuple[str, ...] = ("points", "bbox", "hull", "gaussian")
"""What `mode` accepts."""


class PatchRegions(NamedTuple):
    """The patches of each region, as weights of a mean over patches."""

    weights: Tensor
    """`(..., m, p)` float32, at least 0, each row sums to 1; float64 only from float64 landmarks in
    mode `"gaussian"`."""
    valid: Tensor
    """`(..., m)` bool, False where no landmark of the region is usable: that row is 1 / p."""


def landmark_patches(
    landmarks: Tensor,
    regions: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    *,
    visible: Tensor | None = None,
    mode: Literal["points", "bbox", "hull", "gaussian"] = "points",
    coords: Literal["pixel", "normalized"] = "pixel",
    ring: int = 0,
    sigma: float = 0.5,
) -> PatchRegions:
    r"""Find the patches under the landmarks of each region, as weights of a mean over patches.

    $$ P_m = \{ \lfloor y_k h / H \rfloor\, w + \lfloor x_k w / W \rfloor : k \in R_m \}, \qquad
    \text{weights}_{m p} = [p \in P_m] / |P_m| $$

    with the grid $h \times w$ and the image $H \times W$. $P_m$ is a set: a patch under five
    landmarks counts once. `"bbox"` adds all patches of the bounding box of $P_m$, `"hull"` those
    whose centre is inside the convex hull of the patches of $P_m$. `"gaussian"` weighs every patch,

    $$ \text{weights}_{m p} \propto
    \exp \Big( -\min_{k \in R_m} \|c_p - x_k\|^2 / 2 \sigma^2 \Big) $$

    with the centre $c_p$ of the patch and distances in patches, and has a gradient with respect to
    the landmarks.

    Landmarks that are not visible, NaN, infinite or outside the image (its right and lower border
    belong to it) do not count. A region without any is given all patches, with weight 1 / p, and
    `valid=False`.

    Args:
        landmarks: `(..., k, 2)` float32 or float64, x right then y down, in pixels of the image or
            normalised; the origin is the top-left corner of the top-left pixel. Lower precision is
            refused: its steps are as coarse as a patch.
        regions: `(m, j)` int64, indices of the landmarks of each region, padded with -1.
        grid_size: Rows and columns `(h, w)` of the patch grid, `p = h * w`, row by row.
        image_size: Height and width `(H, W)` of the image in pixels; not used if normalised.
        visible: `(..., k)` bool, False for landmarks to leave out.
        mode: `"points"`, the patches under the landmarks (the paper); `"bbox"`, all patches of
            their bounding box; `"hull"`, all patches of their filled convex hull; `"gaussian"`, a
            blur around the landmarks.
        coords: `"pixel"` (x from 0 to W) or `"normalized"` (x from 0 to 1).
        ring: Number of rings of neighbouring patches to add around each region, at least 0. A blur
            has no border to add them to: `"gaussian"` is widened by `sigma`.
        sigma: Standard deviation of `"gaussian"` in patches, positive; without meaning elsewhere.

    Returns:
        The weights and which regions are valid.

    Raises:
        TypeError: If `landmarks` is not float32 or float64, `regions` does not hold integers, or
            `visible` is not bool.
        ValueError: If a shape, size or option is wrong, `regions` names a landmark that does not
            exist, or the coordinates are obviously in the other unit.

    References:
        Section 3.2 of the paper for `"points"`. The hull is that of whole patches, so that it is
        found in whole numbers and no rounding moves its border.

    Examples:
        >>> landmarks = torch.tensor([[10.0, 10.0], [20.0, 10.0], [200.0, 100.0]])
        >>> regions = torch.tensor([[0, 1], [2, -1]])
        >>> landmark_patches(landmarks, regions, (2, 2), (224, 224)).weights
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]])
        >>> triangle = torch.tensor([[30.0, 5.0], [5.0, 55.0], [55.0, 55.0]])
        >>> region = torch.tensor([[0, 1, 2]])
        >>> hull = landmark_patches(triangle, region, (3, 3), (60, 60), mode="hull")
        >>> (hull.weights > 0).int().view(3, 3)
        tensor([[0, 1, 0],
                [1, 1, 1],
                [1, 1, 1]], dtype=torch.int32)
    """
    check_shapes(landmarks=(landmarks, "... k 2"), regions=(regions, "m j"))
    check_visible(landmarks, visible)
    check_patch_options(mode, coords, ring, sigma)
    _check_sizes("grid_size", grid_size, "in patches")
    _check_sizes("image_size", image_size, "in pixels")
    if landmarks.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "`landmarks` must be float32 or float64, since coarser numbers move points to other "
            f"patches; got {landmarks.dtype}."
        )
    _check_regions(regions, landmarks.shape[-2])
    (grid_h, grid_w), num_points = grid_size, landmarks.shape[-2]
    leading = landmarks.shape[:-2]
    points = landmarks.reshape(-1, num_points, 2)

    extent = (1, 1) if coords == "normalized" else (image_size[1], image_size[0])
    x, y = points.unbind(-1)
    # NaN and infinity are on neither side of anything, so this excludes them too.
    usable = (x >= 0) & (x <= extent[0]) & (y >= 0) & (y <= extent[1])
    if visible is not None:
        visible = visible.reshape(-1, num_points)
        usable = usable & visible
    inside = torch.where(usable.unsqueeze(-1), points, 0.0)
    _check_unit(points, inside, visible, coords)
    # Multiplied before it is divided, so that a point on the border of two patches is found there
    # exactly.
    cells = inside * inside.new_tensor((grid_w, grid_h)) / inside.new_tensor(extent)

    if mode == "gaussian":
        member = regions.clamp(min=0)
        use = usable[:, member] & (regions >= 0)
        valid = use.any(-1)
        weights = spread_gaussian(cells[:, member], use, grid_size, sigma)
    else:
        column, row = cells.detach().long().unbind(-1)
        index = row.clamp(max=grid_h - 1) * grid_w + column.clamp(max=grid_w - 1)
        # One more landmark, which is nowhere, for the places that the table leaves empty.
        index = F.pad(torch.where(usable, index, -1), (0, 1), value=-1)
        places = torch.where(regions < 0, num_points, regions)
        index = index.index_select(1, places.flatten()).view(-1, *regions.shape)
        valid = index.amax(-1) >= 0
        mark = {"points": mark_points, "bbox": mark_boxes, "hull": mark_hulls}[mode]
        marks = mark(index, grid_size)
        if ring:
            image = marks.reshape(-1, 1, grid_h, grid_w)
            marks = F.max_pool2d(image, 2 * ring + 1, 1, ring).reshape(marks.shape)
        # In place: for long clips, most of the time goes into getting memory.
        weights = marks.mul_(1 / marks.sum(-1, keepdim=True).clamp(min=1))
        weights = weights.add_((~valid).unsqueeze(-1) / float(grid_h * grid_w))
    return PatchRegions(
        weights.view(*leading, *weights.shape[1:]), valid.view(*leading, regions.shape[0])
    )


# ----------------------------------------------------------------------------------------- checks

# Coordinates below this many pixels, all of them, are normalised ones; and the other way round.
_UNIT_LIMIT = 2.0


def check_patch_options(mode: str, coords: str, ring: int, sigma: float) -> None:
    """Check the options of `landmark_patches` that do not depend on the input."""
    check_choice("mode", mode, PATCH_MODES)
    check_choice("coords", coords, ("pixel", "normalized"))
    check_range("ring", ring, 0)
    check_range("sigma", sigma, 0, open_low=True)
    if ring and mode == "gaussian":
        raise ValueError(
            f"`ring` adds patches to a set, which mode='gaussian' has not; got {ring}. Widen the "
            "blur by `sigma`."
        )


def check_visible(landmarks: Tensor, visible: Tensor | None) -> None:
    """Check that there is one flag per landmark."""
    check_mask("visible", visible)
    if visible is not None and visible.shape != landmarks.shape[:-1]:
        raise ValueError(
            f"`visible` must have shape {tuple(landmarks.shape[:-1])}, one flag per landmark; got "
            f"{tuple(visible.shape)}."
        )


def _check_sizes(name: str, size: tuple[int, int], what: str) -> None:
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(number, (int, torch.SymInt)) for number in size)
        or min(size) < 1
    ):
        raise ValueError(
            f"`{name}` must be two positive whole numbers (height, width) {what}; got {size!r}."
        )


def _check_regions(regions: Tensor, num_points: int) -> None:
    """Refuse a table that is no table of indices. The values are read only where none is traced."""
    if regions.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"`regions` must hold int32 or int64 indices of landmarks; got {regions.dtype}."
        )
    if 0 in regions.shape:
        raise ValueError(
            f"`regions` must have at least one region of one landmark; got {tuple(regions.shape)}."
        )
    if torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in regions.aminmax())
    if high >= num_points:
        raise ValueError(f"`regions` names landmark {high}, but there are {num_points} landmarks.")
    if low < -1:
        raise ValueError(f"`regions` must be padded with -1; got {low}.")


def _check_unit(landmarks: Tensor, inside: Tensor, visible: Tensor | None, coords: str) -> None:
    """Refuse coordinates in the other unit; `inside` has zeros for landmarks outside the image."""
    if torch.compiler.is_compiling() or inside.numel() == 0:
        return
    # One landmark well inside the image settles it; so it does in nearly every batch.
    if float(inside.detach().amax()) >= (_UNIT_LIMIT if coords == "pixel" else 1e-6):
        return
    size = landmarks.detach().abs()
    usable = torch.isfinite(size).all(-1)
    if visible is not None:
        usable = usable & visible
    if coords == "pixel":
        largest = float(torch.where(usable, size.amax(-1), -torch.inf).amax())
        if -torch.inf < largest < _UNIT_LIMIT:
            raise ValueError(
                f"`landmarks` are all below 2, which cannot be pixels; the largest is {largest:g}. "
                "Pass coords='normalized' if they run from 0 to 1, and NaN or visible=False for a "
                "face that was not found."
            )
    else:
        smallest = float(torch.where(usable, size.amin(-1), torch.inf).amin())
        if torch.inf > smallest > _UNIT_LIMIT:
            raise ValueError(
                "`landmarks` are all above 2, which cannot be normalised; the smallest is "
                f"{smallest:g}. Pass coords='pixel' if they are in pixels of the image."
            )


# --------------------------------------------------------------------------- marking and weighing

_BLOCK = 2**20
"""Distances at once: with more of them, they leave the caches."""
_NOWHERE = -(2**31)
"""Left of every column."""


def mark_points(index: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mark each region's cells once."""
    # Points that do not count join one that does; where there is none, the mark is 0.
    some = index.amax(-1, keepdim=True)
    target = torch.where(index >= 0, index, some.clamp(min=0))
    marks = torch.zeros(*index.shape[:2], grid_size[0] * grid_size[1], device=index.device)
    return marks.scatter_(2, target, (some >= 0).to(torch.float32).expand(index.shape))


def mark_boxes(index: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mark all cells of the bounding box of each region's cells."""
    column, row, use = _places(index, grid_size[1])

    def between(places: Tensor, size: int) -> Tensor:
        low = places.masked_fill(~use, size).amin(-1, keepdim=True)
        high = places.masked_fill(~use, -1).amax(-1, keepdim=True)
        steps = torch.arange(size, device=index.device)
        return ((steps >= low) & (steps <= high)).to(torch.float32)

    rows, columns = between(row, grid_size[0]), between(column, grid_size[1])
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def _places(index: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column and row of each cell, and whether it counts."""
    return index % width, torch.div(index, width, rounding_mode="trunc"), index >= 0


def _reach(furthest: Tensor, present: Tensor) -> Tensor:
    """Column `(..., h)` to which the filled hull reaches in each row, from the rightmost cells."""
    # The right side of the hull is the concave envelope of the centres of these cells.
    height = furthest.shape[-1]
    rows = torch.arange(height, device=furthest.device)
    # A row is a corner of the envelope if the steepest way on is no steeper than every way here.
    # Two different slopes differ by more than the precision of float64, two equal ones round alike.
    level = torch.where(present, furthest, _NOWHERE).to(torch.float64)
    on = torch.full_like(level, -torch.inf)
    here = torch.full_like(level, torch.inf)
    for distance in range(1, height):
        slope = (level[..., distance:] - level[..., :-distance]) / distance
        on[..., :-distance] = torch.maximum(on[..., :-distance], slope)
        here[..., distance:] = torch.minimum(here[..., distance:], slope)
    corner = present & (on <= here)
    before = torch.where(corner, rows, -1).cummax(-1).values
    after = torch.where(corner, rows, height).flip(-1).cummin(-1).values.flip(-1)

    # The lower edge of row r is half-way to row r + 1, on the line between two corners around it.
    first, second = before[..., :-1], after[..., 1:]
    edge = (first >= 0) & (second < height)
    first, second = first.clamp(min=0), second.clamp(max=height - 1)
    start = furthest.gather(-1, first)
    rise, run = furthest.gather(-1, second) - start, (second - first).clamp(min=1)
    # In whole numbers: the last cell whose inside is left of that point of the line.
    past = rise * (2 * (rows[:-1] - first) + 1) + run
    column = start - 1 - torch.div(-past, 2 * run, rounding_mode="floor")
    column = torch.where(edge, column, _NOWHERE)
    reach = torch.where(present, furthest, _NOWHERE)
    reach[..., :-1] = torch.maximum(reach[..., :-1], column)
    reach[..., 1:] = torch.maximum(reach[..., 1:], column)
    return reach


def mark_hulls(index: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mark all cells whose centre is inside the convex hull of each region's cells as squares."""
    height, width = grid_size
    column, row, use = _places(index, width)
    # Right and left side at once: the left one is the right one of the mirrored grid.
    sides = torch.stack((column, -column), dim=2)
    target = torch.where(use, row, height).unsqueeze(2).expand_as(sides)
    furthest = sides.new_full((*use.shape[:2], 2, height + 1), -width)
    furthest = furthest.scatter_reduce_(3, target, sides, "amax")[..., :height]
    reach = _reach(furthest, furthest > -width)
    steps = torch.arange(width, device=column.device)
    inside = (steps <= reach[:, :, 0, :, None]) & (steps >= -reach[:, :, 1, :, None])
    return inside.flatten(-2).to(torch.float32)


class _NearestSquares(torch.autograd.Function):
    """Squared distance from each patch centre to the nearest of a region's points, in patches.

    Autograd would keep the distance of every patch to every point, which for a batch of the paper
    is 700 MB; here only the smallest is kept, and the others are computed again.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, use: Tensor, height: int, width: int) -> Tensor:
        ctx.grid_size = height, width
        nearest = [
            _squares(some, chosen, ctx.grid_size).amin(2)
            for some, chosen in _blocks(points, use, height * width)
        ]
        out = torch.cat(nearest).flatten(-2)
        ctx.save_for_backward(points, use, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        points, use, out = ctx.saved_tensors
        height, width = ctx.grid_size
        centres = _centres(points, height, width).view(-1, 2)
        # For a point c: the sum of 2 (c - centre) over the patches that it is nearest to.
        moments = torch.cat((torch.ones_like(centres[:, :1]), centres), dim=-1)
        gradients, start = [], 0
        for some, chosen in _blocks(points, use, height * width):
            frames = slice(start, start + len(some))
            start += len(some)
            squares = _squares(some, chosen, (height, width)).flatten(-2)
            owned = (squares == out[frames].unsqueeze(2)) & chosen.unsqueeze(-1)
            # Points that coincide share.
            share = d_out[frames] / owned.sum(2, dtype=d_out.dtype).clamp(min=1)
            share = share.unsqueeze(2) * owned
            with torch.autocast(points.device.type, enabled=False):
                sums = share @ moments
            gradients.append(2 * (some * sums[..., :1] - sums[..., 1:]))
        return torch.cat(gradients), None, None, None


def _centres(like: Tensor, height: int, width: int) -> Tensor:
    """`(h, w, 2)`: x and y of the patch centres, in patches."""
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    return torch.stack((x.expand(height, -1), y.unsqueeze(-1).expand(-1, width)), dim=-1)


def _blocks(points: Tensor, use: Tensor, num_patches: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the frames so that the distances of one chunk stay in the caches."""
    chunks = max(1, use.numel() * num_patches // _BLOCK)
    return list(zip(points.chunk(chunks), use.chunk(chunks), strict=True))


def _squares(points: Tensor, use: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """`(b, m, j, h, w)`: squared distances; infinite to points that do not count."""
    centres = _centres(points, *grid_size)
    across = (points[..., :1] - centres[0, :, 0]).square()
    down = (points[..., 1:] - centres[:, 0, 1]).square()
    across = across.masked_fill(~use.unsqueeze(-1), torch.inf)
    return down.unsqueeze(-1) + across.unsqueeze(-2)


# `Function.apply` is untyped in torch.
_nearest_squares = cast("Any", _NearestSquares.apply)


def spread_gaussian(
    points: Tensor, use: Tensor, grid_size: tuple[int, int], sigma: float
) -> Tensor:
    """Weigh every patch by a Gaussian of its distance to the nearest of `(b, m, j, 2)` points."""
    squares: Tensor = _nearest_squares(points, use, *grid_size)
    # A softmax cannot underflow, however small `sigma` is.
    squares = torch.where(use.any(-1, keepdim=True), squares, 0.0)
    return torch.softmax(squares / (-2 * sigma**2), dim=-1)
