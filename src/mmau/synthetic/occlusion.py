"""Things that pass in front of the face: a patch of another texture that hides part of a region."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mmau._checks import check_range


def draw_occluders(
    rng: np.random.Generator,
    times: np.ndarray,
    share: float,
    *,
    seconds: tuple[float, float],
    radius: tuple[float, float],
    num_vertices: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw when something covers the face, where, and how much, without looking at the events.

    Examples:
        >>> times = np.arange(600) / 15
        >>> vertex, radius = draw_occluders(
        ...     np.random.default_rng(0), times, 0.5, seconds=(1, 2), radius=(0.1, 0.2),
        ...     num_vertices=468)
        >>> bool(0.3 < (vertex >= 0).mean() < 0.7)
        True
    """
    check_range("share", share, 0, 1)
    vertex = np.full(len(times), -1)
    size = np.zeros(len(times))
    now = float(times[0]) if len(times) else 0.0
    while len(times) and share and now <= times[-1]:
        until = now + float(rng.uniform(*seconds))
        inside = (times >= now) & (times < until)
        place, drawn = int(rng.integers(num_vertices)), float(rng.uniform(*radius))
        if rng.random() < share:
            vertex[inside], size[inside] = place, drawn
        now = until
    return vertex, size


def occlude(
    rng: np.random.Generator,
    frames: np.ndarray,
    mesh: np.ndarray,
    vertex: np.ndarray,
    radius: np.ndarray,
) -> None:
    """Paint what `draw_occluders` drew over the pictures, in place; it moves with the face."""
    height, width = frames.shape[1:3]
    rows, columns = np.mgrid[0:height, 0:width]
    texture, before = None, -1
    for index in range(len(frames)):
        if vertex[index] != before or texture is None:
            before, texture = int(vertex[index]), _texture(rng, height, width)
        if before < 0 or np.isnan(mesh[index]).any():
            continue
        x, y = mesh[index, before]
        reach = radius[index] * np.ptp(mesh[index, :, 1])
        inside = (columns - x) ** 2 + (rows - y) ** 2 <= reach**2
        frames[index][inside] = texture[inside]


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft blotches of two colours with grain, `(h, w, 3)` uint8."""
    colours = rng.uniform(20, 220, (2, 3)).astype(np.float32)
    noise = torch.from_numpy(rng.uniform(0, 1, (1, 1, 12, 12)).astype(np.float32))
    blotches = F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=True)
    mix = blotches[0, 0].numpy()[..., None]
    grain = rng.integers(-6, 7, (height, width, 1))
    return np.asarray(colours[0] + mix * (colours[1] - colours[0]) + grain).astype(np.uint8)
