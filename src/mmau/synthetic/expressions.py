"""How each Action Unit moves the vertices of the template, and how identities differ.

Every movement is a sum of Gaussian bumps whose centres hang on named vertices, so that they follow
the template whatever face it was derived from. The amplitudes are set by eye, for plausible
pictures that differ from AU to AU; they are not a measured face model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmau.action_units import AU_NAMES
from mmau.synthetic.face_template import FaceTemplate

# Anatomical names of the vertices that bumps hang on, image right (the subject's left).
INNER_BROW, MID_BROW, OUTER_BROW = 336, 334, 300
UPPER_LID, LOWER_LID, OUTER_EYE = 386, 374, 263
CHEEK, NASOLABIAL, NOSE_WING = 280, 425, 327
MOUTH_CORNER, UPPER_LIP, LOWER_LIP = 291, 267, 314
LOWER_LIP_MIDDLE, CHIN = 17, 152


@dataclass(frozen=True)
class Bump:
    """One Gaussian push, mirrored to the other side of the face unless its centre is at x = 0."""

    anchor: int
    """Vertex that its centre hangs on."""
    radius: float
    """Standard deviation in template units."""
    outward: float = 0.0
    """Displacement away from the middle at full intensity, in template units."""
    up: float = 0.0
    """Displacement upwards at full intensity, in template units."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Centre minus anchor, outward and up, in template units."""
    side: Literal["both", "upper", "lower"] = "both"
    """Which side of the mouth line moves."""


BUMPS: dict[str, tuple[Bump, ...]] = {
    "AU1": (Bump(INNER_BROW, 1.3, outward=-0.1, up=1.0, offset=(0.0, 0.4)),),
    "AU2": (Bump(OUTER_BROW, 1.5, up=0.95, offset=(-0.5, 0.7)),),
    "AU4": (
        Bump(INNER_BROW, 1.5, outward=-0.45, up=-0.75, offset=(0.2, 0.0)),
        Bump(MID_BROW, 1.5, outward=-0.1, up=-0.35),
    ),
    "AU6": (
        Bump(CHEEK, 1.4, up=0.6, offset=(-0.4, 0.9)),
        Bump(OUTER_EYE, 1.0, outward=-0.25, offset=(1.45, -0.15)),
        Bump(LOWER_LID, 0.8, up=0.22, offset=(0.1, -0.4)),
    ),
    "AU7": (
        Bump(UPPER_LID, 0.7, up=-0.3),
        Bump(LOWER_LID, 0.7, up=0.32, offset=(0.0, -0.15)),
    ),
    "AU10": (
        Bump(UPPER_LIP, 0.9, up=0.65, offset=(0.4, 0.0), side="upper"),
        Bump(NOSE_WING, 0.9, outward=0.05, up=0.4),
        # The lower lip follows, so that the lips hardly part: parting them is AU25.
        Bump(LOWER_LIP, 0.9, up=0.45, offset=(0.4, 0.4), side="lower"),
    ),
    "AU12": (
        Bump(MOUTH_CORNER, 1.2, outward=0.6, up=0.8),
        Bump(NASOLABIAL, 1.4, outward=0.15, up=0.4),
    ),
    "AU15": (
        Bump(MOUTH_CORNER, 1.0, outward=0.05, up=-0.65),
        Bump(MOUTH_CORNER, 1.2, outward=0.05, up=-0.45, offset=(0.3, -1.3)),
    ),
    "AU23": (
        Bump(MOUTH_CORNER, 1.0, outward=-0.55),
        Bump(UPPER_LIP, 0.8, up=-0.22, side="upper"),
        Bump(LOWER_LIP, 0.8, up=0.26, side="lower"),
    ),
    "AU24": (
        Bump(UPPER_LIP, 0.9, up=-0.38, side="upper"),
        Bump(LOWER_LIP, 0.9, up=0.42, side="lower"),
        Bump(LOWER_LIP_MIDDLE, 1.0, up=0.2, offset=(0.0, -1.2), side="lower"),
    ),
    "AU25": (
        Bump(LOWER_LIP, 1.3, up=-0.55, side="lower"),
        Bump(UPPER_LIP, 1.0, up=0.15, side="upper"),
    ),
    "AU26": (),  # the jaw is no bump: see `_jaw_drop`
}
"""Movements of each Action Unit at full intensity, in the order of `AU_NAMES`."""

