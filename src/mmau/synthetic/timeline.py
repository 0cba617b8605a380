"""When something happens in a clip: episodes of Action Units, their sounds, and the hidden frames.

Episodes and hidden stretches come from separate generators, so neither tells about the other.
Hiding exactly the episodes would leak that an AU is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmau._checks import check_range
from mmau.action_units import AU_NAMES
from mmau.synthetic.config import SyntheticConfig


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
"""Sounds that announce a mood, see `SyntheticConfig.mood`."""
CUE = "cue"
"""Kind of an event that is a bell: the start of a mood, see `SyntheticConfig.mood`."""
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


def draw_events(
    rng: np.random.Generator, duration: float, config: SyntheticConfig | None = None
) -> list[Event]:
    """Draw the events of one clip, in order of time.

    Args:
        rng: Source of all draws.
        duration: Length of the clip in seconds.
        config: The knobs; defaults if `None`.

    Returns:
        The events; the last one may outlast the clip.

    Raises:
        ValueError: If `duration` is not positive.

    Examples:
        >>> first = draw_events(np.random.default_rng(0), 10.0)[0]
        >>> first.kind, round(first.onset - first.sound_time, 2)
        ('anger', 0.26)
    """
    check_range("duration", duration, 0, open_low=True)
    config = config or SyntheticConfig()
    events = _draw_cues(rng, duration, config)
    cues = tuple(events)
    time = float(rng.uniform(*_FIRST_SOUND))
    while time < duration - _LAST_START:
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


def _draw_cues(rng: np.random.Generator, duration: float, config: SyntheticConfig) -> list[Event]:
    """Draw the moods of a clip; each is one of two, whatever the one before was."""
    cues: list[Event] = []
    time = float(rng.uniform(0.1, 0.4)) if config.mood[1] else duration
    while time < duration:
        cues.append(Event(CUE, BELLS[rng.integers(2)], time, time, 0.0, 0.0, 0.0, {}))
        time += float(rng.uniform(*config.mood))
    return cues


def _draw_kind(
    rng: np.random.Generator, config: SyntheticConfig, cues: Sequence[Event], time: float
) -> str:
    kinds = tuple(EPISODES)
    weights = np.array(config.episode_weights or (1.0,) * len(kinds))
    past = [cue for cue in cues if cue.sound_time <= time]
    if past:
        mood = BELLS.index(str(past[-1].sound))
        seen: list[str] = []
        for number, kind in enumerate(kinds):
            # Each sound announces two episodes; the mood says which of them it is.
            if seen.count(EPISODES[kind].sound) != mood:
                weights[number] = 0.0
            seen.append(EPISODES[kind].sound)
    if not config.episode_weights and not past:
        return kinds[rng.integers(len(kinds))]
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def intensities_at(events: Sequence[Event], times: np.ndarray) -> np.ndarray:
    r"""Compute the intensity of each AU at each time: smooth up, hold, smooth down.

    $$ i(t) = \text{peak} \cdot s(e), \quad s(e) = 3 e^2 - 2 e^3, \quad
    e = \min\left(1, \frac{t - \text{onset}}{\text{rise}}\right)
    \min\left(1, \frac{\text{end} - t}{\text{fall}}\right) $$

    and 0 outside; where episodes overlap the larger counts.

    Args:
        events: What happens.
        times: `(t,)`, seconds.

    Returns:
        `(t, 12)` float32 in [0, 1], in the order of `AU_NAMES`.

    Examples:
        >>> smile = Event("joy", "laugh", 0.0, 1.0, 0.2, 1.0, 0.4, {"AU12": 0.8})
        >>> intensities_at([smile], np.array([0.9, 1.1, 1.5, 2.4]))[:, AU_NAMES.index("AU12")]
        array([0. , 0.4, 0.8, 0.4], dtype=float32)
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


def draw_hidden(
    rng: np.random.Generator, times: np.ndarray, config: SyntheticConfig | None = None
) -> np.ndarray:
    """Draw in which frames no face is visible, without looking at the events.

    The alternation starts at a random moment long before the clip, so that the first frames are
    hidden as often as any other.

    Args:
        rng: Source of all draws.
        times: `(t,)`, seconds, ascending.
        config: The knobs `visible` and `hidden`; defaults if `None`.

    Returns:
        `(t,)` bool, true where the face is hidden.
    """
    config = config or SyntheticConfig()
    hidden = np.zeros(len(times), dtype=bool)
    if config.hidden[1] == 0 or not len(times):
        return hidden
    longest = config.visible[1] + config.hidden[1]
    now = float(times[0]) - longest * float(rng.uniform(2, 3))
    while now <= times[-1]:
        now += float(rng.uniform(*config.visible))
        until = now + float(rng.uniform(*config.hidden))
        hidden |= (times >= now) & (times < until)
        now = until
    return hidden
