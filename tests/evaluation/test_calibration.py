import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import (
    AUCounts,
    Calibration,
    best_thresholds,
    cross_fitted_predictions,
    cross_fitted_thresholds,
    smooth,
)


# -------------------------------------------------------------------------------------- thresholds
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 40), digits=st.sampled_from([1, 2, 6]))
def test_search_equals_exhaustive_search(seed, rows, digits):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(rows, 3, generator=generator).round(decimals=digits)
    target = torch.randint(-1, 2, (rows, 3), generator=generator)
    target[0] = 1
    found = AUCounts(3).update(prob, target, best_thresholds(prob, target)).f1()
    best = torch.zeros(3, dtype=torch.float64)
    for threshold in prob.double().flatten().unique():
        best = torch.maximum(best, AUCounts(3).update(prob, target, threshold).f1())
    assert torch.equal(found, best)


@pytest.mark.parametrize("low", [0.3, 0.30000000000000004])  # the middle rounds up, and down
def test_scores_one_float_apart_are_still_separated(low):
    low = torch.tensor(low, dtype=torch.float64)
    high = torch.nextafter(low, torch.tensor(1.0, dtype=torch.float64))
    prob, target = torch.stack([low, high])[:, None], torch.tensor([[0], [1]])
    assert AUCounts(1).update(prob, target, best_thresholds(prob, target)).mean_f1() == 1.0


def test_action_units_without_positives_keep_the_default():
    prob, target = torch.rand(5, 2), torch.tensor([[0, -1]]).repeat(5, 1)
    assert best_thresholds(prob, target, default=0.4).tolist() == [0.4, 0.4]
    assert best_thresholds(prob[:0], target[:0]).tolist() == [0.5, 0.5]


# ----------------------------------------------------------------------------------- cross-fitting
def make_videos(count=7, frames=30):
    torch.manual_seed(1)
    targets = {f"v{i}": torch.randint(-1, 2, (frames, 2)) for i in range(count)}
    probs = {
        name: (torch.rand(frames, 2) * 0.6 + 0.3 * target.clamp(min=0)).clamp(0, 1)
        for name, target in targets.items()
    }
    return probs, targets


@pytest.mark.parametrize("num_folds", [2, 5, 100])
def test_a_video_never_helps_to_choose_its_own_thresholds(num_folds):
    """Poison the labels and scores of one video: its own thresholds must not notice."""
    probs, targets = make_videos()
    clean = cross_fitted_thresholds(probs, targets, num_folds=num_folds)
    someone_noticed = False
    for name in probs:
        poisoned_targets = {**targets, name: (targets[name] <= 0).long()}
        poisoned_probs = {**probs, name: 1 - probs[name]}
        poisoned = cross_fitted_thresholds(poisoned_probs, poisoned_targets, num_folds=num_folds)
        assert torch.equal(poisoned[name], clean[name])
        someone_noticed |= any(not torch.equal(poisoned[n], clean[n]) for n in probs)
    assert someone_noticed


def test_trials_of_one_video_stay_together():
    probs, targets = make_videos(6)
    groups = {"v0": "x", "v1": "x", "v2": "y", "v3": "y", "v4": "z", "v5": "z"}
    clean = cross_fitted_thresholds(probs, targets, groups=groups, num_folds=3)
    poisoned = cross_fitted_thresholds(
        probs, {**targets, "v1": 1 - targets["v1"].clamp(min=0)}, groups=groups, num_folds=3
    )
    assert torch.equal(poisoned["v0"], clean["v0"])
    assert not torch.equal(poisoned["v4"], clean["v4"])


def test_decisions_are_those_of_the_cross_fitted_thresholds():
    probs, targets = make_videos()
    thresholds = cross_fitted_thresholds(probs, targets, seed=3)
    decided = cross_fitted_predictions(probs, targets, seed=3)
    assert list(decided) == list(probs)
    by_threshold, by_decision = AUCounts(2), AUCounts(2)
    for name in probs:
        by_threshold.update(probs[name], targets[name], thresholds[name])
        by_decision.update(decided[name], targets[name])
    assert torch.equal(by_threshold.counts, by_decision.counts)


def test_folds_depend_on_seed_and_names_not_on_the_order_of_the_mapping():
    probs, targets = make_videos()
    backwards = dict(reversed(probs.items()))
    forwards = cross_fitted_thresholds(probs, targets)
    for name, threshold in cross_fitted_thresholds(backwards, targets).items():
        assert torch.equal(threshold, forwards[name])


def test_tuning_on_the_scored_videos_is_optimistic_on_pure_noise():
    torch.manual_seed(0)
    targets = {str(i): (torch.rand(8, 12) < 0.2).long() for i in range(6)}
    probs = {name: torch.rand(8, 12) for name in targets}
    honest, tuned = AUCounts(), AUCounts()
    decided = cross_fitted_predictions(probs, targets)
    best = best_thresholds(torch.cat([*probs.values()]), torch.cat([*targets.values()]))
    for name in probs:
        honest.update(decided[name], targets[name])
        tuned.update(probs[name], targets[name], best)
    assert tuned.mean_f1() > honest.mean_f1() + 0.02


