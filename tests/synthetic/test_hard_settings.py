"""Options made for one component each: occluders, contexts, rare episodes."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmau.synthetic import EPISODES, SyntheticConfig, read_truth, render_clip, render_dataset
from mmau.synthetic.clips import plan_clip
from mmau.synthetic.timeline import BELLS, CUE, DISTRACTOR, draw_occluders
from mmau.synthetic.warp import occlude


def test_occluders_cover_the_share_they_should_and_stay_on_the_face():
    times = np.arange(6000) / 15
    config = SyntheticConfig(occluded=0.3, occluder_seconds=(1.0, 2.0), occluder_radius=(0.1, 0.2))
    vertex, radius = draw_occluders(np.random.default_rng(1), times, config, num_vertices=9)
    assert 0.25 < (vertex >= 0).mean() < 0.35
    assert set(vertex) == set(range(-1, 9))
    assert ((radius > 0) == (vertex >= 0)).all()
    assert ((radius[vertex >= 0] >= 0.1) & (radius[vertex >= 0] <= 0.2)).all()


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


def test_an_occluder_changes_images_and_nothing_else():
    config = SyntheticConfig(num_frames=20, fps=5.0, size=96, hidden=(0.0, 0.0))
    plain = render_clip(4, config)
    covered = render_clip(4, replace(config, occluded=0.8))
    np.testing.assert_array_equal(plain.labels, covered.labels)
    np.testing.assert_array_equal(plain.waveform, covered.waveform)
    np.testing.assert_array_equal(plain.mesh, covered.mesh)
    share = (plain.frames != covered.frames).any(-1).mean((1, 2))
    assert (share > 0).mean() > 0.4
    assert share.max() < 0.25


def test_within_a_context_a_sound_announces_one_episode_and_over_contexts_both():
    config = SyntheticConfig(num_frames=900, fps=10, context=(10.0, 20.0), silent=0.0)
    announced, bells = {}, Counter()
    for seed in range(20):
        context = None
        for event in plan_clip(seed, config).events:
            if event.kind == CUE:
                context = event.sound
                bells[context] += 1
            elif event.kind != DISTRACTOR:
                assert context is not None  # there is a bell before anything else
                announced.setdefault((context, event.sound), set()).add(event.kind)
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


def test_a_folder_from_before_an_option_existed_is_still_known(tmp_path):
    """It was rendered with the option's default, under the names of that time."""
    config = SyntheticConfig(num_frames=2, size=64, context=(1.0, 2.0))
    count = {"num_train": 1, "num_validation": 0}
    render_dataset(tmp_path / "data", **count, config=config)
    truth = tmp_path / "data" / "truth.json"
    before = read_truth(tmp_path / "data")["train_0000"]
    document = json.loads(truth.read_text())
    settings = document["settings"]
    settings["config"]["mood"] = settings["config"].pop("context")
    for name in ("num_frames", "fps", "size"):
        settings[name] = settings["config"].pop(name)
    truth.write_text(json.dumps(document))
    render_dataset(tmp_path / "data", **count, config=config)
    np.testing.assert_array_equal(read_truth(tmp_path / "data")["train_0000"].labels, before.labels)
    other = replace(config, size=96, context=(1.0, 3.0))
    with pytest.raises(ValueError, match=r"with other settings \(size, context\)"):
        render_dataset(tmp_path / "data", **count, config=other)
    for name in ("occluded", "mood", "episode_weights"):
        del settings["config"][name]
    truth.write_text(json.dumps(document))
    config = replace(config, context=(0.0, 0.0))
    render_dataset(tmp_path / "data", **count, config=config)
    with pytest.raises(ValueError, match=r"with other settings \(occluded\)"):
        render_dataset(tmp_path / "data", **count, config=replace(config, occluded=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"occluded": 1.5}, "`occluded` must be in"),
        ({"occluder_seconds": (0.0, 1.0)}, "`occluder_seconds` must be in"),
        ({"context": (9.0, 3.0)}, r"`context` must be \(low, high\) with low <= high"),
        ({"episode_weights": (1.0, 2.0)}, "`episode_weights` must be empty or six numbers"),
        ({"episode_weights": (-1.0, 2.0, 1, 1, 1, 1)}, "none negative and not all 0"),
        (
            {"episode_weights": (0.0, 1, 1, 1, 1, 1), "context": (1.0, 2.0)},
            "must all be positive where `context` decides",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**options)
