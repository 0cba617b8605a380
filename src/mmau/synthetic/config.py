"""How hard the synthetic data are: every knob in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mmau._checks import check_range


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Difficulty and appearance of synthetic clips.

    The defaults are meant to be honest: sound alone cannot tell the episodes apart, a picture is
    often missing, and whether the face is visible says nothing about what it does.

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
    """Seconds the face stays in the picture, drawn independently of the episodes."""
    hidden: tuple[float, float] = (2.0, 4.0)
    """Seconds the picture shows no face, drawn independently of the episodes; (0, 0) for never."""
    occluded: float = 0.0
    """Share of the time in which something covers part of the visible face."""
    occluder_seconds: tuple[float, float] = (0.8, 2.5)
    """Seconds it stays at one place of the face, drawn independently of the episodes."""
    occluder_radius: tuple[float, float] = (0.08, 0.2)
    """Its radius, as a share of the height of the face."""
    mood: tuple[float, float] = (0.0, 0.0)
    """Seconds a mood lasts; (0, 0) for none. A bell, heard once at its start, decides which of its
    two episodes every sound announces until the next bell: to know, one must remember."""
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
    """Height of the face, forehead to chin, as a share of the picture."""
    sample_rate: int = 44_100
    """Samples of sound per second, in Hz."""
    background_noise: float = 0.003
    """Standard deviation of the noise under all sounds, full scale being 1."""

    def __post_init__(self) -> None:
        for name in ("silent", "distractors", "faint", "occluded", "mirrored"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("label_threshold", self.label_threshold, 0, 1)
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
        if self.mood[1] and weights and not min(weights):
            raise ValueError(
                "`episode_weights` must all be positive where `mood` decides between two episodes; "
                f"got {weights!r}."
            )
        # A ramp of no length would divide by zero, a view of no length would never end.
        for name in ("rise", "fall", "visible", "occluder_seconds"):
            check_range(name, getattr(self, name)[0], 0, open_low=True)
