"""Knobs made for one component each: something in front of the face, moods, rare episodes."""

import json
from collections import Counter

import numpy as np
import pytest

from mmau.synthetic import EPISODES, SyntheticConfig, plan_clip, render_clip, render_dataset
from mmau.synthetic.occlusion import draw_occluders, occlude
from mmau.synthetic.timeline import BELLS, CUE, DISTRACTOR


def test_occluders_cover_the_share_they_should_and_stay_on_the_face():
    times = np.arange(6000) / 15
    vertex, radius = draw_occluders(
        np.random.default_rng(1), times, 0.3, seconds=(1.0, 2.0), radius=(0.1, 0.2), num_vertices=9
    )
    assert 0.25 < (vertex >= 0).mean() < 0.35
    assert set(vertex) == set(range(-1, 9))
    assert ((radius > 0) == (vertex >= 0)).all()
    assert ((radius[vertex >= 0] >= 0.1) & (radius[vertex >= 0] <= 0.2)).all()
    with pytest.raises(ValueError, match="`share` must be in"):
        draw_occluders(
            np.random.default_rng(0), times, 1.5, seconds=(1, 2), radius=(0.1, 0.2), num_vertices=9
        )


def test_only_pixels_under_the_occluder_change():
    frames = np.full((3, 40, 40, 3), 100, np.uint8)
    mesh = np.zeros((3, 2, 2), np.float32)
    mesh[:, 0], mesh[:, 1] = (20, 10), (20, 30)  # x, y; the face is 20 pixels high
    mesh[2] = np.nan
    occlude(
        np.random.default_rng(0), frames, mesh, np.array([0, -1, 0]), np.array([0.25, 0.0, 0.25])
    )
    changed = (frames != 100).any(-1)
    rows, columns = np.mgrid[0:40, 0:40]
    under = (columns - 20) ** 2 + (rows - 10) ** 2 <= 5**2
    assert not changed[0][~under].any()
    assert changed[0][under].mean() > 0.9  # a texture may have a pixel of the same grey
    assert not changed[1:].any()


def test_an_occluder_changes_pictures_and_nothing_else():
    settings = {"num_frames": 20, "fps": 5.0, "size": 96}
    plain = render_clip(4, config=SyntheticConfig(hidden=(0.0, 0.0)), **settings)
    covered = render_clip(4, config=SyntheticConfig(hidden=(0.0, 0.0), occluded=0.8), **settings)
    np.testing.assert_array_equal(plain.labels, covered.labels)
    np.testing.assert_array_equal(plain.waveform, covered.waveform)
    np.testing.assert_array_equal(plain.mesh, covered.mesh)
    share = (plain.frames != covered.frames).any(-1).mean((1, 2))
    assert (share > 0).mean() > 0.4
    assert share.max() < 0.25


def test_within_a_mood_a_sound_announces_one_episode_and_over_moods_both():
    config = SyntheticConfig(mood=(10.0, 20.0), silent=0.0)
    announced, bells = {}, Counter()
    for seed in range(20):
        mood = None
        for event in plan_clip(seed, num_frames=900, fps=10, config=config).events:
            if event.kind == CUE:
                mood = event.sound
                bells[mood] += 1
            elif event.kind != DISTRACTOR:
                assert mood is not None  # there is a bell before anything else
                announced.setdefault((mood, event.sound), set()).add(event.kind)
    assert set(bells) == set(BELLS)
    assert min(bells.values()) > 0.3 * max(bells.values())
    assert all(len(kinds) == 1 for kinds in announced.values())
    assert {kind for kinds in announced.values() for kind in kinds} == set(EPISODES)
    assert len(announced) == 6


def test_weights_decide_how_often_an_episode_occurs():
    config = SyntheticConfig(episode_weights=(0.5, 0.3, 0.2, 0.0, 0.0, 0.0))
    kinds = Counter(
        event.kind
        for seed in range(150)
        for event in plan_clip(seed, config=config).events
        if event.kind != DISTRACTOR
    )
    total = sum(kinds.values())
    shares = [kinds[kind] / total for kind in EPISODES]
    np.testing.assert_allclose(shares, config.episode_weights, atol=0.06)


def test_a_folder_from_before_a_knob_existed_is_still_known(tmp_path):
    """It was rendered with what is now the knob's default."""
    size = {"num_train": 1, "num_validation": 0, "num_frames": 2, "size": 64}
    render_dataset(tmp_path / "data", **size)
    truth = tmp_path / "data" / "truth.json"
    document = json.loads(truth.read_text())
    for name in ("occluded", "mood", "episode_weights"):
        del document["settings"]["config"][name]
    truth.write_text(json.dumps(document))
    render_dataset(tmp_path / "data", **size)
    with pytest.raises(ValueError, match=r"with other settings \(config\)"):
        render_dataset(tmp_path / "data", config=SyntheticConfig(occluded=0.1), **size)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"occluded": 1.5}, "`occluded` must be in"),
        ({"occluder_seconds": (0.0, 1.0)}, "`occluder_seconds` must be in"),
        ({"mood": (9.0, 3.0)}, r"`mood` must be \(low, high\) with low <= high"),
        ({"episode_weights": (1.0, 2.0)}, "`episode_weights` must be empty or six numbers"),
        ({"episode_weights": (-1.0, 2.0, 1, 1, 1, 1)}, "none negative and not all 0"),
        (
            {"episode_weights": (0.0, 1, 1, 1, 1, 1), "mood": (1.0, 2.0)},
            "must all be positive where `mood` decides",
        ),
    ],
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**knobs)
