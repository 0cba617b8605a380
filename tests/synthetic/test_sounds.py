"""The sound track has the sounds where the events say."""

import numpy as np
import pytest

from mmau.synthetic.sounds import SOUNDS, draw_waveform, make_sound
from mmau.synthetic.timeline import DISTRACTOR, EPISODES, Event

RATE = 16_000


def rng():
    return np.random.default_rng(0)


def event(sound, at):
    return Event(DISTRACTOR, sound, at, at, 0.0, 0.0, 0.0, {})


@pytest.mark.parametrize("kind", SOUNDS)
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_sounds_are_finite_within_full_scale_and_short(kind, rate):
    sound = make_sound(kind, rng(), rate)
    assert np.isfinite(sound).all()
    assert 0.1 < np.abs(sound).max() <= 1
    assert 0.3 <= len(sound) / rate <= 1


def test_every_episode_has_a_sound_that_exists():
    assert {episode.sound for episode in EPISODES.values()} == set(SOUNDS)


def test_sounds_differ_in_their_spectra():
    """The centroid orders them: the sigh is a low breath, the gasp a sharp one."""
    centroid = {}
    for kind in SOUNDS:
        power = np.abs(np.fft.rfft(make_sound(kind, rng(), RATE), RATE)) ** 2
        centroid[kind] = (np.arange(len(power)) * power).sum() / power.sum()
    assert centroid["laugh"] < centroid["sigh"] < centroid["gasp"]
    assert centroid["gasp"] > 2 * centroid["sigh"]


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_sound_is_where_its_event_says_and_nowhere_else(kind):
    waveform = draw_waveform([event(kind, 1.25)], rng(), 4.0, sample_rate=RATE, noise=0.0)
    loud = np.flatnonzero(np.abs(waveform) > 1e-3) / RATE
    assert waveform.shape == (4 * RATE,)
    assert waveform.dtype == np.float32
    assert 1.25 <= loud.min() < 1.33
    assert loud.max() < 2.26


def test_silence_is_silent_and_sounds_past_the_end_are_cut():
    quiet = draw_waveform([event(None, 0.5)], rng(), 1.0, sample_rate=RATE, noise=0.0)
    assert not quiet.any()
    cut = draw_waveform([event("laugh", 0.9)], rng(), 1.0, sample_rate=RATE, noise=0.0)
    assert len(cut) == RATE
    assert cut.any()
    draw_waveform([event("laugh", 5.0)], rng(), 1.0, sample_rate=RATE)


def test_unknown_sounds_and_rates_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'gasp', 'laugh', 'sigh', 'low"):
        make_sound("cough", rng(), RATE)
    with pytest.raises(ValueError, match="`sample_rate` must be in"):
        make_sound("gasp", rng(), 100)
    with pytest.raises(ValueError, match="`duration` must be in"):
        draw_waveform([], rng(), 0.0)
