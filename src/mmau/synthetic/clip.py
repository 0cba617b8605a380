"""One clip in memory: pictures, sound, labels and the truth behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mmau._checks import check_choice, check_range
from mmau.synthetic.camera import apply_exposure, draw_cutaway, draw_exposure, draw_view
from mmau.synthetic.config import SyntheticConfig
from mmau.synthetic.face_warp import Face, FaceWarp, load_faces
from mmau.synthetic.occlusion import draw_occluders, occlude
from mmau.synthetic.photographs import PHOTOGRAPHS
from mmau.synthetic.sounds import draw_waveform
from mmau.synthetic.timeline import Event, draw_events, draw_hidden, intensities_at

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
DEFAULT_SIZE = 192
"""Side of the square picture in pixels."""


@dataclass(frozen=True)
class ClipPlan:
    """All that is decided before a pixel is computed; cheap, and what `truth.json` records."""

    seed: tuple[int, ...]
    """Seed of the clip."""
    photograph: str
    """Key of `PHOTOGRAPHS`."""
    mirrored: bool
    """Whether the photograph is shown mirrored."""
    timestamps: np.ndarray
    """`(t,)` float64, seconds."""
    events: tuple[Event, ...]
    """Episodes and distracting sounds, in order of time."""
    hidden: np.ndarray
    """`(t,)` bool, true where the picture shows no face."""
    intensities: np.ndarray
    """`(t, 12)` float32 in [0, 1]."""
    labels: np.ndarray
    """`(t, 12)` int8, 1 where the intensity reaches the threshold, else 0; hidden or not."""


@dataclass(frozen=True)
class SyntheticClip(ClipPlan):
    """A rendered clip."""

    frames: np.ndarray
    """`(t, size, size, 3)` uint8 RGB."""
    mesh: np.ndarray
    """`(t, 468, 2)` float32, where the face mesh is, in pixels; NaN where hidden."""
    waveform: np.ndarray
    """`(n,)` float32 in [-1, 1], starting with the first frame."""
    sample_rate: int
    """Samples per second of `waveform`, in Hz."""


def _generator(seed: tuple[int, ...], stream: str) -> np.random.Generator:
    """A generator per purpose, so that one knob does not disturb what another one draws."""
    return np.random.default_rng([*seed, _STREAMS.index(stream)])


def plan_clip(
    seed: int | Sequence[int],
    *,
    photograph: str | None = None,
    num_frames: int = 160,
    fps: float = 15.0,
    config: SyntheticConfig | None = None,
) -> ClipPlan:
    """Decide what happens in a clip, without rendering it.

    Args:
        seed: Non-negative number or numbers; the same seed gives the same clip.
        photograph: A key of `PHOTOGRAPHS`, or `None` to draw one.
        num_frames: Number of frames `t`.
        fps: Frames per second.
        config: The knobs; defaults if `None`.

    Returns:
        The plan.

    Raises:
        ValueError: If a value is out of range, or there is no such photograph.

    Examples:
        >>> plan = plan_clip(0)
        >>> plan.labels.shape, bool(((plan.intensities >= 0.35) == plan.labels).all())
        ((160, 12), True)
    """
    config = config or SyntheticConfig()
    check_range("num_frames", num_frames, 1)
    check_range("fps", fps, 1)
    numbers = (seed,) if isinstance(seed, int) else tuple(int(one) for one in seed)
    for number in numbers:
        check_range("seed", number, 0)
    look = _generator(numbers, "look")
    names = tuple(PHOTOGRAPHS)
    drawn, mirrored = names[look.integers(len(names))], look.random() < config.mirrored
    if photograph is not None:
        check_choice("photograph", photograph, names)
    timestamps = np.arange(num_frames) / fps
    events = draw_events(_generator(numbers, "events"), num_frames / fps, config)
    intensities = intensities_at(events, timestamps)
    return ClipPlan(
        seed=numbers,
        photograph=photograph or drawn,
        mirrored=bool(mirrored),
        timestamps=timestamps,
        events=tuple(events),
        hidden=draw_hidden(_generator(numbers, "hidden"), timestamps, config),
        intensities=intensities,
        labels=(intensities >= config.label_threshold).astype(np.int8),
    )


@lru_cache(maxsize=1)
def _loaded_faces() -> tuple[Face, ...]:
    return load_faces()


def _face(name: str, faces: Sequence[Face] | None) -> Face:
    return next(face for face in (faces or _loaded_faces()) if face.name == name)


def render_clip(
    seed: int | Sequence[int],
    *,
    photograph: str | None = None,
    num_frames: int = 160,
    fps: float = 15.0,
    size: int = DEFAULT_SIZE,
    config: SyntheticConfig | None = None,
    faces: Sequence[Face] | None = None,
) -> SyntheticClip:
    """Render a clip in memory.

    The labels of hidden frames are kept: what the face does there can only be heard.

    Args:
        seed: Non-negative number or numbers; the same seed gives the same labels, pixels and sound.
        photograph: A key of `PHOTOGRAPHS`, or `None` to draw one.
        num_frames: Number of frames `t`.
        fps: Frames per second.
        size: Side of the square picture in pixels, even.
        config: The knobs; defaults if `None`.
        faces: What `load_faces` returned, to find the meshes only once; `None` finds them here.

    Returns:
        The clip.

    Raises:
        ValueError: If a value is out of range, or there is no such photograph.
        MissingDependencyError: If matplotlib, scikit-image or MediaPipe is not installed.

    Examples:
        >>> clip = render_clip(0, num_frames=8, size=96)
        >>> clip.frames.shape, clip.waveform.shape
        ((8, 96, 96, 3), (23520,))
    """
    config = config or SyntheticConfig()
    plan = plan_clip(seed, photograph=photograph, num_frames=num_frames, fps=fps, config=config)
    warp = FaceWarp(
        _face(plan.photograph, faces),
        size,
        face_height=config.face_height,
        identity=_generator(plan.seed, "identity"),
        identity_strength=config.identity,
    )
    view = draw_view(
        _generator(plan.seed, "motion"),
        num_frames,
        fps,
        scale=size / warp.canvas_size,
        strength=config.motion,
        mirrored=plan.mirrored,
    )
    gains = draw_exposure(
        _generator(plan.seed, "exposure"), num_frames, fps, strength=config.exposure
    )
    # Only frames that show the face cost anything.
    shown = np.flatnonzero(~plan.hidden)
    some, some_view = torch.from_numpy(plan.intensities[shown]), view[torch.from_numpy(shown)]
    frames = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    mesh = np.full((num_frames, *warp.template.vertices.shape), np.nan, dtype=np.float32)
    if len(shown):
        frames[shown] = apply_exposure(warp.render(some, some_view), gains[shown]).numpy()
        mesh[shown] = warp.vertices(some, some_view).numpy()
    if config.occluded:
        _put_something_in_front(plan, config, frames, mesh)
    cutaway = _generator(plan.seed, "cutaway")
    for start, stop in hidden_ranges(plan.hidden):
        frames[start:stop] = draw_cutaway(cutaway, stop - start, size)
    waveform = draw_waveform(
        plan.events,
        _generator(plan.seed, "sound"),
        num_frames / fps,
        sample_rate=config.sample_rate,
        noise=config.background_noise,
    )
    return SyntheticClip(
        **vars(plan), frames=frames, mesh=mesh, waveform=waveform, sample_rate=config.sample_rate
    )


def _put_something_in_front(
    plan: ClipPlan, config: SyntheticConfig, frames: np.ndarray, mesh: np.ndarray
) -> None:
    rng = _generator(plan.seed, "occluder")
    vertex, radius = draw_occluders(
        rng,
        plan.timestamps,
        config.occluded,
        seconds=config.occluder_seconds,
        radius=config.occluder_radius,
        num_vertices=mesh.shape[1],
    )
    occlude(rng, frames, mesh, vertex, radius)


def hidden_ranges(hidden: np.ndarray) -> list[tuple[int, int]]:
    """List the runs of true values.

    Examples:
        >>> hidden_ranges(np.array([True, False, True, True]))
        [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def render_face(
    intensities: np.ndarray,
    *,
    photograph: str = "astronaut",
    size: int = DEFAULT_SIZE,
    identity_seed: int | None = None,
    face_height: float = 0.5,
    faces: Sequence[Face] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Render one still picture per row of intensities: no motion, no sound, nothing hidden.

    Args:
        intensities: `(t, 12)`, 0 to 1, in the order of `AU_NAMES`.
        photograph: A key of `PHOTOGRAPHS`.
        size: Side of the square picture in pixels, even.
        identity_seed: Draws other proportions; `None` keeps the photograph's own.
        face_height: Height of the face, forehead to chin, as a share of the picture.
        faces: What `load_faces` returned; `None` finds the meshes here.

    Returns:
        Pictures `(t, size, size, 3)` uint8 RGB and meshes `(t, 468, 2)` float32 in pixels.

    Raises:
        ValueError: If a shape or value is wrong, or there is no such photograph.
        MissingDependencyError: If matplotlib, scikit-image or MediaPipe is not installed.

    Examples:
        >>> pictures, mesh = render_face(np.eye(12), size=96)
        >>> pictures.shape, mesh.shape
        ((12, 96, 96, 3), (12, 468, 2))
    """
    check_choice("photograph", photograph, PHOTOGRAPHS)
    identity = None if identity_seed is None else np.random.default_rng(identity_seed)
    face = _face(photograph, faces)
    warp = FaceWarp(face, size, face_height=face_height, identity=identity)
    values = torch.from_numpy(np.asarray(intensities, dtype=np.float32))
    pictures = warp.render(values)
    return pictures.numpy(), warp.vertices(values).numpy()
