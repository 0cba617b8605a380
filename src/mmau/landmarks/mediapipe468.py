"""The 468 vertices of MediaPipe's face mesh, and their reduction to the 68 points of iBUG.

Where the tables come from: the mirror permutation is the one that maps the mesh's own edge list
onto itself, but for 6 of its 1322 edges (28 vertices lie on the midline; the other vertices below
248 and those from 248 on form pairs in ascending order). The reduction was chosen vertex by vertex
on drawn meshes and is symmetric by construction: each of the 68 points is the mean of one or two
vertices.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmau.landmarks.facial_regions import REGION_MIRROR, REGION_NAMES
from mmau.landmarks.ibug68 import IBUG68
from mmau.landmarks.scheme import LandmarkScheme

Points = TypeVar("Points", Tensor, NDArray[np.floating])

_MIDLINE = (
    *(0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    *(94, 151, 152, 164, 168, 175, 195, 197, 199, 200),
)
_PAIRS = dict(zip((v for v in range(248) if v not in _MIDLINE), range(248, 468), strict=True))
_MIRROR_OF = {
    **{v: v for v in _MIDLINE},
    **_PAIRS,
    **{left: right for right, left in _PAIRS.items()},
}
_MIRROR = tuple(_MIRROR_OF[vertex] for vertex in range(468))

# Only the right side of the face (left in the image) and the midline are written down.
# fmt: off
_IBUG68_RIGHT: dict[int, tuple[int, ...]] = {
    0: (127,), 1: (234,), 2: (93,), 3: (132, 58), 4: (58, 172), 5: (136,),
    6: (150, 149), 7: (176, 148),
    17: (70, 46), 18: (63, 53), 19: (105, 52), 20: (66, 65), 21: (107, 55),
    31: (98,), 32: (97,),
    36: (33,), 37: (160,), 38: (158,), 39: (133,), 40: (153,), 41: (144,),
    48: (61,), 49: (40, 39), 50: (37,), 59: (91, 181), 58: (84,),
    60: (78,), 61: (82,), 67: (87,),
}
_IBUG68_MIDDLE: dict[int, tuple[int, ...]] = {
    8: (152,), 27: (168, 6), 28: (197, 195), 29: (5,), 30: (4, 1), 33: (2,),
    51: (0,), 57: (17,), 62: (13,), 66: (14,),
}
# fmt: on


def _ibug68_vertices() -> tuple[tuple[int, ...], ...]:
    assert IBUG68.mirror is not None
    table = {**_IBUG68_RIGHT, **_IBUG68_MIDDLE}
    for point, vertices in _IBUG68_RIGHT.items():
        table[IBUG68.mirror[point]] = tuple(_MIRROR[vertex] for vertex in vertices)
    return tuple(table[point] for point in range(IBUG68.num_points))


IBUG68_VERTICES: tuple[tuple[int, ...], ...] = _ibug68_vertices()
"""For each of the 68 points, the one or two mesh vertices whose mean it is."""

_FIRST = [vertices[0] for vertices in IBUG68_VERTICES]
_LAST = [vertices[-1] for vertices in IBUG68_VERTICES]


def to_ibug68(points: Points) -> Points:
    """Reduce a MediaPipe face mesh to the 68 points of iBUG.

    Args:
        points: `(..., 468, c)` or `(..., 478, c)` (with irises, which are not used), tensor or
            array, any unit; `c` is 2 or 3.

    Returns:
        `(..., 68, c)`, in the same unit. A point with a NaN vertex is NaN.

    Raises:
        ValueError: If there are neither 468 nor 478 vertices.

    References:
        Against dlib's mean face the reduction is off by 3.5 % of the distance between the outer
        corners of the eyes.

    Examples:
        >>> mesh = np.zeros((468, 2))
        >>> mesh[152] = 0.5, 0.9
        >>> to_ibug68(mesh)[8]
        array([0.5, 0.9])
    """
    if points.ndim < 2 or points.shape[-2] not in (468, 478):
        raise ValueError(
            "`points` must have shape (..., 468, c) or (..., 478, c), a MediaPipe face mesh; "
            f"got {tuple(points.shape)}."
        )
    # Indexing, not a matrix product: exact, and one NaN vertex spoils only its own points.
    return (points[..., _FIRST, :] + points[..., _LAST, :]) / 2


_REGIONS_RIGHT: dict[str, tuple[int, ...]] = {
    "right_brow": (46, 52, 53, 55, 63, 65, 66, 70, 105, 107, 69, 104, 108),
    "right_eye": (7, 33, 133, 144, 145, 153, 154, 155, 157, 158, 159, 160, 161, 163, 173, 246),
    "right_cheek": (36, 50, 101, 117, 118, 123, 187, 203, 205, 206, 207),
    "right_mouth_corner": (43, 57, 61, 78, 146, 185, 186, 212),
}
_REGIONS_MIDDLE_HALF: dict[str, tuple[int, ...]] = {
    "glabella": (8, 9, 168, 55, 107),
    "nose": (1, 2, 4, 5, 6, 195, 197, 49, 97, 98, 129),
    "upper_lip": (0, 13, 37, 39, 40, 81, 82),
    "lower_lip": (14, 17, 84, 87, 91, 178, 181),
    "chin": (152, 175, 199, 200, 32, 140, 148, 171, 201, 208),
}


def _mirrored(vertices: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_MIRROR[vertex] for vertex in vertices)


_REGIONS: dict[str, tuple[int, ...]] = {
    **_REGIONS_RIGHT,
    **{REGION_MIRROR[name]: _mirrored(vertices) for name, vertices in _REGIONS_RIGHT.items()},
    **{
        name: tuple(dict.fromkeys((*vertices, *_mirrored(vertices))))
        for name, vertices in _REGIONS_MIDDLE_HALF.items()
    },
}

MEDIAPIPE468 = LandmarkScheme(
    name="mediapipe468",
    num_points=468,
    regions={name: _REGIONS[name] for name in REGION_NAMES},
    mirror=_MIRROR,
    region_mirror=REGION_MIRROR,
)
"""468 vertices, the same 13 regions as `IBUG68`; with cheeks and forehead of its own."""
