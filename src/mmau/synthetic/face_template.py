"""A neutral, symmetric face in centimetre-like units, derived at run time from found meshes.

No face model is shipped. The template is the symmetrised mean of the meshes that MediaPipe finds on
the photographs, after a similarity that puts the outer eye corners where the units say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmau._optional import require
from mmau.synthetic.photographs import NUM_VERTICES

OUTER_EYES = (33, 263)
"""Vertices of the outer eye corners: image left, image right."""
EYE_DISTANCE = 8.9
"""Distance of the outer eye corners in template units, about centimetres of an adult face."""
EYE_HEIGHT = 2.66
"""Height of the outer eye corners above the origin, which lies below the nose bridge."""
MOUTH_CORNERS = (61, 291)
_MAX_SKEW = (
    1.0  # template units between a vertex and its mirrored partner; the photographs have 0.3
)

INNER_UPPER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
"""Vertices of the inner contour of the upper lip, corner to corner, image left to right."""
INNER_LOWER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
"""Vertices of the inner contour of the lower lip, in the same order."""

# fmt: off
_UPPER_LIP = (
    0, 11, 12, 13, 37, 38, 39, 40, 41, 42, 72, 73, 74, 80, 81, 82, 183, 184, 185, 191,
    267, 268, 269, 270, 271, 272, 302, 303, 304, 310, 311, 312, 407, 408, 409, 415,
)
_LOWER_LIP = (
    14, 15, 16, 17, 77, 84, 85, 86, 87, 88, 89, 90, 91, 95, 96, 146, 178, 179, 180, 181,
    307, 314, 315, 316, 317, 318, 319, 320, 321, 324, 325, 375, 402, 403, 404, 405,
)
# fmt: on
_CORNERS = (61, 291, 78, 308, 76, 306, 62, 292)


@dataclass(frozen=True)
class Placement:
    """The similarity from template units to the pixels of an image."""

    matrix: np.ndarray
    """`(2, 2)`; includes the flip of y, which is up in the template and down in an image."""
    offset: np.ndarray
    """`(2,)`, pixels."""

    @property
    def unit(self) -> float:
        """Pixels per template unit."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Map template points to pixels."""
        return np.asarray(points @ self.matrix.T + self.offset)

    def to_template(self, pixels: np.ndarray) -> np.ndarray:
        """Map pixels to template points."""
        return np.asarray((pixels - self.offset) @ np.linalg.inv(self.matrix).T)

    @classmethod
    def of(cls, mesh: np.ndarray) -> Placement:
        """Read the similarity off the outer eye corners of a mesh."""
        left, right = (np.asarray(mesh[v], dtype=np.float64) for v in OUTER_EYES)
        x_axis = (right - left) / EYE_DISTANCE
        matrix = np.array([[x_axis[0], x_axis[1]], [x_axis[1], -x_axis[0]]])
        return cls(matrix, (left + right) / 2 - matrix @ np.array([0.0, EYE_HEIGHT]))


@dataclass(frozen=True)
class FaceTemplate:
    """A neutral face with its mouth closed, symmetric about x = 0."""

    vertices: np.ndarray
    """`(468, 2)` float64, x to the image's right, y up, in centimetre-like units."""
    mirror: np.ndarray
    """`(468,)` int64, the vertex on the other side."""
    upper: np.ndarray
    """`(468,)` bool, vertices that move with what is above the mouth line."""
    lower: np.ndarray
    """`(468,)` bool, vertices that move with what is below it; both are true beside the mouth."""
    closing: tuple[np.ndarray, ...]
    """Per mesh `(468, 2)` in units: what closes its mouth. Zeros where it was closed."""

    @property
    def mouth_half_width(self) -> float:
        """Distance of a mouth corner from the middle, in units."""
        return float(self.vertices[MOUTH_CORNERS[1], 0])

    def mouth_line(self, x: np.ndarray) -> np.ndarray:
        """Height of the closed mouth at a position."""
        contour = self.vertices[list(INNER_UPPER_LIP)] + self.vertices[list(INNER_LOWER_LIP)]
        return np.asarray(np.interp(x, contour[:, 0] / 2, contour[:, 1] / 2))