# --------------------------------------------------------------------------------------- smoothing
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 30),
    widths=st.lists(st.sampled_from([0.0, 0.05, 0.3, 2.0]), min_size=2, max_size=2),
)
def test_smoothing_is_the_mean_of_the_neighbours_in_the_same_stretch(seed, frames, widths):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(frames, 2, generator=generator, dtype=torch.float64)
    steps = torch.tensor([0.04, 0.1, 0.9])
    times = steps[torch.randint(0, 3, (frames,), generator=generator)].double().cumsum(0)
    valid = torch.rand(frames, generator=generator) < 0.8
    result = smooth(prob, times, widths, valid=valid, max_gap=0.5)
    stretch = [0] * frames
    for i in range(1, frames):
        broken = not (valid[i] and valid[i - 1]) or times[i] - times[i - 1] > 0.5
        stretch[i] = stretch[i - 1] + int(broken)
    for i in range(frames):
        for c, width in enumerate(widths):
            near = [
                j
                for j in range(frames)
                if stretch[j] == stretch[i] and abs(times[j] - times[i]) <= width / 2 + 1e-6
            ]
            expected = prob[near, c].mean() if valid[i] else prob[i, c]
            assert_close(result[i, c], expected)


def test_unusable_frames_influence_nothing_even_if_nan():
    prob = torch.tensor([[0.2], [float("nan")], [0.8], [0.4]])
    valid = torch.tensor([True, False, True, True])
    result = smooth(prob, torch.arange(4.0) / 10, 1.0, valid=valid)
    assert_close(result, torch.tensor([[0.2], [float("nan")], [0.6], [0.6]]), equal_nan=True)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert_close(smooth(prob, torch.arange(4.0), 1.0, valid=nobody), prob, equal_nan=True)


# ------------------------------------------------------------------------------------------ record
def test_saved_and_loaded_is_equal_and_leaves_no_other_file(tmp_path):
    calibration = Calibration(("AU1", "AU2"), (0.25, 0.1 + 0.2), (0.0, 1.5), note="40 clips")
    path = tmp_path / "calibration.json"
    calibration.save(path)
    calibration.save(str(path))
    assert Calibration.load(path) == calibration
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    Calibration().save(path)
    before = path.read_text()

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        Calibration(note="new").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_decisions_compare_with_the_thresholds_of_their_column():
    calibration = Calibration(thresholds=[i / 12 for i in range(12)])
    decided = calibration.decide(torch.full((3, 12), 0.5))
    assert decided.tolist() == [[i / 12 <= 0.5 for i in range(12)]] * 3
    assert not calibration.decide(torch.full((12,), float("nan"))).any()


GOOD = {
    "format": "mmau.calibration/1",
    "au_names": ["AU1"],
    "thresholds": [0.5],
    "smoothing": [],
    "note": "",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a calibration"),
        ('{"format": "other"}', 'is not a calibration: it has no "format"'),
        (json.dumps({**GOOD, "treshold": 1}), "unknown key 'treshold'; did you mean 'thresholds'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "note"}), "lacks the key 'note'"),
        (
            json.dumps({**GOOD, "thresholds": 0.5}),
            "'thresholds' must be a list of numbers; got 0.5",
        ),
        (json.dumps({**GOOD, "thresholds": [2]}), r"json: `thresholds` must be in \[0, 1\]; got 2"),
        (json.dumps({**GOOD, "thresholds": [0.5, 0.5]}), "`thresholds` must be 1 numbers; got 2"),
        (json.dumps({**GOOD, "note": 3}), "'note' must be text"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such calibration file: .*nothing\.json"):
        Calibration.load(tmp_path / "nothing.json")


ONE = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Calibration(("AU1", "AU1"), (0.5, 0.5)), "`au_names` must be at least one name"),
        (lambda: Calibration(("AU1",), (0.5,), (1.0, 2.0)), "`smoothing` must be 1 widths or none"),
        (lambda: Calibration(("AU1",), (0.5,), (-1.0,)), "`smoothing` must be in"),
        (lambda: Calibration().decide(torch.ones(3)), "axis `c` of `prob` must be 12"),
        (lambda: best_thresholds(ONE, ONE[:1]), "must have the same shape"),
        (lambda: best_thresholds(ONE, ONE * 9), "`target` must be 0 or 1, or -1 or NaN"),
        (lambda: best_thresholds(ONE * 1.5, ONE), r"`prob` must be in \[0, 1\], and not NaN"),
        (lambda: best_thresholds(ONE * float("nan"), ONE), "and not NaN"),
        (lambda: best_thresholds(ONE, ONE, default=2), "`default` must be in"),
        (lambda: cross_fitted_thresholds({"a": ONE}, {"a": ONE}), "at least 2 videos or groups"),
        (lambda: cross_fitted_thresholds({"a": ONE}, {"b": ONE}), "2 are in one of them only"),
        (
            lambda: cross_fitted_thresholds({"a": ONE}, {"a": ONE}, num_folds=1),
            "`num_folds` must be at least 2; got 1",
        ),
        (
            lambda: cross_fitted_thresholds({"a": ONE}, {"a": ONE}, groups={}),
            "`groups` lacks 1 videos, such as 'a'",
        ),
        (lambda: smooth(ONE, torch.tensor([0, float("nan")]), 1.0), "`timestamps` must be finite"),
        (lambda: smooth(ONE, torch.arange(2.0), -1.0), "`width` must be in"),
        (lambda: smooth(ONE, torch.arange(2.0), 1.0, max_gap=0), "`max_gap` must be in"),
        (lambda: smooth(ONE * float("nan"), torch.arange(2.0), 1.0), "NaN in a usable frame"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_integer_mask_is_refused():
    with pytest.raises(TypeError, match="`valid` must be a bool tensor"):
        smooth(ONE, torch.arange(2.0), 1.0, valid=torch.ones(2))
