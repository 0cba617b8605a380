"""One clip in memory: images, sound, labels, and what is behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_choice, check_range
from mmau.synthetic.photographs import PHOTOGRAPHS
from mmau.synthetic.sound import draw_waveform
from mmau.synthetic.timeline import (
    Event,
    SyntheticConfig,
    draw_events,
    draw_hidden,
    draw_occluders,
    intensities_at,
)
from mmau.synthetic.warp import Face, FaceWarp, draw_blotches, load_faces, occlude

_STREAMS = (
    "look",
    "events",
    "hidden",
    "identity",
    "motion",
    "exposure",
    "cutaway",
    "sound",
    "occluder",
)


@dataclass(frozen=True)
class ClipPlan:
    """All that is decided before a pixel is computed; what `truth.json` records."""

    seed: tuple[int, ...]
    """Seed of the clip."""
    photograph: str
    """`"grace_hopper"` or `"astronaut"`."""
    mirrored: bool
    """Whether the photograph is shown mirrored."""
    timestamps: np.ndarray
    """`(t,)` float64, seconds."""
    events: tuple[Event, ...]
    """Episodes and distracting sounds, in order of time."""
    hidden: np.ndarray
    """`(t,)` bool, true where the image shows no face."""
    intensities: np.ndarray
    """`(t, 12)` float32 in [0, 1], in the order of `AU_NAMES`."""
    labels: np.ndarray
    """`(t, 12)` int8, 1 where the intensity reaches the threshold, else 0; hidden or not."""


@dataclass(frozen=True)
class SyntheticClip(ClipPlan):
    """A rendered clip: a `ClipPlan` with its images and sound."""

    frames: np.ndarray
    """`(t, size, size, 3)` uint8 RGB."""
    mesh: np.ndarray
    """`(t, 468, 2)` float32, where the face mesh is, in pixels; NaN where hidden."""
    waveform: np.ndarray
    """`(n,)` float32 in [-1, 1], starting with the first frame."""
    sample_rate: int
    """Samples per second of `waveform`, in Hz."""


def _generator(seed: tuple[int, ...], stream: str) -> np.random.Generator:
    """A generator per purpose, so that one option does not disturb what another one draws."""
    return np.random.default_rng([*seed, _STREAMS.index(stream)])


def plan_clip(
    seed: int | Sequence[int],
    config: SyntheticConfig | None = None,
    *,
    photograph: str | None = None,
) -> ClipPlan:
    """Decide what happens in a clip, without rendering it."""
    config = config or SyntheticConfig()
    numbers = (seed,) if isinstance(seed, int) else tuple(int(one) for one in seed)
    for number in numbers:
        check_range("seed", number, 0)
    look = _generator(numbers, "look")
    names = tuple(PHOTOGRAPHS)
    drawn, mirrored = names[look.integers(len(names))], look.random() < config.mirrored
    if photograph is not None:
        check_choice("photograph", photograph, names)
    timestamps = np.arange(config.num_frames) / config.fps
    events = tuple(draw_events(_generator(numbers, "events"), config))
    intensities = intensities_at(events, timestamps)
    return ClipPlan(
        seed=numbers,
        photograph=photograph or drawn,
        mirrored=bool(mirrored),
        timestamps=timestamps,
        events=events,
        hidden=draw_hidden(_generator(numbers, "hidden"), timestamps, config),
        intensities=intensities,
        labels=(intensities >= config.label_threshold).astype(np.int8),
    )


def _face(name: str, faces: Sequence[Face] | None) -> Face:
    return next(face for face in faces or load_faces() if face.name == name)


def render_clip(
    seed: int | Sequence[int],
    config: SyntheticConfig | None = None,
    *,
    photograph: str | None = None,
    faces: Sequence[Face] | None = None,
) -> SyntheticClip:
    """Render a clip in memory.

    The labels of hidden frames are kept: what the face does there can only be told from the sound.

    Args:
        seed: Non-negative number or numbers; the same seed gives the same labels, pixels and sound.
        config: Size, difficulty and appearance; defaults if `None`.
        photograph: `"grace_hopper"` or `"astronaut"`, or `None` to draw one.
        faces: Photographs with their meshes, for a process without MediaPipe; found if `None`.

    Returns:
        The clip.

    Raises:
        ValueError: If a seed is negative, or there is no such photograph.
        MissingDependencyError: If matplotlib, scikit-image or MediaPipe is not installed.

    Examples:
        >>> clip = render_clip(0, SyntheticConfig(num_frames=8, size=96))
        >>> clip.frames.shape, clip.waveform.shape
        ((8, 96, 96, 3), (23520,))
    """
    config = config or SyntheticConfig()
    plan = plan_clip(seed, config, photograph=photograph)
    size = config.size
    warp = FaceWarp(
        _face(plan.photograph, faces),
        size,
        face_height=config.face_height,
        identity=_generator(plan.seed, "identity"),
        identity_strength=config.identity,
    )
    scale = size / warp.canvas_size
    view = _draw_view(_generator(plan.seed, "motion"), config, scale, mirrored=plan.mirrored)
    gains = _draw_exposure(_generator(plan.seed, "exposure"), config)
    # Only frames that show the face cost anything.
    shown = np.flatnonzero(~plan.hidden)
    intensities, view = torch.from_numpy(plan.intensities[shown]), view[torch.from_numpy(shown)]
    frames = np.empty((config.num_frames, size, size, 3), dtype=np.uint8)
    mesh = np.full((config.num_frames, *warp.template.vertices.shape), np.nan, dtype=np.float32)
    if len(shown):
        frames[shown] = _apply_exposure(warp.render(intensities, view), gains[shown]).numpy()
        mesh[shown] = warp.vertices(intensities, view).numpy()
    if config.occluded:
        rng = _generator(plan.seed, "occluder")
        vertex, radius = draw_occluders(rng, plan.timestamps, config, num_vertices=mesh.shape[1])
        occlude(rng, frames, mesh, vertex, radius)
    cutaway = _generator(plan.seed, "cutaway")
    for start, stop in hidden_ranges(plan.hidden):
        frames[start:stop] = _draw_cutaway(cutaway, stop - start, size)
    waveform = draw_waveform(plan.events, _generator(plan.seed, "sound"), config)
    return SyntheticClip(
        **vars(plan), frames=frames, mesh=mesh, waveform=waveform, sample_rate=config.sample_rate
    )


def hidden_ranges(hidden: np.ndarray) -> list[tuple[int, int]]:
    """List the runs of true values as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def render_face(
    intensities: np.ndarray,
    *,
    photograph: str = "astronaut",
    size: int = 192,
    face_height: float = 0.5,
    faces: Sequence[Face] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Render one still image per row of intensities: no motion, no sound, nothing hidden.

    Args:
        intensities: `(t, 12)`, 0 to 1, in the order of `AU_NAMES`.
        photograph: `"grace_hopper"` or `"astronaut"`.
        size: Side of the square image in pixels, even.
        face_height: Height of the face, forehead to chin, as a share of the image.
        faces: Photographs with their meshes, for a process without MediaPipe; found if `None`.

    Returns:
        Images `(t, size, size, 3)` uint8 RGB and meshes `(t, 468, 2)` float32 in pixels.

    Raises:
        ValueError: If a shape or value is wrong, or there is no such photograph.
        MissingDependencyError: If matplotlib, scikit-image or MediaPipe is not installed.

    Examples:
        >>> images, mesh = render_face(np.eye(12), size=96)
        >>> images.shape, mesh.shape
        ((12, 96, 96, 3), (12, 468, 2))
    """
    check_choice("photograph", photograph, PHOTOGRAPHS)
    warp = FaceWarp(_face(photograph, faces), size, face_height=face_height)
    values = torch.from_numpy(np.asarray(intensities, dtype=np.float32))
    images = warp.render(values)
    return images.numpy(), warp.vertices(values).numpy()


# ------------------------------------------------------------------ what the camera adds
_KNOT_SECONDS = 0.6
# Standard deviations of the motion: rotation in radians, zoom, and shifts in half images. Cut at
# two of them, the view stays on the canvas of `FaceWarp`.
_ROTATION, _ZOOM, _SHIFT = 0.05, 0.03, 0.05


def _drift(rng: np.random.Generator, config: SyntheticConfig, columns: int) -> np.ndarray:
    """Smooth unit-variance noise `(t, columns)` with a knot every 0.6 seconds."""
    step = max(1.0, config.fps * _KNOT_SECONDS)
    knots = np.clip(rng.standard_normal((int(config.num_frames / step) + 2, columns)), -2, 2)
    place = np.arange(config.num_frames) / step
    before = place.astype(int)
    blend = (place - before)[:, None]
    blend = blend * blend * (3 - 2 * blend)
    return np.asarray(knots[before] * (1 - blend) + knots[before + 1] * blend)


def _draw_view(
    rng: np.random.Generator, config: SyntheticConfig, scale: float, *, mirrored: bool
) -> Tensor:
    """Draw slow head and camera motion: rotation, zoom and shift, as `(t, 2, 3)` matrices."""
    angle, zoom, right, down = config.motion * _drift(rng, config, 4).T
    cosine = scale * (1 + _ZOOM * zoom) * np.cos(_ROTATION * angle)
    sine = scale * (1 + _ZOOM * zoom) * np.sin(_ROTATION * angle)
    side = -1.0 if mirrored else 1.0
    view = np.empty((config.num_frames, 2, 3), dtype=np.float32)
    view[:, 0] = np.stack([side * cosine, -sine, scale * _SHIFT * right], 1)
    view[:, 1] = np.stack([side * sine, cosine, scale * _SHIFT * down], 1)
    return torch.from_numpy(view)


def _draw_exposure(rng: np.random.Generator, config: SyntheticConfig) -> np.ndarray:
    """Draw a slow change of brightness."""
    return (1 + config.exposure * _drift(rng, config, 1)[:, 0]).astype(np.float32)


def _apply_exposure(frames: Tensor, gains: np.ndarray) -> Tensor:
    """Multiply the brightness of each frame."""
    levels = np.arange(256, dtype=np.float32)[None] * gains[:, None]
    table = torch.from_numpy(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    # A look-up per frame is faster than a round trip through float.
    return torch.stack([t[f.long()] for t, f in zip(table, frames, strict=True)])


def _draw_cutaway(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """Draw a plain shot without a face: soft blotches of two colours, grain and flicker."""
    still = draw_blotches(rng, (size, size), cells=4, brightness=(40, 200), mode="bicubic")
    still += rng.integers(-4, 5, (size, size, 1))
    flicker = rng.integers(-2, 3, (length, 1, 1, 1))
    # Both colours stay clear of 0 and 255, so nothing needs clipping.
    return np.asarray(still.astype(np.uint8)[None] + flicker.astype(np.uint8))
