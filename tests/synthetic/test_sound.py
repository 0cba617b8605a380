"""The sound track has the sounds where the events say."""

import numpy as np
import pytest

from mmau.synthetic import EPISODES, SyntheticConfig
from mmau.synthetic.sound import SOUNDS, draw_waveform, make_sound
from mmau.synthetic.timeline import DISTRACTOR, Event

RATE = 16_000


def rng():
    return np.random.default_rng(0)


def track(sound, at, seconds, noise=0.0):
    event = Event(DISTRACTOR, sound, at, at, 0.0, 0.0, 0.0, {})
    config = SyntheticConfig(
        num_frames=10 * seconds, fps=10, sample_rate=RATE, background_noise=noise
    )
    return draw_waveform([event], rng(), config)


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
    waveform = track(kind, 1.25, 4)
    loud = np.flatnonzero(np.abs(waveform) > 1e-3) / RATE
    assert waveform.shape == (4 * RATE,)
    assert waveform.dtype == np.float32
    assert 1.25 <= loud.min() < 1.33
    assert loud.max() < 2.26


def test_silence_is_silent_and_sounds_past_the_end_are_cut():
    quiet = track(None, 0.5, 1)
    assert not quiet.any()
    cut = track("laugh", 0.9, 1)
    assert len(cut) == RATE
    assert cut.any()
    assert track("laugh", 5.0, 1, noise=0.003).any()


def test_unknown_sounds_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'gasp', 'laugh', 'sigh', 'low"):
        make_sound("cough", rng(), RATE)