def _find_mirror(vertices: np.ndarray) -> np.ndarray:
    """Pair vertices with those near their mirror images, each exactly once."""
    optimize = require("scipy.optimize", purpose="rendering clips", extra="recipes")
    distance = ((vertices[:, None] - (vertices * (-1, 1))[None]) ** 2).sum(-1)
    mirror: np.ndarray = optimize.linear_sum_assignment(distance)[1]
    everyone = np.arange(len(mirror))
    if (mirror[mirror] != everyone).any() or distance[everyone, mirror].max() > _MAX_SKEW**2:
        raise RuntimeError("the found meshes are too skewed to pair their left and right vertices.")
    return mirror


def build_template(meshes: Sequence[np.ndarray], *, mouth_closed: Sequence[bool]) -> FaceTemplate:
    """Average meshes into a neutral symmetric face.

    Where the mouth of some mesh is open, the mouth region of the template comes from the closed
    ones alone, and `closing` tells how to warp the open ones to that shape.
    """
    for mesh in meshes:
        if mesh.shape != (NUM_VERTICES, 2):
            raise ValueError(f"`meshes` must each have shape (468, 2); got {mesh.shape}.")
    if len(mouth_closed) != len(meshes):
        raise ValueError(
            f"`mouth_closed` must have one entry per mesh, {len(meshes)}; got {len(mouth_closed)}."
        )
    if not any(mouth_closed):
        raise ValueError("`mouth_closed` must be true for at least one mesh; got none.")
    aligned = [Placement.of(mesh).to_template(mesh.astype(np.float64)) for mesh in meshes]
    mean = np.mean(aligned, axis=0)
    mirror = _find_mirror(mean)

    def symmetric(points: np.ndarray) -> np.ndarray:
        mirrored: np.ndarray = (points + (points * (-1, 1))[mirror]) / 2
        return mirrored

    mean = symmetric(mean)
    closed = symmetric(
        np.mean([a for a, shut in zip(aligned, mouth_closed, strict=True) if shut], axis=0)
    )
    region = _mouth_region(mean)[:, None]
    vertices = mean + region * (closed - mean)
    # What remains between the lips would show as a line: bring both contours to their middle.
    upper, lower = list(INNER_UPPER_LIP), list(INNER_LOWER_LIP)
    middle = (vertices[upper] + vertices[lower]) / 2
    vertices[upper] = vertices[lower] = middle
    closing = tuple(
        np.zeros_like(mean) if shut else region * (vertices - points)
        for points, shut in zip(aligned, mouth_closed, strict=True)
    )
    is_upper, is_lower = _split_at_mouth(vertices)
    return FaceTemplate(vertices, mirror, is_upper, is_lower, closing)


def _mouth_region(vertices: np.ndarray) -> np.ndarray:
    """1 on and around the lips, falling to 0 at the nose, the chin and the cheeks."""
    centre = vertices[[13, 14]].mean(0)
    half_width = vertices[MOUTH_CORNERS[1], 0]
    x, y = ((vertices - centre) / (1.55 * half_width, 0.95 * half_width)).T
    away = np.hypot(x, y)
    region: np.ndarray = np.clip((1.45 - away) / 0.75, 0, 1)
    return np.asarray(region * region * (3 - 2 * region))


def _split_at_mouth(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell what is above the mouth line from what is below; beside the mouth both are true."""
    x, y = vertices.T
    height = vertices[list(_CORNERS), 1].mean()
    beside = np.abs(x) > 1.02 * vertices[MOUTH_CORNERS[1], 0]
    upper, lower = (y > height) | beside, (y < height) | beside
    for members, mine, other in ((_UPPER_LIP, upper, lower), (_LOWER_LIP, lower, upper)):
        mine[list(members)], other[list(members)] = True, False
    for vertex in _CORNERS:
        upper[vertex] = lower[vertex] = True
    return upper, lower
