"""What happens in a clip, and when: the options, episodes of Action Units, sounds, hidden frames.

Episodes and hidden segments come from separate generators, so neither tells about the other.
Hiding exactly the episodes would leak that an AU is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mmau._checks import check_range
from mmau.action_units import AU_NAMES


def check_image_size(size: int) -> None:
    """Check the side of a square image: even, for H.264, and large enough for a face."""
    if size < 32 or size % 2:
        raise ValueError(f"`size` must be an even number of pixels, at least 32; got {size!r}.")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size, difficulty and appearance of synthetic clips.

    The defaults are meant to be honest: sound alone cannot tell the episodes apart, the face is
    often missing, and whether it is visible says nothing about what it does.

    Raises:
        ValueError: If a value is out of range or an interval is upside down.

    Examples:
        >>> SyntheticConfig().silent
        0.15
        >>> SyntheticConfig(hidden=(4.0, 2.0))
        Traceback (most recent call last):
        ...
        ValueError: `hidden` must be (low, high) with low <= high; got (4.0, 2.0).
    """

    num_frames: int = 160
    """Frames per clip."""
    fps: float = 15.0
    """Frames per second."""
    size: int = 192
    """Side of the square image in pixels, even, at least 32."""
    lead: tuple[float, float] = (0.25, 0.6)
    """Seconds from the start of a sound to the onset of its episode."""
    silent: float = 0.15
    """Share of episodes without a sound."""
    distractors: float = 0.35
    """Chance that the pause after an episode holds a sound that announces nothing."""
    pause: tuple[float, float] = (0.6, 2.0)
    """Seconds from the end of an episode to the sound of the next."""
    hold: tuple[float, float] = (0.6, 2.0)
    """Seconds an episode stays at its peak."""
    rise: tuple[float, float] = (0.12, 0.3)
    """Seconds from onset to peak."""
    fall: tuple[float, float] = (0.2, 0.5)
    """Seconds from peak to nothing."""
    peak: tuple[float, float] = (0.5, 1.0)
    """Peak intensity of an episode; each of its AUs reaches 85 to 100 % of it."""
    faint: float = 0.1
    """Share of episodes that stay below the label threshold: visible, audible, and labelled 0."""
    faint_peak: tuple[float, float] = (0.1, 0.34)
    """Peak intensity of a faint episode."""
    label_threshold: float = 0.35
    """Intensity from which an AU is labelled 1."""
    visible: tuple[float, float] = (1.5, 3.0)
    """Seconds the face stays visible, drawn independently of the episodes."""
    hidden: tuple[float, float] = (2.0, 4.0)
    """Seconds the image shows no face, drawn independently of the episodes; (0, 0) for never."""
    occluded: float = 0.0
    """Share of the time in which something covers part of the visible face."""
    occluder_seconds: tuple[float, float] = (0.8, 2.5)
    """Seconds it stays at one place of the face, drawn independently of the episodes."""
    occluder_radius: tuple[float, float] = (0.08, 0.2)
    """Its radius, as a share of the height of the face."""
    context: tuple[float, float] = (0.0, 0.0)
    """Seconds a context lasts; (0, 0) for none. A bell at its start decides which of its two
    episodes every sound announces until the next bell: the model has to remember it."""
    episode_weights: tuple[float, ...] = ()
    """How often each kind of `EPISODES` occurs, in that order; equally often if empty."""
    identity: float = 1.0
    """Strength of the change of proportions between clips; 0 keeps the photograph's own."""
    motion: float = 1.0
    """Strength of head and camera motion; 0 holds still."""
    exposure: float = 0.06
    """Standard deviation of the slow change of brightness, as a share."""
    mirrored: float = 0.5
    """Chance that a clip shows the photograph mirrored."""
    face_height: float = 0.5
    """Height of the face, forehead to chin, as a share of the image."""
    sample_rate: int = 44_100
    """Samples of sound per second, in Hz."""
    background_noise: float = 0.003
    """Standard deviation of the noise under all sounds, full scale being 1."""

    def __post_init__(self) -> None:
        check_range("num_frames", self.num_frames, 1)
        check_range("fps", self.fps, 1)
        check_image_size(self.size)
        for name in ("silent", "distractors", "faint", "occluded", "mirrored", "label_threshold"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("identity", "motion", "exposure", "background_noise"):
            check_range(name, getattr(self, name), 0)
        for name in ("peak", "faint_peak"):
            check_range(name, getattr(self, name)[1], 0, 1)
        check_range("face_height", self.face_height, 0, 1, open_low=True)
        check_range("sample_rate", self.sample_rate, 8000, 96_000)
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, tuple) and one.name != "episode_weights":
                if len(value) != 2 or not value[0] <= value[1]:
                    raise ValueError(
                        f"`{one.name}` must be (low, high) with low <= high; got {value!r}."
                    )
                check_range(one.name, value[0], 0)
        weights = self.episode_weights
        if weights and (len(weights) != 6 or min(weights) < 0 or not sum(weights)):
            raise ValueError(
                "`episode_weights` must be empty or six numbers, none negative and not all 0; got "
                f"{weights!r}."
            )
        if self.context[1] and weights and not min(weights):
            raise ValueError(
                "`episode_weights` must all be positive where `context` decides between two "
                f"episodes; got {weights!r}."
            )
        # A ramp of no length would divide by zero, a view of no length would never end.
        for name in ("rise", "fall", "visible", "occluder_seconds"):
            check_range(name, getattr(self, name)[0], 0, open_low=True)

    @property
    def duration(self) -> float:
        """Length of a clip in seconds."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class Episode:
    """A kind of expression and the sound that announces it."""

    sound: str
    """Name of its sound; each sound announces two episodes."""
    aus: tuple[str, ...]
    """The AUs that move."""


EPISODES: dict[str, Episode] = {
    "joy": Episode("laugh", ("AU6", "AU12", "AU25")),
    "surprise": Episode("gasp", ("AU1", "AU2", "AU25", "AU26")),
    "sadness": Episode("sigh", ("AU1", "AU4", "AU15")),
    "anger": Episode("laugh", ("AU4", "AU7", "AU23")),
    "contain": Episode("sigh", ("AU4", "AU7", "AU24")),
    "disgust": Episode("gasp", ("AU4", "AU10")),
}
"""The names are labels of AU combinations, not claims about feelings."""

BELLS = ("low bell", "high bell")
"""Sounds that announce a context, see `SyntheticConfig.context`."""
CUE = "cue"
"""Kind of an event that is a bell: the start of a context."""
DISTRACTOR = "distractor"
"""Kind of an event that is a sound and nothing else."""
_FIRST_SOUND = (0.4, 1.2)
_LAST_START = 1.5


@dataclass(frozen=True)
class Event:
    """One episode with or without a sound, or one distracting sound."""

    kind: str
    """A key of `EPISODES`, `CUE` or `DISTRACTOR`."""
    sound: str | None
    """Name of the sound, `None` if silent."""
    sound_time: float
    """Start of the sound, in seconds; where it would have started, if silent."""
    onset: float
    """Start of the movement, in seconds."""
    rise: float
    """Seconds from onset to peak."""
    hold: float
    """Seconds at the peak."""
    fall: float
    """Seconds from the peak to nothing."""
    peaks: dict[str, float]
    """AU name to peak intensity; empty for a distractor."""

    @property
    def end(self) -> float:
        """End of the movement, in seconds."""
        return self.onset + self.rise + self.hold + self.fall


def draw_events(rng: np.random.Generator, config: SyntheticConfig) -> list[Event]:
    """Draw the events of one clip, in order of time; the last one may outlast it."""
    events = _draw_cues(rng, config)
    cues = tuple(events)
    time = float(rng.uniform(*_FIRST_SOUND))
    while time < config.duration - _LAST_START:
        kind = _draw_kind(rng, config, cues, time)
        onset = time + float(rng.uniform(*config.lead))
        rise, hold, fall = (float(rng.uniform(*r)) for r in (config.rise, config.hold, config.fall))
        faint = rng.random() < config.faint
        peak = float(rng.uniform(*(config.faint_peak if faint else config.peak)))
        peaks = {au: peak * float(rng.uniform(0.85, 1.0)) for au in EPISODES[kind].aus}
        sound = None if rng.random() < config.silent else EPISODES[kind].sound
        events.append(Event(kind, sound, time, onset, rise, hold, fall, peaks))
        end = events[-1].end
        time = end + float(rng.uniform(*config.pause))
        if rng.random() < config.distractors:
            sounds = sorted({episode.sound for episode in EPISODES.values()})
            chosen = sounds[rng.integers(len(sounds))]
            at = float(rng.uniform(end, time))
            events.append(Event(DISTRACTOR, chosen, at, at, 0.0, 0.0, 0.0, {}))
    return sorted(events, key=lambda event: event.sound_time) if cues else events


def _draw_cues(rng: np.random.Generator, config: SyntheticConfig) -> list[Event]:
    """Draw the contexts of a clip; each is one of two, whatever the one before was."""
    cues: list[Event] = []
    time = float(rng.uniform(0.1, 0.4)) if config.context[1] else config.duration
    while time < config.duration:
        cues.append(Event(CUE, BELLS[rng.integers(2)], time, time, 0.0, 0.0, 0.0, {}))
        time += float(rng.uniform(*config.context))
    return cues


def _draw_kind(
    rng: np.random.Generator, config: SyntheticConfig, cues: Sequence[Event], time: float
) -> str:
    kinds = tuple(EPISODES)
    weights = np.array(config.episode_weights or (1.0,) * len(kinds))
    past = [cue for cue in cues if cue.sound_time <= time]
    if past:
        context = BELLS.index(str(past[-1].sound))
        seen: list[str] = []
        for number, kind in enumerate(kinds):
            # Each sound announces two episodes; the context says which of them it is.
            if seen.count(EPISODES[kind].sound) != context:
                weights[number] = 0.0
            seen.append(EPISODES[kind].sound)
    if not config.episode_weights and not past:
        return kinds[rng.integers(len(kinds))]
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def intensities_at(events: Sequence[Event], times: np.ndarray) -> np.ndarray:
    r"""Compute the intensity `(t, 12)` of each AU at each time: smooth up, hold, smooth down.

    $$ i(t) = \text{peak} \cdot s(e), \quad s(e) = 3 e^2 - 2 e^3, \quad
    e = \min\left(1, \frac{t - \text{onset}}{\text{rise}}\right)
    \min\left(1, \frac{\text{end} - t}{\text{fall}}\right) $$

    and 0 outside; where episodes overlap the larger counts.
    """
    intensities = np.zeros((len(times), len(AU_NAMES)), dtype=np.float32)
    for event in events:
        if not event.peaks:
            continue
        envelope = np.clip((times - event.onset) / event.rise, 0, 1)
        envelope = envelope * np.clip((event.end - times) / event.fall, 0, 1)
        envelope = envelope * envelope * (3 - 2 * envelope)
        for au, peak in event.peaks.items():
            column = AU_NAMES.index(au)
            intensities[:, column] = np.maximum(intensities[:, column], peak * envelope)
    return intensities


def draw_hidden(rng: np.random.Generator, times: np.ndarray, config: SyntheticConfig) -> np.ndarray:
    """Draw in which frames no face is visible, without looking at the events."""
    hidden = np.zeros(len(times), dtype=bool)
    if config.hidden[1] == 0:
        return hidden
    # The alternation starts at a random moment long before the clip, so that the first frames are
    # hidden as often as any other.
    longest = config.visible[1] + config.hidden[1]
    now = float(times[0]) - longest * float(rng.uniform(2, 3))
    while now <= times[-1]:
        now += float(rng.uniform(*config.visible))
        until = now + float(rng.uniform(*config.hidden))
        hidden |= (times >= now) & (times < until)
        now = until
    return hidden


def draw_occluders(
    rng: np.random.Generator, times: np.ndarray, config: SyntheticConfig, *, num_vertices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw when something covers the face, at which vertex (-1: none), and with which radius."""
    vertex, radius = np.full(len(times), -1), np.zeros(len(times))
    now = float(times[0])
    while config.occluded and now <= times[-1]:
        until = now + float(rng.uniform(*config.occluder_seconds))
        inside = (times >= now) & (times < until)
        place, drawn = int(rng.integers(num_vertices)), float(rng.uniform(*config.occluder_radius))
        if rng.random() < config.occluded:
            vertex[inside], radius[inside] = place, drawn
        now = until
    return vertex, radius
