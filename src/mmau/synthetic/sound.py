"""Three synthesised sounds, and the sound track of a clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmau._checks import check_choice
from mmau.synthetic.timeline import BELLS, Event, SyntheticConfig

SOUNDS = ("gasp", "laugh", "sigh")
"""Names of the sounds; caricatures of noises people make, without words."""


def _band_noise(
    rng: np.random.Generator, length: int, sample_rate: int, low: float, high: float
) -> np.ndarray:
    """White noise with soft band limits in Hz, scaled to a peak of 1."""
    frequencies = np.fft.rfftfreq(length, 1 / sample_rate)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum /= 1 + (low / np.maximum(frequencies, 1.0)) ** 4
    spectrum /= 1 + (frequencies / high) ** 4
    noise: np.ndarray = np.fft.irfft(spectrum, length)
    return np.asarray(noise / (np.abs(noise).max() + 1e-9))


def make_sound(kind: str, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Synthesise one sound."""
    check_choice("kind", kind, (*SOUNDS, *BELLS))
    seconds = {"gasp": 0.35, "laugh": 1.0, "sigh": 0.8}.get(kind, 1.0)
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    if kind in BELLS:
        pitch = {"low bell": 700.0, "high bell": 2000.0}[kind] * rng.uniform(0.97, 1.03)
        return np.asarray(0.5 * np.sin(2 * np.pi * pitch * time) * np.exp(-time / 0.4))
    if kind == "gasp":
        noise = _band_noise(rng, len(time), sample_rate, 900, min(6000, sample_rate * 0.4))
        return 0.5 * noise * (time / seconds) ** 1.5
    if kind == "sigh":
        noise = _band_noise(rng, len(time), sample_rate, 200, 1800)
        return 0.5 * noise * np.minimum(time / 0.08, 1) * np.exp(-time / 0.3)
    phase = 2 * np.pi * np.cumsum(250 * 2 ** (-0.3 * time)) / sample_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 7)) / 2
    syllables = np.sin(2 * np.pi * 5 * time) > 0.1
    laugh: np.ndarray = 0.4 * voice * syllables * np.exp(-time / 1.2)
    return laugh


def draw_waveform(
    events: Sequence[Event], rng: np.random.Generator, config: SyntheticConfig
) -> np.ndarray:
    """Render the sound track: the sound of each event at its time, over faint noise."""
    rate = config.sample_rate
    waveform = config.background_noise * rng.standard_normal(round(config.duration * rate))
    for event in events:
        if event.sound is None:
            continue
        sound = make_sound(event.sound, rng, rate) * rng.uniform(0.6, 1.0)
        start = round(event.sound_time * rate)
        stop = min(start + len(sound), len(waveform))
        if start < stop:
            waveform[start:stop] += sound[: stop - start]
    return np.clip(waveform, -1, 1).astype(np.float32)
