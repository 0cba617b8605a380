"""Ways to mark the patches of a region on the grid: its points, their box, their hull, a blur.

Everything here is for all frames and regions at once. A region's cells are `(b, m, j)` int64, the
index of a patch or -1 for none; marks are `(b, m, p)` float32, 0 or 1, and the caller's to change.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["mark_boxes", "mark_hulls", "mark_points", "spread_gaussian"]

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
    """How far right the filled hull reaches in each row: `(..., h)` int64 columns.

    `furthest` is the rightmost cell of a region in each row, where `present`. The hull's right
    side is the concave envelope of these cells' centres over the rows.
    """
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
    """Mark all cells whose centre is inside the convex hull of each region's cells as squares.

    Equally: all cells into which the convex hull of the centres of the region's cells reaches.
    """
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
        pieces, start = [], 0
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
            pieces.append(2 * (some * sums[..., :1] - sums[..., 1:]))
        return torch.cat(pieces), None, None, None


def _centres(like: Tensor, height: int, width: int) -> Tensor:
    """`(h, w, 2)`: x and y of the patch centres, in patches."""
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    return torch.stack((x.expand(height, -1), y.unsqueeze(-1).expand(-1, width)), dim=-1)


def _blocks(points: Tensor, use: Tensor, num_patches: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the frames so that the distances of one piece stay in the caches."""
    pieces = max(1, use.numel() * num_patches // _BLOCK)
    return list(zip(points.chunk(pieces), use.chunk(pieces), strict=True))


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
    """Weigh every patch by a Gaussian of its distance to the region's nearest point.

    `points` is `(b, m, j, 2)` in patches. Returns `(b, m, p)` whose rows sum to one, in the dtype
    of the points; rows of regions without a point are even.
    """
    squares: Tensor = _nearest_squares(points, use, *grid_size)
    # A softmax cannot underflow, however small `sigma` is.
    squares = torch.where(use.any(-1, keepdim=True), squares, 0.0)
    return torch.softmax(squares / (-2 * sigma**2), dim=-1)
