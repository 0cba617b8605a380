"""From a region of a picture to the square that a face mesh model wants, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmau.media._face_types import FaceRegion
from mmau.media.face_alignment import estimate_similarity

__all__ = ["region_around_mesh", "region_around_points", "region_to_square"]

_RIGHT_EYE_CORNER, _LEFT_EYE_CORNER = 33, 263


def region_to_square(region: FaceRegion, size: int) -> NDArray[np.float64]:
    """Turn and scale a region to a square picture.

    Args:
        region: Where the face is.
        size: Side of the square, in pixels.

    Returns:
        `(2, 3)`, from image pixels to a square whose horizontal is the face's.
    """
    centre = np.array([region.x, region.y])
    right = 0.5 * region.side * np.array([np.cos(region.angle), np.sin(region.angle)])
    return estimate_similarity(
        np.stack([centre - right, centre + right]), np.array([[0, size / 2], [size, size / 2]])
    )


def region_around_mesh(mesh: NDArray[np.float64]) -> FaceRegion:
    """Half as large again as the mesh and turned with the eyes: what the model was trained on.

    Args:
        mesh: `(468, 2)`, vertices in image pixels.

    Returns:
        The region.
    """
    dx, dy = mesh[_LEFT_EYE_CORNER] - mesh[_RIGHT_EYE_CORNER]
    angle = float(np.arctan2(dy, dx))
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = mesh @ axes.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    x, y = axes.T @ ((low + high) / 2)
    return FaceRegion(float(x), float(y), 1.5 * float((high - low).max()), angle)


def region_around_points(points: NDArray[np.floating]) -> FaceRegion:
    """An upright square half as large again as the extent of points.

    Args:
        points: `(k, 2)`, in image pixels.

    Returns:
        The region.

    Examples:
        >>> region_around_points(np.array([[0.0, 0.0], [4.0, 2.0]]))
        FaceRegion(x=2.0, y=1.0, side=6.0, angle=0.0)
    """
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = (low + high) / 2
    return FaceRegion(float(x), float(y), 1.5 * float((high - low).max()))
