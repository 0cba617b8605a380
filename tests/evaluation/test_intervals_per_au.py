import numpy as np
import pytest
import torch

from mmau.evaluation import AUCounts, bootstrap_by_video, bootstrap_per_au_by_video


def videos(seed, count, occurs):
    """Every video has the first Action Unit; a share of them the second."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        counts = AUCounts(["AU1", "AU2"])
        hits = rng.binomial(50, rng.beta(3, 3), 2)
        rows = [[tp, 50 - tp, 50 - tp, 200] for tp in hits]
        rows[1] = rows[1] if i < occurs * count else [0, 5, 0, 250]
        counts.counts += torch.tensor(rows)
        made.append(counts)
    return made


def test_one_action_unit_gives_the_interval_of_the_mean():
    many = videos(0, 20, 1.0)
    single = []
    for video in many:
        counts = AUCounts(["AU1"])
        counts.counts += video.counts[:1]
        single.append(counts)
    assert bootstrap_per_au_by_video(single)["AU1"] == bootstrap_by_video(single)
    assert bootstrap_per_au_by_video(many)["AU1"] == bootstrap_by_video(single)


def test_a_rare_action_unit_is_less_certain_however_many_frames_there_are():
    found = bootstrap_per_au_by_video(videos(1, 60, 0.1))
    width = {name: one.high - one.low for name, one in found.items()}
    assert width["AU2"] > 2 * width["AU1"]


def test_an_action_unit_without_positives_has_no_interval():
    found = bootstrap_per_au_by_video(videos(0, 5, 0.0))
    assert np.isnan([found["AU2"].estimate, found["AU2"].low, found["AU2"].high]).all()
    with pytest.raises(ValueError, match="needs at least 2 videos; got 1"):
        bootstrap_per_au_by_video(videos(0, 1, 1.0))
