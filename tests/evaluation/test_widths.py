import pytest
import torch
from torch.testing import assert_close

from mmau.evaluation import (
    AUCounts,
    ScoreHistogram,
    choose_widths,
    cross_fitted_smoothing,
    cross_fitted_thresholds,
    smooth,
)
from mmau.evaluation.thresholds import deal_folds

WIDTHS = (0.0, 0.3, 1.5)


def make_videos(count=7, frames=300, seed=0):
    """Two Action Units: one slow under much noise, one fast and clear."""
    generator = torch.Generator().manual_seed(seed)
    probs, targets, times = {}, {}, {}
    for i in range(count):
        frame = torch.arange(frames)
        slow = (frame + 37 * i) // 60 % 2
        fast = (frame + 5 * i) // 3 % 2
        target = torch.stack([slow, fast], -1)
        noise = torch.rand(frames, 2, generator=generator) - 0.5
        size = torch.tensor([0.9, 0.3])
        probs[f"v{i}"] = (0.5 + 0.2 * (2 * target - 1) + size * noise).clamp(0, 1)
        targets[f"v{i}"] = target
        times[f"v{i}"] = frame.double() / 30
    return probs, targets, times


def test_a_slow_action_unit_gets_a_wide_window_and_a_fast_one_none():
    probs, targets, times = make_videos()
    for kind in ("mean", "median"):
        chosen = choose_widths(probs, targets, times, widths=WIDTHS, kind=kind)
        assert chosen[0] >= 0.3
        assert chosen[1] == 0
    frames = choose_widths(probs, targets, times, widths=(9, 0, 45), unit="frames")
    assert frames[0] >= 9


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_an_exhaustive_search(seed):
    """Noise, so that a threshold tuned on the fold that it scores would choose differently."""
    torch.manual_seed(seed)
    names = [f"v{i}" for i in range(4)]
    times = {name: torch.arange(30, dtype=torch.float64) / 30 for name in names}
    targets = {name: (torch.rand(30, 12) < 0.2).long() for name in names}
    probs = {name: (0.5 * torch.rand(30, 12) + 0.1 * targets[name]) for name in names}
    fold_of = deal_folds(names, names, None, num_folds=3, seed=0)
    scores = []
    for width in WIDTHS:
        smoothed = {name: smooth(probs[name], times[name], width) for name in names}
        counts = AUCounts(12)
        for fold in range(3):
            others = ScoreHistogram(12)
            for name in names:
                if fold_of[name] != fold:
                    others.update(smoothed[name], targets[name])
            for name in names:
                if fold_of[name] == fold:
                    counts.update(smoothed[name], targets[name], others.best_thresholds())
        scores.append(counts.f1())
    best = torch.tensor(WIDTHS).double()[torch.stack(scores).argmax(0)]
    chosen = choose_widths(probs, targets, times, widths=WIDTHS, num_folds=3, shrinkage=0)
    assert_close(chosen, best)


def test_a_video_that_wants_another_width_does_not_get_its_way():
    """Four clear videos want no smoothing; one long, slow and noisy one outweighs them."""
    slow, slow_target, slow_times = make_videos(count=1, frames=6000, seed=1)
    probs, targets, times = make_videos(count=4)
    probs = {name: prob[:, [1]] for name, prob in probs.items()} | {"long": slow["v0"][:, [0]]}
    targets = {name: one[:, [1]] for name, one in targets.items()}
    targets["long"], times["long"] = slow_target["v0"][:, [0]], slow_times["v0"]
    assert choose_widths(probs, targets, times, widths=WIDTHS, num_folds=9)[0] > 0
    found = cross_fitted_smoothing(probs, targets, times, widths=WIDTHS, num_folds=9)
    assert found.widths["long"] == 0
    assert all(found.widths[name] > 0 for name in probs if name != "long")


