"""The thirteen facial regions that our landmark schemes share, and where each Action Unit shows."""

from __future__ import annotations

REGION_NAMES: tuple[str, ...] = (
    "right_brow",
    "left_brow",
    "glabella",
    "right_eye",
    "left_eye",
    "nose",
    "right_cheek",
    "left_cheek",
    "right_mouth_corner",
    "left_mouth_corner",
    "upper_lip",
    "lower_lip",
    "chin",
)
"""Names in the order of the regions axis; right and left are the subject's own."""

REGION_MIRROR: dict[str, str] = {
    f"{side}_{part}": f"{other}_{part}"
    for side, other in (("right", "left"), ("left", "right"))
    for part in ("brow", "eye", "cheek", "mouth_corner")
}
"""Region name to the name of its mirror image; regions on the midline mirror onto themselves."""

_BROWS = ("right_brow", "left_brow")
_EYES = ("right_eye", "left_eye")
_CHEEKS = ("right_cheek", "left_cheek")
_CORNERS = ("right_mouth_corner", "left_mouth_corner")

ACTION_UNIT_REGIONS: dict[str, tuple[str, ...]] = {
    "AU1": (*_BROWS, "glabella"),
    "AU2": _BROWS,
    "AU4": (*_BROWS, "glabella"),
    "AU6": (*_EYES, *_CHEEKS),
    "AU7": _EYES,
    "AU10": ("nose", *_CHEEKS, "upper_lip"),
    "AU12": (*_CHEEKS, *_CORNERS),
    "AU15": (*_CORNERS, "chin"),
    "AU23": (*_CORNERS, "upper_lip", "lower_lip"),
    "AU24": ("upper_lip", "lower_lip"),
    "AU25": ("upper_lip", "lower_lip"),
    "AU26": ("lower_lip", "chin"),
}
"""Action Unit to the regions in which FACS describes its change of appearance."""
