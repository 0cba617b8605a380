"""Thresholds and smoothing windows: the best ones, and never chosen on the video they decide."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import AUCounts, FitOptions, best_thresholds, smooth
from mmau.evaluation.thresholds import (
    CrossValidation,
    best_edges,
    counts_at_edges,
    fit_thresholds,
    num_positive_groups,
    score_histogram,
    shrink_thresholds,
    split_folds,
)


def alone(names):
    """Every video is a group of its own."""
    return {name: name for name in names}


# ------------------------------------------------------------------------------- the exact search
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


# ----------------------------------------------------------------------- the search by histogram
def random_data(seed, n=80, c=3):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(n, c, generator=generator, dtype=torch.float64)
    # Scores on the edges of the bins, 0 and 1 included, as half of them.
    prob[::2] = (prob[::2] * 16).round() / 16
    return prob, torch.randint(-1, 2, (n, c), generator=generator)


@given(seed=st.integers(0, 10_000))
def test_a_histogram_counts_at_every_edge_what_the_counter_counts_there(seed):
    prob, target = random_data(seed)
    at_edges = counts_at_edges(score_histogram(prob, target, 16))
    for k in range(16):
        assert torch.equal(at_edges[:, k], AUCounts(3).update(prob, target, k / 16).counts)


@given(seed=st.integers(0, 10_000))
def test_best_edge_equals_exhaustive_search_over_edges_and_the_highest_wins(seed):
    prob, target = random_data(seed, n=15)
    found = best_edges(score_histogram(prob, target, 16), 0.3)
    for c in range(3):
        edges = torch.arange(16) / 16
        f1 = [AUCounts(1).update(prob[:, [c]], target[:, [c]], e).mean_f1() for e in edges.tolist()]
        if not bool((target[:, c] == 1).any()):
            assert found[c] == 0.3
            continue
        assert found[c] == max(e for e, score in zip(edges, f1, strict=True) if score == max(f1))


def test_1024_bins_cost_next_to_nothing_against_the_exact_search():
    positive = torch.rand(40_000, 12) < torch.linspace(0.02, 0.6, 12)
    prob = torch.sigmoid(torch.randn(40_000, 12) + 2.0 * positive - 2.0)
    target = positive.long()
    edges = best_edges(score_histogram(prob, target), 0.5)
    coarse = AUCounts().update(prob, target, edges).f1()
    exact = AUCounts().update(prob, target, best_thresholds(prob, target)).f1()
    loss = exact - coarse
    assert float(loss.min()) >= 0
    assert float(loss.max()) < 1.5e-3  # the rarest: 800 positives
    assert float(loss.mean()) < 3e-4


@given(seed=st.integers(0, 1000), cut=st.integers(0, 80))
def test_histograms_of_parts_add_up(seed, cut):
    prob, target = random_data(seed)
    parts = score_histogram(prob[:cut], target[:cut]) + score_histogram(prob[cut:], target[cut:])
    assert parts.dtype == torch.int64
    assert torch.equal(parts, score_histogram(prob, target))


# -------------------------------------------------------------------------------------- shrinkage
@given(
    threshold=st.floats(0.001, 0.999),
    default=st.floats(0.05, 0.95),
    videos=st.integers(0, 500),
    shrinkage=st.floats(0, 50),
)
def test_the_rule(threshold, default, videos, shrinkage):
    one = torch.tensor([threshold], dtype=torch.float64)
    count = torch.tensor([videos])
    options = FitOptions(default=default, shrinkage=shrinkage)
    shrunk = shrink_thresholds(one, count, options)
    if videos == 0:
        assert shrunk.item() == pytest.approx(default)
        return
    share = videos / (videos + shrinkage)
    start = torch.tensor(default, dtype=torch.float64).logit()
    assert_close(shrunk.logit(), share * one.logit() + (1 - share) * start)
    low, high = sorted([threshold, default])
    assert low - 1e-9 <= shrunk.item() <= high + 1e-9
    more = shrink_thresholds(one, count + 1, options)
    assert abs(more.item() - threshold) <= abs(shrunk.item() - threshold) + 1e-9


def test_halfway_after_as_many_videos_as_the_default_is_worth():
    thresholds = torch.tensor([0.2, 0.2, 0.0, 1.0], dtype=torch.float64)
    shrunk = shrink_thresholds(thresholds, torch.tensor([3, 300, 3, 3]), FitOptions(shrinkage=3))
    assert shrunk[0].item() == pytest.approx(1 / 3)  # odds 1/4 and 1: 1/2
    assert shrunk[1].item() == pytest.approx(0.2, abs=0.003)
    assert bool(((shrunk > 0) & (shrunk < 1)).all()), "a certain threshold never lets go"
    unshrunk = shrink_thresholds(thresholds, torch.ones(4), FitOptions(shrinkage=0))
    assert torch.equal(unshrunk, thresholds)


def test_videos_count_and_frames_do_not():
    """The same frames in one video, or in ten, or in ten trials of one video."""
    prob = torch.linspace(0, 0.4, 40)[:, None]
    target = (prob > 0.2).long()
    order = torch.arange(40).reshape(4, 10).T.flatten()  # each tenth has both labels
    prob, target = prob[order], target[order]
    options = FitOptions()
    whole = fit_thresholds({"a": prob}, {"a": target}, {"a": "a"}, options)
    tenths = dict(enumerate(prob.chunk(10))), dict(enumerate(target.chunk(10)))
    assert all(bool(part.any()) for part in tenths[1].values())
    ten = fit_thresholds(*tenths, alone(range(10)), options)
    grouped = fit_thresholds(*tenths, dict.fromkeys(range(10), "x"), options)
    best = best_thresholds(prob, target)
    assert_close(whole, shrink_thresholds(best, torch.tensor([1]), options))
    assert_close(ten, shrink_thresholds(best, torch.tensor([10]), options))
    assert_close(grouped, whole)
    assert best < ten < whole < 0.5


def test_shrinking_helps_a_rare_action_unit_on_average():
    """Two videos with a few positives choose a threshold: held out, the shrunk one does better.

    Every Action Unit is one experiment. The default is near the best threshold, 0.68; that it is
    near is the assumption on which shrinking rests.
    """
    generator = torch.Generator().manual_seed(0)

    def video(frames):
        target = (torch.rand(frames, 200, generator=generator) < 0.05).long()
        noise = 0.2 * torch.randn(frames, 200, generator=generator)
        return (0.35 + 0.3 * target + noise).clamp(0, 1), target

    prob, target = zip(video(40), video(40), strict=True)
    probs, targets = dict(enumerate(prob)), dict(enumerate(target))
    test_prob, test_target = video(4000)
    score = {}
    for shrinkage in (0.0, 2.0):
        options = FitOptions(default=0.65, shrinkage=shrinkage)
        thresholds = fit_thresholds(probs, targets, alone(probs), options)
        score[shrinkage] = AUCounts(200).update(test_prob, test_target, thresholds).mean_f1()
    assert score[2.0] > score[0.0] + 0.005


# ------------------------------------------------------------------ cross-validation of thresholds
def thresholds_of(probs, targets, groups=None, **options):
    """Thresholds of each video, chosen on others."""
    times = {name: torch.arange(len(prob)) / 30 for name, prob in probs.items()}
    chosen = FitOptions(smoothing=False, **options)
    held_out = CrossValidation(probs, targets, times, groups or alone(probs), chosen).held_out()
    assert list(held_out) == list(probs)
    for name, one in held_out.items():
        assert one.prob is probs[name]
        assert torch.equal(one.decisions, probs[name] >= one.choice.thresholds)
    return {name: one.choice.thresholds for name, one in held_out.items()}


def make_short_videos(count=7, frames=30):
    torch.manual_seed(1)
    targets = {f"v{i}": torch.randint(-1, 2, (frames, 2)) for i in range(count)}
    probs = {
        name: (torch.rand(frames, 2) * 0.6 + 0.3 * target.clamp(min=0)).clamp(0, 1)
        for name, target in targets.items()
    }
    return probs, targets


def test_thresholds_are_shrunk_by_the_videos_outside_the_fold():
    probs = {n: torch.tensor([[0.1], [0.3]]) for n in "abc"}
    targets = {n: torch.tensor([[0], [1]]) for n in "abc"}
    found = thresholds_of(probs, targets, num_folds=3, shrinkage=2)
    expected = shrink_thresholds(torch.tensor([0.2]), torch.tensor([2]), FitOptions(shrinkage=2))
    for threshold in found.values():
        assert_close(threshold, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_folds", [2, 5, 100])
def test_a_video_never_helps_to_choose_its_own_thresholds(num_folds):
    """Poison the labels and scores of one video: its own thresholds must not notice."""
    probs, targets = make_short_videos()
    clean = thresholds_of(probs, targets, num_folds=num_folds)
    some_changed = False
    for name in probs:
        poisoned_targets = {**targets, name: (targets[name] <= 0).long()}
        poisoned_probs = {**probs, name: 1 - probs[name]}
        poisoned = thresholds_of(poisoned_probs, poisoned_targets, num_folds=num_folds)
        assert torch.equal(poisoned[name], clean[name])
        some_changed |= any(not torch.equal(poisoned[n], clean[n]) for n in probs)
    assert some_changed


def test_trials_of_one_video_stay_together():
    probs, targets = make_short_videos(6)
    groups = {"v0": "x", "v1": "x", "v2": "y", "v3": "y", "v4": "z", "v5": "z"}
    clean = thresholds_of(probs, targets, groups, num_folds=3)
    poisoned = thresholds_of(
        probs, {**targets, "v1": 1 - targets["v1"].clamp(min=0)}, groups, num_folds=3
    )
    assert torch.equal(poisoned["v0"], clean["v0"])
    assert not torch.equal(poisoned["v4"], clean["v4"])


def test_folds_depend_on_seed_and_names_not_on_the_order_of_the_mapping():
    probs, targets = make_short_videos()
    backwards = dict(reversed(probs.items()))
    forwards = thresholds_of(probs, targets)
    for name, threshold in thresholds_of(backwards, targets).items():
        assert torch.equal(threshold, forwards[name])
    names = alone(map(str, range(50)))
    assert split_folds(names, FitOptions(seed=0)) == split_folds(names, FitOptions(seed=0))
    assert split_folds(names, FitOptions(seed=0)) != split_folds(names, FitOptions(seed=1))


def test_tuning_on_the_scored_videos_is_optimistic_on_pure_noise():
    torch.manual_seed(0)
    targets = {str(i): (torch.rand(8, 12) < 0.2).long() for i in range(6)}
    probs = {name: torch.rand(8, 12) for name in targets}
    honest, tuned = AUCounts(), AUCounts()
    thresholds = thresholds_of(probs, targets)
    best = best_thresholds(torch.cat([*probs.values()]), torch.cat([*targets.values()]))
    for name in probs:
        honest.update(probs[name], targets[name], thresholds[name])
        tuned.update(probs[name], targets[name], best)
    assert tuned.mean_f1() > honest.mean_f1() + 0.02


# -------------------------------------------------------------------- cross-validation of windows
WINDOWS = (0.0, 0.3, 1.5)


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


def validation(probs, targets, times, groups=None, **options):
    options = FitOptions(**{"windows": WINDOWS, **options})
    return CrossValidation(probs, targets, times, groups or alone(probs), options)


def choose_windows(*videos, **options):
    """Windows chosen on all videos."""
    found = validation(*videos, **options)
    return found.fit(found.folds).windows


def test_a_slow_action_unit_gets_a_wide_window_and_a_fast_one_none():
    videos = make_videos()
    for kind in ("mean", "median"):
        chosen = choose_windows(*videos, smoothing_kind=kind)
        assert chosen[0] >= 0.3
        assert chosen[1] == 0
    frames = choose_windows(*videos, windows=(9, 0, 45), smoothing_unit="frames")
    assert frames[0] >= 9


@pytest.mark.parametrize("shrinkage", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_an_exhaustive_search(seed, shrinkage):
    """Noise, so that a threshold tuned on the fold that it scores would choose differently."""
    torch.manual_seed(seed)
    names = [f"v{i}" for i in range(4)]
    times = {name: torch.arange(30, dtype=torch.float64) / 30 for name in names}
    targets = {name: (torch.rand(30, 12) < 0.2).long() for name in names}
    probs = {name: (0.5 * torch.rand(30, 12) + 0.1 * targets[name]) for name in names}
    options = FitOptions(num_folds=3, shrinkage=shrinkage)
    fold_of = split_folds(alone(names), options)
    scores = []
    for window in WINDOWS:
        smoothed = {name: smooth(probs[name], times[name], window) for name in names}
        counts = AUCounts(12)
        for fold in range(3):
            others = [name for name in names if fold_of[name] != fold]
            histogram = sum(score_histogram(smoothed[name], targets[name]) for name in others)
            occurs = num_positive_groups(others, targets, alone(names))
            threshold = shrink_thresholds(best_edges(histogram, 0.5), occurs, options)
            edge = (1024 * threshold).round() / 1024
            for name in set(names) - set(others):
                counts.update(smoothed[name], targets[name], edge)
        scores.append(counts.f1())
    best = torch.tensor(WINDOWS).double()[torch.stack(scores).argmax(0)]
    chosen = choose_windows(probs, targets, times, num_folds=3, shrinkage=shrinkage)
    assert_close(chosen, best)


def test_a_video_that_wants_another_window_does_not_get_it():
    """Four clear videos want no smoothing; one long, slow and noisy one outweighs them."""
    slow, slow_target, slow_times = make_videos(count=1, frames=6000, seed=1)
    probs, targets, times = make_videos(count=4)
    probs = {name: prob[:, [1]] for name, prob in probs.items()} | {"long": slow["v0"][:, [0]]}
    targets = {name: one[:, [1]] for name, one in targets.items()}
    targets["long"], times["long"] = slow_target["v0"][:, [0]], slow_times["v0"]
    assert choose_windows(probs, targets, times, num_folds=9)[0] > 0
    found = validation(probs, targets, times, num_folds=9).held_out()
    assert found["long"].choice.windows == 0
    assert all(found[name].choice.windows > 0 for name in probs if name != "long")


@pytest.mark.parametrize("num_folds", [2, 4])
def test_a_video_never_helps_to_choose_its_own_window_or_threshold(num_folds):
    """Poison one video after the other: what is chosen for it must not notice."""
    probs, targets, times = make_videos(count=5)
    groups = {"v0": "x", "v1": "x", "v2": "y", "v3": "z", "v4": "w"}

    def chosen(p, t):
        found = validation(p, t, times, groups, num_folds=num_folds).held_out()
        return {name: one.choice for name, one in found.items()}

    clean = chosen(probs, targets)
    some_changed = False
    for name in probs:
        mates = [other for other in probs if groups[other] == groups[name]]
        poisoned = chosen(
            {**probs, **{m: probs[m].flip(0) for m in mates}},
            {**targets, **{m: 1 - targets[m] for m in mates}},
        )
        for mate in mates:
            assert torch.equal(poisoned[mate].thresholds, clean[mate].thresholds)
            assert torch.equal(poisoned[mate].windows, clean[mate].windows)
        some_changed |= any(
            not torch.equal(poisoned[n].thresholds, clean[n].thresholds) for n in probs
        )
    assert some_changed


def test_what_is_returned_fits_together():
    probs, targets, times = make_videos()
    found = validation(probs, targets, times).held_out()
    assert list(found) == list(probs)
    for name, one in found.items():
        assert torch.equal(one.prob, smooth(probs[name], times[name], one.choice.windows))
        assert torch.equal(one.decisions, one.prob >= one.choice.thresholds)
    plain = thresholds_of(probs, targets)
    unsmoothed = validation(probs, targets, times, windows=[0.0]).held_out()
    for name in probs:
        assert torch.equal(unsmoothed[name].prob, probs[name])
        assert torch.equal(unsmoothed[name].choice.thresholds, plain[name])


def test_smoothing_gains_on_held_out_videos_where_there_is_something_to_gain():
    probs, targets, times = make_videos()
    plain, smoothed = AUCounts(2), AUCounts(2)
    thresholds = thresholds_of(probs, targets)
    found = validation(probs, targets, times).held_out()
    for name in probs:
        plain.update(probs[name], targets[name], thresholds[name])
        smoothed.update(found[name].decisions, targets[name])
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
    found = validation(probs, targets, times).held_out()
    assert all(one.choice.windows[1] == 0 for one in found.values())
    assert all(one.choice.thresholds[1] == 0.5 for one in found.values())
    assert found["v0"].prob[5].isnan().all()
    assert not found["v0"].prob[6].isnan().any()
    assert not found["v0"].decisions[5].any()


# ----------------------------------------------------------------------------------------- errors
ONE = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_thresholds(ONE, ONE[:1]), "must have the same shape"),
        (lambda: best_thresholds(ONE, ONE * 9), "`target` must be 0 or 1, or -1 or NaN"),
        (lambda: best_thresholds(ONE * 1.5, ONE), r"`prob` must be in \[0, 1\]; got values from"),
        (lambda: best_thresholds(ONE * float("nan"), ONE), "`prob` is NaN at 2 of 2 labelled"),
        (lambda: best_thresholds(ONE, ONE, default=2), "`default` must be in"),
        (lambda: split_folds({"a": "a"}, FitOptions()), "at least 2 videos or groups; got 1"),
        (lambda: FitOptions(num_folds=1), r"`num_folds` must be in \[2, .*; got 1"),
        (lambda: FitOptions(default=1), r"`default` must be in \(0, 1"),
        (lambda: FitOptions(shrinkage=-1), "`shrinkage` must be in"),
        (lambda: FitOptions(max_gap=0), "`max_gap` must be in"),
        (lambda: FitOptions(windows=()), "`windows` must hold at least one smoothing window"),
        (lambda: FitOptions(windows=[-1]), "`windows` must be in"),
        (
            lambda: FitOptions(windows=[4], smoothing_unit="frames"),
            "`windows` in frames must be an odd",
        ),
        (lambda: FitOptions(smoothing_kind="mode"), "`smoothing_kind` must be one of"),
        (lambda: FitOptions(smoothing_unit="ms"), "`smoothing_unit` must be one of"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
