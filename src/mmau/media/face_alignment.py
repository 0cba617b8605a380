"""Faces turned upright and to one size, by points that no expression moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau._optional import require

STABLE_POINTS: tuple[int, ...] = (36, 39, 42, 45, 27, 28, 29, 30)
"""Indices into iBUG-68: the four corners of the eyes and the bridge of the nose. Mouth corners and
brows move with Action Units, which would leak into scale and rotation."""

# Mean of the two public-domain portraits of `mmau.synthetic`, made symmetric; the outer corners of
# the eyes are one unit apart and their middle is the origin. In these units the brows are at -0.2
# (-0.3 raised), the chin at 1.22 (about 1.45 with the jaw dropped), the ears at -0.76 and 0.76.
_STABLE_SHAPE = np.array(
    [
        [-0.5, 0.0],
        [-0.1916, 0.0224],
        [0.1916, 0.0224],
        [0.5, 0.0],
        [0.0, 0.0148],
        [0.0, 0.1741],
        [0.0, 0.2937],
        [0.0, 0.425],
    ]
)

STABLE_TEMPLATE: NDArray[np.float64] = np.array([0.5, 0.225]) + 0.5 * _STABLE_SHAPE
"""`(8, 2)`, where `STABLE_POINTS` go, in fractions of the crop: eyes at 0.225 of the height and
half a crop apart, which keeps raised brows and a dropped jaw inside."""

# Shrinking by more than this without averaging first shows jagged lines.
_LARGEST_PLAIN_SHRINK = 1.25


def estimate_similarity(
    source: NDArray[np.floating], target: NDArray[np.floating]
) -> NDArray[np.float64]:
    r"""Find the rotation, scale and shift that take points to other points best.

    $$ \min_{s, R, t} \sum_k \lVert s R\, p_k + t - q_k \rVert^2 $$

    in closed form, for point sets `(..., k, 2)` at once; a set with a NaN gives a NaN matrix. In
    two dimensions $sR$ has the two numbers $(\alpha, \beta)$ of a complex factor: the solution is
    one complex division; reflections cannot come out (Umeyama, 1991, restricted to rotations).

    Examples:
        >>> square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> estimate_similarity(square, 2 * square + 3)
        array([[ 2., 0., 3.],
               [ 0., 2., 3.]])
    """
    p, q = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if p.ndim < 2 or p.shape[-1] != 2 or q.shape[-2:] != p.shape[-2:] or p.shape[-2] < 2:
        raise ValueError(
            "`source` and `target` must have shape (..., k, 2) with one k of at least 2; "
            f"got {p.shape} and {q.shape}."
        )
    p_mean, q_mean = p.mean(axis=-2), q.mean(axis=-2)
    dp, dq = p - p_mean[..., None, :], q - q_mean[..., None, :]
    spread = (dp**2).sum(axis=(-2, -1))
    if (spread == 0).any():
        raise ValueError("all points of a set in `source` coincide, so it has no size to fit.")
    alpha = (dp * dq).sum(axis=(-2, -1)) / spread
    beta = (dp[..., 0] * dq[..., 1] - dp[..., 1] * dq[..., 0]).sum(axis=-1) / spread
    matrix = np.stack(
        [np.stack([alpha, -beta], axis=-1), np.stack([beta, alpha], axis=-1)], axis=-2
    )
    shift = q_mean - (matrix @ p_mean[..., None])[..., 0]
    return np.concatenate([matrix, shift[..., None]], axis=-1)


def transform_points(
    points: NDArray[np.floating], matrix: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Apply affine matrices `(..., 2, 3)` to points `(..., k, 2)`."""
    points = np.asarray(points, dtype=np.float64)
    return points @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]


