"""Landmarks to patches as one would write it on paper: the oracle of the tests, our rival here.

One frame, one region, one landmark after the other, in sets of `(row, column)`. Nothing of mmau is
used, so that a mistake there cannot be made here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Point = Sequence[float]
Cell = tuple[int, int]
Size = tuple[int, int]


def _usable(point: Point, image_size: Size) -> bool:
    x, y = point
    return (
        math.isfinite(x)
        and math.isfinite(y)
        and 0 <= x <= image_size[1]
        and 0 <= y <= image_size[0]
    )


def _cells(points: Iterable[Point], grid_size: Size, image_size: Size) -> set[Cell]:
    (h, w), (height, width) = grid_size, image_size
    return {(min(int(y * h / height), h - 1), min(int(x * w / width), w - 1)) for x, y in points}


def _box(cells: set[Cell]) -> set[Cell]:
    rows, columns = [row for row, _ in cells], [column for _, column in cells]
    return {
        (row, column)
        for row in range(min(rows), max(rows) + 1)
        for column in range(min(columns), max(columns) + 1)
    }


def _turn(a: Cell, b: Cell, c: Cell) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _half_hull(corners: Iterable[Cell]) -> list[Cell]:
    chain: list[Cell] = []
    for corner in corners:
        while len(chain) > 1 and _turn(chain[-2], chain[-1], corner) <= 0:
            chain.pop()
        chain.append(corner)
    return chain[:-1]


def _hull(cells: set[Cell]) -> set[Cell]:
    """Cells whose centre is inside the convex hull of the squares, by Andrew's monotone chain."""
    # In half cells: a cell is the square from 2 row to 2 row + 2, and its centre is 2 row + 1.
    corners = sorted(
        {(2 * row + i, 2 * column + j) for row, column in cells for i in (0, 2) for j in (0, 2)}
    )
    outline = _half_hull(corners) + _half_hull(reversed(corners))
    edges = list(zip(outline, [*outline[1:], outline[0]], strict=True))
    return {
        (row, column)
        for row, column in _box(cells)
        if all(_turn(a, b, (2 * row + 1, 2 * column + 1)) > 0 for a, b in edges)
    }


def _ring(cells: set[Cell], ring: int, grid_size: Size) -> set[Cell]:
    return {
        (row + i, column + j)
        for row, column in cells
        for i in range(-ring, ring + 1)
        for j in range(-ring, ring + 1)
        if 0 <= row + i < grid_size[0] and 0 <= column + j < grid_size[1]
    }


def _blur(points: list[Point], grid_size: Size, image_size: Size, sigma: float) -> list[float]:
    (h, w), (height, width) = grid_size, image_size
    weights = []
    for row in range(h):
        for column in range(w):
            nearest = min(
                (column + 0.5 - x * w / width) ** 2 + (row + 0.5 - y * h / height) ** 2
                for x, y in points
            )
            weights.append(math.exp(-nearest / (2 * sigma**2)))
    total = sum(weights)
    return [weight / total for weight in weights]


def region_weights(
    landmarks: Sequence[Point],
    regions: Iterable[Sequence[int]],
    grid_size: Size,
    image_size: Size,
    *,
    visible: Sequence[bool] | None = None,
    mode: str = "points",
    ring: int = 0,
    sigma: float = 0.5,
) -> tuple[list[list[float]], list[bool]]:
    """Return the weights of each region over the patches of one frame, and which are valid."""
    rows, valid = [], []
    for indices in regions:
        points = [
            landmarks[index]
            for index in indices
            if index >= 0
            and (visible is None or visible[index])
            and _usable(landmarks[index], image_size)
        ]
        num_patches = grid_size[0] * grid_size[1]
        valid.append(bool(points))
        if not points:
            rows.append([1 / num_patches] * num_patches)
            continue
        if mode == "gaussian":
            rows.append(_blur(points, grid_size, image_size, sigma))
            continue
        cells = _cells(points, grid_size, image_size)
        if mode == "bbox":
            cells = _box(cells)
        elif mode == "hull":
            cells = _hull(cells)
        if ring:
            cells = _ring(cells, ring, grid_size)
        weights = [0.0] * num_patches
        for row, column in cells:
            weights[row * grid_size[1] + column] = 1 / len(cells)
        rows.append(weights)
    return rows, valid
