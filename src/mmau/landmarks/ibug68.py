"""The 68 points of iBUG (300-W, Multi-PIE), with cheeks and forehead derived from them."""

from __future__ import annotations

from mmau.landmarks.facial_regions import REGION_MIRROR, REGION_NAMES
from mmau.landmarks.scheme import LandmarkScheme

_POINTS = 68

_MIRROR: tuple[int, ...] = (
    *range(16, -1, -1),  # jaw
    *range(26, 16, -1),  # brows
    *range(27, 31),  # nose bridge
    *range(35, 30, -1),  # nose base
    *(45, 44, 43, 42, 47, 46),  # eyes
    *(39, 38, 37, 36, 41, 40),
    *range(54, 47, -1),  # outer lip, upper then lower
    *range(59, 54, -1),
    *range(64, 59, -1),  # inner lip, upper then lower
    *range(67, 64, -1),
)

# 27 is the root of the nose and 33 its base: `27 - 33` points up the face, is about as long as the
# nose and, unlike the chin, does not move with an expression.
_RIGHT: dict[str, dict[int, float]] = {
    "right_forehead_outer": {18: 1.0, 27: 0.3, 33: -0.3},
    "right_forehead_middle": {19: 1.0, 27: 0.3, 33: -0.3},
    "right_forehead_inner": {21: 1.0, 27: 0.3, 33: -0.3},
    "right_cheek_under_eye": {41: 0.7, 48: 0.3},
    "right_cheek_middle": {41: 0.4, 48: 0.6},
    "right_cheek_lateral": {36: 0.55, 3: 0.25, 48: 0.2},
    "right_cheek_centre": {31: 0.5, 2: 0.5},
    "right_cheek_inner": {31: 0.65, 41: 0.35},
    "right_cheek_outer": {31: 0.45, 3: 0.55},
    "right_cheek_low": {48: 0.5, 3: 0.5},
    "right_mouth_outside": {48: 1.15, 54: -0.15},
    "right_mouth_below": {59: 0.5, 48: 0.75, 54: -0.25},
    "right_chin": {57: 0.45, 7: 0.55},
}
_MIDDLE: dict[str, dict[int, float]] = {
    "glabella_above": {21: 0.5, 22: 0.5},
    "glabella_below": {21: 0.25, 22: 0.25, 27: 0.5},
    "middle_chin": {57: 0.5, 8: 0.5},
}
_LEFT = {
    name.replace("right", "left"): {_MIRROR[point]: weight for point, weight in weights.items()}
    for name, weights in _RIGHT.items()
}
_DERIVED = {**_RIGHT, **_LEFT, **_MIDDLE}
_INDEX = {name: _POINTS + row for row, name in enumerate(_DERIVED)}


def _derived(prefix: str) -> tuple[int, ...]:
    return tuple(index for name, index in _INDEX.items() if name.startswith(prefix))


_REGIONS: dict[str, tuple[int, ...]] = {
    "right_brow": (*range(17, 22), *_derived("right_forehead")),
    "left_brow": (*range(22, 27), *_derived("left_forehead")),
    "glabella": (20, 21, 22, 23, 27, *_derived("glabella")),
    "right_eye": tuple(range(36, 42)),
    "left_eye": tuple(range(42, 48)),
    "nose": tuple(range(27, 36)),
    "right_cheek": _derived("right_cheek"),
    "left_cheek": _derived("left_cheek"),
    "right_mouth_corner": (48, 49, 59, 60, *_derived("right_mouth")),
    "left_mouth_corner": (53, 54, 55, 64, *_derived("left_mouth")),
    "upper_lip": (*range(49, 54), *range(61, 64)),
    "lower_lip": (*range(55, 60), *range(65, 68)),
    "chin": (7, 8, 9, *(_INDEX[f"{part}_chin"] for part in ("right", "middle", "left"))),
}

IBUG68 = LandmarkScheme(
    name="ibug68",
    num_points=_POINTS,
    regions={name: _REGIONS[name] for name in REGION_NAMES},
    mirror=_MIRROR,
    region_mirror=REGION_MIRROR,
    derived=_DERIVED,
)
"""68 points, 13 regions; see `LandmarkScheme`."""
