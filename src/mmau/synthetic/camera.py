"""What the camera adds: motion, exposure, and cut-aways that show no face."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_KNOT_SECONDS = 0.6
# Standard deviations of the motion: rotation in radians, zoom, and shifts in half pictures. Cut at
# two of them, the view stays on the canvas of `FaceWarp`.
_ROTATION, _ZOOM, _SHIFT = 0.05, 0.03, 0.05


def _drift(rng: np.random.Generator, length: int, fps: float, columns: int) -> np.ndarray:
    """Smooth unit-variance noise `(length, columns)` with a knot every 0.6 seconds."""
    step = max(1.0, fps * _KNOT_SECONDS)
    knots = np.clip(rng.standard_normal((int(length / step) + 2, columns)), -2, 2)
    place = np.arange(length) / step
    before = place.astype(int)
    blend = (place - before)[:, None]
    blend = blend * blend * (3 - 2 * blend)
    return np.asarray(knots[before] * (1 - blend) + knots[before + 1] * blend)


def draw_view(
    rng: np.random.Generator,
    length: int,
    fps: float,
    *,
    scale: float,
    strength: float = 1.0,
    mirrored: bool = False,
) -> Tensor:
    """Draw slow head and camera motion: rotation, zoom and shift."""
    angle, zoom, right, down = strength * _drift(rng, length, fps, 4).T
    cosine = scale * (1 + _ZOOM * zoom) * np.cos(_ROTATION * angle)
    sine = scale * (1 + _ZOOM * zoom) * np.sin(_ROTATION * angle)
    side = -1.0 if mirrored else 1.0
    view = np.empty((length, 2, 3), dtype=np.float32)
    view[:, 0] = np.stack([side * cosine, -sine, scale * _SHIFT * right], 1)
    view[:, 1] = np.stack([side * sine, cosine, scale * _SHIFT * down], 1)
    return torch.from_numpy(view)


def draw_exposure(
    rng: np.random.Generator, length: int, fps: float, *, strength: float
) -> np.ndarray:
    """Draw a slow change of brightness."""
    return (1 + strength * _drift(rng, length, fps, 1)[:, 0]).astype(np.float32)


def apply_exposure(frames: Tensor, gains: np.ndarray) -> Tensor:
    """Multiply the brightness of each frame."""
    levels = np.arange(256, dtype=np.float32)[None] * gains[:, None]
    table = torch.from_numpy(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    # A look-up per frame is faster than a round trip through float.
    return torch.stack([t[f.long()] for t, f in zip(table, frames, strict=True)])


def draw_cutaway(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """Draw a plain picture without a face: soft blotches of two colours, grain and flicker."""
    colours = rng.uniform(40, 200, (2, 3)).astype(np.float32)
    blotches = torch.from_numpy(rng.uniform(0, 1, (1, 1, 4, 4)).astype(np.float32))
    smooth = F.interpolate(blotches, size=(size, size), mode="bicubic", align_corners=True)
    mix = smooth[0, 0].clamp(0, 1).numpy()[..., None]
    still = colours[0] + mix * (colours[1] - colours[0])
    still += rng.integers(-4, 5, (size, size, 1))
    flicker = rng.integers(-2, 3, (length, 1, 1, 1))
    # Both colours stay clear of 0 and 255, so nothing needs clipping.
    return np.asarray(still.astype(np.uint8)[None] + flicker.astype(np.uint8))