@pytest.mark.parametrize("num_folds", [2, 4])
def test_a_video_never_helps_to_choose_its_own_width_or_threshold(num_folds):
    """Poison one video after the other: what is chosen for it must not notice."""
    probs, targets, times = make_videos(count=5)
    groups = {"v0": "x", "v1": "x", "v2": "y", "v3": "z", "v4": "w"}

    def chosen(p, t):
        return cross_fitted_smoothing(
            p, t, times, widths=WIDTHS, groups=groups, num_folds=num_folds
        )

    clean = chosen(probs, targets)
    someone_noticed = False
    for name in probs:
        mates = [other for other in probs if groups[other] == groups[name]]
        poisoned = chosen(
            {**probs, **{m: probs[m].flip(0) for m in mates}},
            {**targets, **{m: 1 - targets[m] for m in mates}},
        )
        for mate in mates:
            assert torch.equal(poisoned.thresholds[mate], clean.thresholds[mate])
            assert torch.equal(poisoned.widths[mate], clean.widths[mate])
        someone_noticed |= any(
            not torch.equal(poisoned.thresholds[n], clean.thresholds[n]) for n in probs
        )
    assert someone_noticed


def test_what_is_returned_fits_together():
    probs, targets, times = make_videos()
    found = cross_fitted_smoothing(probs, targets, times, widths=WIDTHS)
    assert list(found.prob) == list(found.widths) == list(probs)
    for name in probs:
        assert torch.equal(found.prob[name], smooth(probs[name], times[name], found.widths[name]))
        assert torch.equal(found.decisions[name], found.prob[name] >= found.thresholds[name])
    plain = cross_fitted_thresholds(probs, targets)
    alone = cross_fitted_smoothing(probs, targets, times, widths=[0.0])
    for name in probs:
        assert torch.equal(alone.prob[name], probs[name])
        assert torch.equal(alone.thresholds[name], plain[name])


def test_smoothing_gains_on_held_out_videos_where_there_is_something_to_gain():
    probs, targets, times = make_videos()
    plain, smoothed = AUCounts(2), AUCounts(2)
    thresholds = cross_fitted_thresholds(probs, targets)
    found = cross_fitted_smoothing(probs, targets, times, widths=WIDTHS)
    for name in probs:
        plain.update(probs[name], targets[name], thresholds[name])
        smoothed.update(found.decisions[name], targets[name])
    assert smoothed.f1()[0] > plain.f1()[0] + 0.1
    assert smoothed.f1()[1] >= plain.f1()[1] - 0.01


def test_without_positives_nothing_is_smoothed_and_nan_frames_are_left_alone():
    probs, targets, times = make_videos(count=3)
    probs = {name: prob.clone() for name, prob in probs.items()}
    probs["v0"][5] = float("nan")
    targets = {
        name: torch.stack([one[:, 0], torch.zeros_like(one[:, 0])], -1)
        for name, one in targets.items()
    }
    targets["v0"][5] = -1
    found = cross_fitted_smoothing(probs, targets, times, widths=WIDTHS)
    assert all(widths[1] == 0 for widths in found.widths.values())
    assert all(threshold[1] == 0.5 for threshold in found.thresholds.values())
    assert found.prob["v0"][5].isnan().all()
    assert not found.prob["v0"][6].isnan().any()
    assert not found.decisions["v0"][5].any()


def call(**changes):
    probs, targets, times = make_videos(count=2, frames=5)
    options = {"widths": WIDTHS, **changes.pop("options", {})}
    given = {"probs": probs, "targets": targets, "timestamps": times, **changes}
    return choose_widths(given["probs"], given["targets"], given["timestamps"], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"widths": []}}, "`widths` must hold at least one width; got none"),
        ({"options": {"widths": [-1]}}, "`widths` must be in"),
        ({"options": {"widths": [4], "unit": "frames"}}, "`widths` in frames must be an odd"),
        ({"timestamps": {}}, "2 are in one of them only, such as 'v0'"),
        ({"timestamps": {"v0": torch.arange(5.0), "v1": torch.arange(4.0)}}, r"timestamps\['v1'\]"),
        ({"options": {"num_folds": 1}}, "`num_folds` must be at least 2"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
