"""Landmark conventions as data: points, regions, mirror tables, Action Unit to regions."""

from __future__ import annotations

from mmau.landmarks.facial_regions import ACTION_UNIT_REGIONS
from mmau.landmarks.ibug68 import IBUG68
from mmau.landmarks.mediapipe468 import MEDIAPIPE468, to_ibug68
from mmau.landmarks.scheme import LandmarkScheme
from mmau.registry import Registry

__all__ = [
    "ACTION_UNIT_REGIONS",
    "IBUG68",
    "LANDMARK_SCHEMES",
    "MEDIAPIPE468",
    "LandmarkScheme",
    "to_ibug68",
]

LANDMARK_SCHEMES: Registry[LandmarkScheme] = Registry(
    "landmark scheme", group="mmau.landmark_schemes"
)
"""Landmark schemes by name; a plug-in registers a `LandmarkScheme`, not a factory."""

LANDMARK_SCHEMES.register_lazy(
    "ibug68",
    "mmau.landmarks.ibug68:IBUG68",
    summary="68 points of iBUG in 13 regions; cheeks and forehead are derived.",
)
LANDMARK_SCHEMES.register_lazy(
    "mediapipe468",
    "mmau.landmarks.mediapipe468:MEDIAPIPE468",
    summary="468 vertices of MediaPipe's face mesh in the same 13 regions.",
)
