"""Laws of the labels: what may tell what, and what may not."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.action_units import AU_NAMES
from mmau.synthetic import EPISODES, SyntheticConfig
from mmau.synthetic.clips import _STREAMS, _generator, hidden_ranges, plan_clip
from mmau.synthetic.timeline import DISTRACTOR, Event, draw_events, draw_hidden, intensities_at

SEEDS = st.integers(0, 2**31)


def many(count=300, **options):
    return [plan_clip(seed, **options) for seed in range(count)]


def test_each_sound_announces_exactly_two_episodes():
    sounds = [episode.sound for episode in EPISODES.values()]
    assert sorted(sounds) == ["gasp", "gasp", "laugh", "laugh", "sigh", "sigh"]
    assert {au for episode in EPISODES.values() for au in episode.aus} == set(AU_NAMES)


@given(seed=SEEDS)
def test_labels_are_the_intensities_at_the_threshold(seed):
    plan = plan_clip(seed)
    assert plan.labels.dtype == np.int8
    np.testing.assert_array_equal(plan.labels, plan.intensities >= 0.35)
    np.testing.assert_array_equal(plan.intensities, intensities_at(plan.events, plan.timestamps))


@given(seed=SEEDS, low=st.floats(0.0, 0.5), width=st.floats(0.0, 0.5))
def test_every_episode_starts_its_lead_after_its_sound(seed, low, width):
    config = SyntheticConfig(num_frames=180, lead=(low, low + width))
    for event in draw_events(np.random.default_rng(seed), config):
        if event.kind != DISTRACTOR:
            assert low - 1e-9 <= event.onset - event.sound_time <= low + width + 1e-9
            assert event.sound in (None, EPISODES[event.kind].sound)
            assert tuple(event.peaks) == EPISODES[event.kind].aus


@given(seed=SEEDS)
def test_nothing_moves_before_the_first_onset_or_outside_the_episodes(seed):
    plan = plan_clip(seed)
    episodes = [e for e in plan.events if e.peaks]
    inside = np.zeros(len(plan.timestamps), dtype=bool)
    for event in episodes:
        inside |= (plan.timestamps > event.onset) & (plan.timestamps < event.end)
    assert not plan.intensities[~inside].any()
    assert all(a.end < b.onset for a, b in pairwise(episodes))


def test_shares_are_those_of_the_options():
    plans = many()
    events = [e for p in plans for e in p.events]
    episodes = [e for e in events if e.kind != DISTRACTOR]
    assert np.mean([e.sound is None for e in episodes]) == pytest.approx(0.15, abs=0.04)
    assert (len(events) - len(episodes)) / len(episodes) == pytest.approx(0.35, abs=0.05)
    faint = [max(e.peaks.values()) < 0.35 for e in episodes]
    assert np.mean(faint) == pytest.approx(0.1, abs=0.03)
    # Below the threshold there are intensities that move the face and are labelled 0.
    values = np.concatenate([p.intensities[p.intensities > 0] for p in plans])
    assert 0.1 < (values < 0.35).mean() < 0.6
    assert all(p.labels.any() for p in plans[:5])


def test_hidden_frames_do_not_depend_on_the_events_nor_the_other_way_round():
    for seed in range(20):
        plain = plan_clip(seed)
        busy = plan_clip(seed, config=SyntheticConfig(pause=(0.1, 0.2), silent=0.9))
        open_view = plan_clip(seed, config=SyntheticConfig(hidden=(0.5, 1.0)))
        np.testing.assert_array_equal(plain.hidden, busy.hidden)
        np.testing.assert_array_equal(plain.intensities, open_view.intensities)
        assert plain.events == open_view.events != busy.events


def test_every_purpose_has_a_generator_of_its_own():
    draws = {float(_generator((7,), stream).random()) for stream in _STREAMS}
    assert len(draws) == len(_STREAMS)
    plan = plan_clip(7)
    alone = draw_hidden(_generator((7,), "hidden"), plan.timestamps, SyntheticConfig())
    np.testing.assert_array_equal(plan.hidden, alone)


def test_whether_the_face_is_hidden_says_nothing_about_any_action_unit():
    plans = many(600)
    hidden = np.stack([p.hidden for p in plans])
    labels = np.stack([p.labels for p in plans]).astype(float)
    # A clip is the unit of chance: sum within clips, then ask how far from zero the mean is.
    centred = (hidden - hidden.mean())[:, :, None] * (labels - labels.mean((0, 1)))
    per_clip = centred.sum(1)
    z = per_clip.mean(0) / (per_clip.std(0) / np.sqrt(len(plans)))
    assert np.abs(z).max() < 3.5
    # And it is stationary: the first second is hidden as often as the rest.
    assert hidden[:, :15].mean() == pytest.approx(hidden.mean(), abs=0.05)
    assert hidden.mean() == pytest.approx(3.0 / 5.25, abs=0.03)


@given(seed=SEEDS)
def test_segments_have_the_lengths_of_the_options(seed):
    times = np.arange(3000) / 100
    hidden = draw_hidden(np.random.default_rng(seed), times, SyntheticConfig())
    for mask, low, high in ((hidden, 2.0, 4.0), (~hidden, 1.5, 3.0)):
        for start, stop in hidden_ranges(mask):
            if start > 0 and stop < len(times):
                assert low - 0.011 <= (stop - start) / 100 <= high + 0.011


def test_ranges_are_the_runs_of_hidden_frames():
    assert hidden_ranges(np.array([True, False, True, True])) == [(0, 1), (2, 4)]


def test_no_hidden_segment_on_request():
    assert not plan_clip(3, config=SyntheticConfig(hidden=(0, 0))).hidden.any()


def test_the_envelope_rises_holds_and_falls():
    event = Event("joy", None, 0.0, 1.0, 0.5, 1.0, 0.5, {"AU12": 0.8})
    times = np.array([0.0, 1.0, 1.25, 1.5, 2.0, 2.5, 2.75, 3.0, 9.0])
    row = intensities_at([event], times)[:, AU_NAMES.index("AU12")]
    np.testing.assert_allclose(row, [0, 0, 0.4, 0.8, 0.8, 0.8, 0.4, 0, 0], atol=1e-6)


def test_the_same_seed_gives_the_same_plan_and_another_gives_another():
    same, other = plan_clip((1, 2)), plan_clip((1, 3))
    again = plan_clip((1, 2))
    assert same.events == again.events != other.events
    np.testing.assert_array_equal(same.hidden, again.hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"silent": 1.2}, "`silent` must be in [0, 1]; got 1.2."),
        ({"motion": -1.0}, "`motion` must be in [0, inf); got -1.0."),
        ({"peak": (0.5, 1.5)}, "`peak` must be in [0, 1]; got 1.5."),
        ({"lead": (0.6, 0.2)}, "`lead` must be (low, high) with low <= high; got (0.6, 0.2)."),
        ({"lead": (-0.6, 0.2)}, "`lead` must be in [0, inf); got -0.6."),
        ({"visible": (0.0, 1.0)}, "`visible` must be in (0, inf); got 0.0."),
        ({"face_height": 0}, "`face_height` must be in (0, 1]; got 0."),
        ({"sample_rate": 100}, "`sample_rate` must be in [8000, 96000]; got 100."),
        ({"num_frames": 0}, "`num_frames` must be in [1, inf); got 0."),
        ({"fps": 0.0}, "`fps` must be in [1, inf); got 0.0."),
        ({"size": 63}, "`size` must be an even number of pixels, at least 32; got 63."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticConfig(**options)


def test_an_unknown_photograph_and_a_negative_seed_are_refused():
    message = "`photograph` must be one of 'grace_hopper', 'astronaut'; got"
    with pytest.raises(ValueError, match=message):
        plan_clip(0, photograph="lena")
    with pytest.raises(ValueError, match=re.escape("`seed` must be in [0, inf); got -1.")):
        plan_clip(-1)