def crop_similarity(
    image: NDArray[np.uint8],
    matrix: NDArray[np.floating],
    size: int,
    *,
    outside: int | None = None,
) -> NDArray[np.uint8]:
    """Cut a square out of an image through a similarity, averaging where it shrinks.

    Coordinates have their origin at the top-left corner of the top-left pixel, whose centre is at
    (0.5, 0.5), in the image and in the crop.
    """
    cv2 = require("cv2", purpose="aligning faces", extra="landmarks")
    to_crop = np.asarray(matrix, dtype=np.float64)
    scale = float(np.hypot(to_crop[0, 0], to_crop[1, 0]))
    if scale * _LARGEST_PLAIN_SHRINK < 1:
        image, to_crop = _shrink(cv2, image, to_crop, size, scale)
    # cv2 counts from the centre of the first pixel: x_cv = x - 0.5, on both sides.
    centred = to_crop.copy()
    centred[:, 2] += 0.5 * to_crop[:, :2].sum(axis=1) - 0.5
    crop: NDArray[np.uint8] = cv2.warpAffine(
        image,
        centred,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT,
        borderValue=(outside or 0,) * 3,
    )
    return crop


def _shrink(
    cv2: Any, image: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, scale: float
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The part of the image that the crop shows, area-averaged to the crop's scale."""
    inverse = np.linalg.inv(matrix[:, :2])
    corners = (np.array([[0, 0], [size, 0], [0, size], [size, size]]) - matrix[:, 2]) @ inverse.T
    height, width = image.shape[:2]
    margin = 2 / scale
    low = np.clip(np.floor(corners.min(axis=0) - margin), 0, [width - 1, height - 1]).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0) + margin), low + 1, [width, height]).astype(int)
    part = image[low[1] : high[1], low[0] : high[0]]
    new = np.maximum(1, np.round(scale * (high - low)).astype(int))
    small = cv2.resize(part, (int(new[0]), int(new[1])), interpolation=cv2.INTER_AREA)
    # Rounding the new size makes the two axes differ by a fraction of a pixel: undo it exactly.
    back = np.diag((high - low) / new)
    return small, np.column_stack([matrix[:, :2] @ back, matrix[:, :2] @ low + matrix[:, 2]])


def align_faces(
    images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    landmarks: NDArray[np.floating],
    size: int = 224,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Turn faces upright, to one size, at one place of a square crop.

    Each frame has its own least-squares similarity from the eye corners and the nose bridge to a
    template that keeps brows and chin inside, also with raised brows and dropped jaw.

    Args:
        images: `t` images `(h, w, 3)`, RGB, of any sizes.
        landmarks: `(t, 68, 2)`, iBUG-68 in image pixels; rows with NaN are frames without a face.
        size: Side of the crops, in pixels.

    Returns:
        Crops `(t, size, size, 3)`, zeros where there is no face, and the landmarks
        `(t, 68, 2)` in crop pixels, NaN there.

    Raises:
        ValueError: If the shapes do not fit or the stable points of a face coincide.

    References:
        Section 4.1 of the paper crops to 224 by RetinaFace's five points, two of which are mouth
        corners; ours do not move with the mouth.

    Examples:
        >>> landmarks = np.full((1, 68, 2), np.nan)
        >>> crops, moved = align_faces(np.zeros((1, 40, 40, 3), np.uint8), landmarks, 32)
        >>> crops.shape, bool(np.isnan(moved).all())
        ((1, 32, 32, 3), True)
    """
    check_range("size", size, 8)
    points = np.asarray(landmarks)
    if points.ndim != 3 or points.shape[1:] != (68, 2) or len(points) != len(images):
        raise ValueError(
            f"`landmarks` must have shape (t, 68, 2) with t = {len(images)} images; "
            f"got {points.shape}."
        )
    crops = np.zeros((len(points), size, size, 3), dtype=np.uint8)
    moved = np.full(points.shape, np.nan, dtype=np.float32)
    found = [int(i) for i in np.flatnonzero(np.isfinite(points).all(axis=(1, 2)))]
    if found:
        matrices = estimate_similarity(points[found][:, STABLE_POINTS], size * STABLE_TEMPLATE)
        moved[found] = transform_points(points[found], matrices)
        for frame, matrix in zip(found, matrices, strict=True):
            crops[frame] = crop_similarity(images[frame], matrix, size)
    return crops, moved