JAW_DROP = 1.25
"""How far the chin falls in AU26 at full intensity, in template units."""


def _bump(template: FaceTemplate, bump: Bump) -> np.ndarray:
    x, y = template.vertices.T
    centre = template.vertices[bump.anchor] + bump.offset
    on_midline = abs(centre[0]) < 1e-6
    moves = {"both": np.ones_like(x), "upper": template.upper, "lower": template.lower}[bump.side]
    total = np.zeros_like(template.vertices)
    for sign in (1.0,) if on_midline else (-1.0, 1.0):
        away = (x - sign * centre[0]) ** 2 + (y - centre[1]) ** 2
        weight = np.exp(-away / (2 * bump.radius**2)) * moves
        if not on_midline:
            # Two mirrored bumps near the midline add up there: take the share of one.
            weight = weight / (1 + np.exp(-2 * (centre[0] / bump.radius) ** 2))
        total[:, 0] += sign * bump.outward * weight
        total[:, 1] += bump.up * weight
    return total


def _jaw_drop(template: FaceTemplate) -> np.ndarray:
    """Everything under the mouth line goes down, fading towards the ears and above the mouth."""
    x, y = template.vertices.T
    corner = template.vertices[MOUTH_CORNER]
    chin = template.vertices[CHIN]
    line = template.mouth_line(x)
    drop = np.zeros_like(template.vertices)
    half_jaw = 1.07 * template.vertices[454, 0]
    sideways = np.clip(1 - (np.abs(x) / half_jaw) ** 3, 0, 1)
    below = np.clip((line - y) / 0.35, 0, 1) * template.lower
    beside = np.clip((corner[1] + 2.5 - y) / (corner[1] + 2.5 - chin[1]), 0, 1)
    # The inner lower lip lies on the mouth line itself and moves with the jaw.
    reach = template.mouth_half_width
    inner_lip = (~template.upper) * np.sqrt(np.clip(1 - (x / (0.97 * reach)) ** 2, 0, 1))
    away = (np.abs(x) - corner[0]) ** 2 + (y - corner[1]) ** 2
    at_corner = 0.35 * np.exp(-away / (2 * 0.6**2))
    amount = np.maximum(np.maximum(below * sideways, inner_lip), at_corner)
    drop[:, 1] = -JAW_DROP * amount * np.where(np.abs(x) > 1.02 * reach, beside, 1.0)
    return drop


def au_displacements(template: FaceTemplate) -> np.ndarray:
    """Compute how far each Action Unit moves each vertex at full intensity."""
    moved = np.zeros((len(AU_NAMES), *template.vertices.shape))
    for index, name in enumerate(AU_NAMES):
        for bump in BUMPS[name]:
            moved[index] += _bump(template, bump)
    moved[AU_NAMES.index("AU26")] += _jaw_drop(template)
    return moved


def identity_displacement(template: FaceTemplate, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth change of proportions, so that clips of one photograph differ.

    Face width, jaw width, face height, brow height and mouth height each get a normal draw,
    cut at two standard deviations.
    """
    x, y = template.vertices.T
    width, jaw, height, brow, mouth = np.clip(rng.standard_normal(5), -2, 2)
    brow_line, mouth_line = template.vertices[MID_BROW, 1], template.vertices[13, 1]
    change = np.zeros_like(template.vertices)
    change[:, 0] = x * (0.05 * width + 0.06 * jaw * np.exp(-(((y - mouth_line + 2) / 3) ** 2)))
    change[:, 1] = (
        0.03 * height * y
        + 0.25 * brow * np.exp(-(((y - brow_line) / 2) ** 2))
        + 0.25 * mouth * np.exp(-(((y - mouth_line) / 2) ** 2))
    )
    return change
