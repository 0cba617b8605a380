"""Counts, rankings, reliability and intervals equal what other code and simulations say."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from torch.testing import assert_close

from mmau.evaluation import (
    AUCounts,
    BootstrapOptions,
    average_precision,
    bootstrap_by_video,
    calibration_error,
    paired_bootstrap_by_video,
    reliability_curve,
    trivial_baselines,
)
from mmau.evaluation.bootstrap import bootstrap_per_au_by_video
from mmau.functional import asymmetric_posterior


def random_data(seed, n=60, c=4):
    rng = np.random.default_rng(seed)
    prob = rng.random((n, c)).round(1)  # ties
    target = rng.integers(-1, 2, (n, c))
    return torch.from_numpy(prob), torch.from_numpy(target)


@given(seed=st.integers(0, 10_000))
def test_counters_equal_sklearn_on_masked_data(seed):
    prob, target = random_data(seed)
    threshold = torch.linspace(0.2, 0.8, 4)
    counts = AUCounts(4).update(prob, target, threshold)
    for c in range(4):
        known = target[:, c] >= 0
        precision, recall, f1, _ = precision_recall_fscore_support(
            target[known, c],
            prob[known, c] >= threshold[c].double(),
            average="binary",
            zero_division=np.nan,
        )
        assert_close(counts.f1()[c].item(), float(f1))
        assert_close(counts.precision()[c].item(), float(precision), equal_nan=True)
        assert_close(counts.recall()[c].item(), float(recall))
    assert_close(counts.mean_f1(), counts.f1().mean().item())


@given(seed=st.integers(0, 10_000))
def test_average_precision_equals_sklearn_on_masked_data(seed):
    prob, target = random_data(seed)
    for c, ours in enumerate(average_precision(prob, target).tolist()):
        known = target[:, c] >= 0
        assert ours == pytest.approx(average_precision_score(target[known, c], prob[known, c]))


@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_neither_cutting_nor_the_order_of_merging_matters(seed, cuts, order):
    prob, target = random_data(seed)
    edges = [0, *sorted(cuts), 60]
    parts = [AUCounts(4).update(prob[a:b], target[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = AUCounts(4)
    for part in parts:
        merged.merge(part)
    whole = AUCounts(4).update(prob, target)
    assert merged.counts.dtype == torch.int64
    assert torch.equal(merged.counts, whole.counts)


@pytest.mark.parametrize("mark", [-1.0, float("nan")])
def test_entries_without_label_do_not_count_whatever_their_probability(mark):
    prob = torch.tensor([[float("nan")], [0.9], [7.0]])
    counts = AUCounts(1).update(prob, torch.tensor([[mark], [1.0], [mark]]))
    assert counts.counts.tolist() == [[1, 0, 0, 0]]


def test_leading_axes_numpy_and_decisions_are_accepted():
    prob, target = random_data(0)
    whole = AUCounts(4).update(prob, target, 0.5)
    folded = AUCounts(4).update(prob.reshape(3, 20, 4).numpy(), target.reshape(3, 20, 4).numpy())
    decided = AUCounts(4).update(prob >= 0.5, target)
    assert torch.equal(whole.counts, folded.counts)
    assert torch.equal(whole.counts, decided.counts)


def test_an_action_unit_without_positives_has_no_score_and_is_named():
    prob = torch.tensor([[0.9, 0.9], [0.1, 0.1]])
    counts = AUCounts(["AU1", "AU2"]).update(prob, torch.tensor([[1, 0], [0, 0]]))
    assert counts.without_positives == ("AU2",)
    assert counts.f1()[1].isnan()
    assert counts.mean_f1() == 1.0
    nothing = AUCounts(["AU1"])
    assert np.isnan(nothing.mean_f1())
    assert counts.num_labelled.tolist() == [2, 2]


def test_baselines_are_what_those_predictors_score():
    target = (torch.rand(20_000, 12) < torch.linspace(0.02, 0.7, 12)).long()
    target[torch.rand(20_000, 12) < 0.2] = -1
    baselines = trivial_baselines(target)
    assert baselines.au_names[0] == "AU1"
    ones = AUCounts().update(torch.ones(target.shape), target)
    assert_close(baselines.all_ones, ones.f1())
    assert baselines.mean_all_ones == pytest.approx(ones.mean_f1())
    rate = baselines.prevalence_random
    coins = AUCounts().update(torch.rand(target.shape) < rate, target)
    assert_close(coins.f1(), rate, atol=0.03, rtol=0)
    assert baselines.mean_prevalence_random == pytest.approx(rate.mean().item())


def test_baselines_of_an_action_unit_without_positives_do_not_exist():
    baselines = trivial_baselines(torch.tensor([[1, 0], [0, 0]]), ["AU1", "AU2"])
    assert baselines.all_ones[1].isnan()
    assert baselines.prevalence_random[1].isnan()
    assert baselines.mean_prevalence_random == 0.5


# --------------------------------------------------------------------------------------- bootstrap
def videos(rng, count, skill=0.0):
    """Counts of videos that differ in difficulty: frames of one video succeed or fail together."""
    made = []
    for difficulty in rng.normal(0, 1, count):
        counts = AUCounts(1)
        hit = 1 / (1 + np.exp(difficulty - skill))
        tp = rng.binomial(100, hit)
        counts.counts += torch.tensor([[tp, 100 - tp, 100 - tp, 200]])
        made.append(counts)
    return made


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.5  # hits are symmetric around one half, and F1 = pooled hit rate here
    inside = 0
    for repeat in range(200):
        interval = bootstrap_by_video(videos(rng, 30), BootstrapOptions(300, seed=repeat))
        assert interval.low <= interval.estimate <= interval.high
        inside += interval.low <= truth <= interval.high
    # 95 % minus the known shortfall of percentiles at 30 videos; frames would give about 35 %.
    assert 0.89 <= inside / 200 <= 0.98


def test_resampling_frames_would_be_far_too_narrow():
    rng = np.random.default_rng(0)
    by_video = bootstrap_by_video(videos(rng, 40))
    binomial = 2 * 1.96 * (0.25 / 4000) ** 0.5
    assert by_video.high - by_video.low > 3 * binomial


def test_the_paired_interval_uses_that_both_systems_saw_the_same_videos():
    rng = np.random.default_rng(3)
    worse = videos(rng, 40)
    better = []
    for counts in worse:
        made = AUCounts(1)
        gain = min(3, int(counts.counts[0, 1]))
        made.counts += counts.counts + gain * torch.tensor([[1, -1, -1, 1]])
        better.append(made)
    paired = paired_bootstrap_by_video(better, worse)
    single = bootstrap_by_video(worse)
    assert paired.low > 0
    assert paired.high - paired.low < 0.2 * (single.high - single.low)
    reverse = paired_bootstrap_by_video(worse, better)
    assert reverse.estimate == pytest.approx(-paired.estimate)
    assert (reverse.low, reverse.high) == pytest.approx((-paired.high, -paired.low))
    same = paired_bootstrap_by_video(worse, worse)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_bootstrap_is_reproducible_and_leaves_the_global_generators_alone():
    made = videos(np.random.default_rng(1), 10)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_by_video(made, BootstrapOptions(seed=4))
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert first == bootstrap_by_video(made, BootstrapOptions(seed=4))
    assert first != bootstrap_by_video(made, BootstrapOptions(seed=5))
    names = {str(i): counts for i, counts in enumerate(made)}
    assert bootstrap_by_video(names, BootstrapOptions(seed=4)) == first
    assert str(first).startswith(f"{first.estimate:.3f} [")


def test_paired_mappings_are_matched_by_name():
    made = videos(np.random.default_rng(1), 4)
    names = dict(zip("abcd", made, strict=True))
    backwards = dict(reversed(names.items()))
    assert paired_bootstrap_by_video(names, backwards).high == 0


def per_au(made):
    names = {str(i): counts for i, counts in enumerate(made)}
    return bootstrap_per_au_by_video(names, BootstrapOptions())


def videos_of_two(seed, count, occurs):
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
    many = videos_of_two(0, 20, 1.0)
    single = []
    for video in many:
        counts = AUCounts(["AU1"])
        counts.counts += video.counts[:1]
        single.append(counts)
    assert per_au(single)["AU1"] == bootstrap_by_video(single)
    assert per_au(many)["AU1"] == bootstrap_by_video(single)


def test_a_rare_action_unit_is_less_certain_however_many_frames_there_are():
    found = per_au(videos_of_two(1, 60, 0.1))
    length = {name: one.high - one.low for name, one in found.items()}
    assert length["AU2"] > 2 * length["AU1"]


def test_an_action_unit_without_positives_has_no_interval():
    found = per_au(videos_of_two(0, 5, 0.0))
    assert np.isnan([found["AU2"].estimate, found["AU2"].low, found["AU2"].high]).all()
    with pytest.raises(ValueError, match="needs at least 2 videos; got 1"):
        per_au(videos_of_two(0, 1, 1.0))


# ------------------------------------------------------------------------------------- reliability
def test_a_calibrated_model_lies_on_the_diagonal_and_a_shifted_one_does_not():
    prob = torch.rand(40_000, 2, dtype=torch.float64)
    target = (torch.rand(prob.shape) < prob).long()
    target[torch.rand(prob.shape) < 0.3] = -1
    curve = reliability_curve(prob, target, num_bins=10)
    assert_close(curve.predicted, curve.observed, atol=0.03, rtol=0)
    assert int(curve.num_entries.sum()) == int((target >= 0).sum())
    assert float(calibration_error(prob, target).max()) < 0.02
    shifted = calibration_error(0.8 * prob + 0.2, target)  # by 0.2 (1 - p), on average 0.1
    assert_close(shifted, torch.full((2,), 0.1, dtype=torch.float64), atol=0.01, rtol=0)


def test_the_posterior_of_the_asymmetric_loss_repairs_its_sigmoid():
    """Take the logits that minimise the loss exactly, where the truth is known."""
    logits = torch.linspace(-3, 4, 20_000)[:, None]
    truth = asymmetric_posterior(logits)
    target = (torch.rand(truth.shape) < truth).long()
    assert float(calibration_error(torch.sigmoid(logits), target)) > 0.1
    assert float(calibration_error(truth, target)) < 0.02


def test_empty_bins_and_columns_have_no_numbers():
    curve = reliability_curve(torch.tensor([[1.0, 0.1]]), torch.tensor([[1, -1]]), num_bins=2)
    assert curve.predicted.tolist()[0][1] == 1.0
    assert curve.predicted[0, 0].isnan()
    assert curve.observed[1].isnan().all()
    error = calibration_error(torch.tensor([[1.0, 0.1]]), torch.tensor([[1, -1]]))
    assert error[0] == 0
    assert error[1].isnan()


# --------------------------------------------------------------------------------- two processes
PROCESS = """
import json, sys, torch
import torch.distributed as dist
from mmau.evaluation import AUCounts

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(7)
prob = torch.rand(101, 3, generator=generator)
target = torch.randint(-1, 2, (101, 3), generator=generator)
mine = slice(0, 40) if rank == 0 else slice(40, None)
counts = AUCounts(3).update(prob[mine], target[mine])
local = counts.counts.clone()
first, second = counts.all_reduce(), counts.all_reduce()
try:
    AUCounts(["AU1"] if rank == 0 else ["AU2"]).all_reduce()
    refused = ""
except ValueError as error:
    refused = str(error)
found = {
    "counts": first.counts.tolist(),
    "again": second.counts.tolist(),
    "kept": torch.equal(counts.counts, local),
    "refused": refused,
}
with open(out, "w") as stream:
    json.dump(found, stream)
dist.destroy_process_group()
"""


def test_two_gloo_processes_equal_one_exactly(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store, outs = tmp_path / "store", [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(store), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    generator = torch.Generator().manual_seed(7)
    prob = torch.rand(101, 3, generator=generator)
    target = torch.randint(-1, 2, (101, 3), generator=generator)
    whole = AUCounts(3).update(prob, target)
    for out in outs:
        found = json.loads(out.read_text())
        assert found["counts"] == whole.counts.tolist()
        assert found["again"] == whole.counts.tolist(), "reducing twice counted twice"
        assert found["kept"]
        assert "must count the same Action Units; process 0 counts" in found["refused"]


def test_without_a_process_group_the_sum_is_its_own():
    counts = AUCounts(1).update(torch.ones(2, 1), torch.ones(2, 1))
    reduced = counts.all_reduce()
    assert torch.equal(reduced.counts, counts.counts)
    reduced.update(torch.ones(1, 1), torch.ones(1, 1))
    assert counts.counts[0, 0] == 2, "the copy shares its memory"


# ------------------------------------------------------------------------------------------ errors
def one(prob, label, names=1):
    width = names if isinstance(names, int) else len(names)
    return AUCounts(names).update(torch.full((1, width), prob), torch.full((1, width), label))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one(float("nan"), 1), "`prob` is NaN at 1 of 1 labelled entries"),
        (lambda: one(1.5, 1), r"`prob` must be in \[0, 1\]; got values from 1.5 to 1.5. Are these"),
        (lambda: one(-3.0, 0), r"`prob` must be in \[0, 1\]"),
        (lambda: one(0.5, 9), "`target` must be 0 or 1, .* such as 9"),
        (lambda: AUCounts(2).update(torch.ones(3), torch.ones(3)), r"must have shape \(..., 2\)"),
        (lambda: AUCounts(2).update(torch.ones(1, 2), torch.ones(2)), "must have the same shape"),
        (
            lambda: AUCounts(2).update(torch.ones(2), torch.ones(2), [0.1] * 3),
            "`threshold` must be one number or one per Action Unit",
        ),
        (
            lambda: AUCounts(1).update(torch.ones(1), torch.ones(1), float("nan")),
            "`threshold` must not be NaN",
        ),
        (lambda: AUCounts(1).merge(AUCounts(2)), "must count the same Action Units, 0; got 0, 1"),
        (lambda: AUCounts(["AU1", "AU1"]), "`au_names` must be at least one name, each once"),
        (lambda: AUCounts(0), "`au_names` must be at least one name"),
        (lambda: trivial_baselines(torch.tensor(1)), "got a single number"),
        (lambda: average_precision(torch.ones(2), torch.ones(3)), "must have the same shape"),
        (lambda: bootstrap_by_video([one(0.9, 1)]), "needs at least 2 videos; got 1"),
        (lambda: bootstrap_by_video([one(0.9, 1), one(0.9, 1, 2)]), "on the same Action Units"),
        (
            lambda: BootstrapOptions(num_resamples=5),
            "`num_resamples` must be in",
        ),
        (lambda: BootstrapOptions(confidence=1), "`confidence` must be in"),
        (
            lambda: paired_bootstrap_by_video([one(0.9, 1)] * 2, [one(0.9, 1)] * 3),
            "must hold the same videos and Action Units",
        ),
        (
            lambda: paired_bootstrap_by_video([one(0.9, 1)] * 2, [one(0.9, 0)] * 2),
            "not counted against the same labels",
        ),
        (
            lambda: paired_bootstrap_by_video({"a": one(0.9, 1)}, {"b": one(0.9, 1)}),
            "2 are in one of them only, such as 'a'",
        ),
        (
            lambda: paired_bootstrap_by_video({"a": one(0.9, 1)}, [one(0.9, 1)]),
            "must both be mappings",
        ),
        (
            lambda: reliability_curve(torch.ones(1, 1), torch.ones(1, 1), num_bins=0),
            "`num_bins` must be in",
        ),
        (lambda: calibration_error(torch.full((1, 1), 2.0), torch.ones(1, 1)), "Are these logits"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_single_name_is_not_a_list_of_names():
    with pytest.raises(
        TypeError, match="`au_names` must be a list of names or a number; got 'AU1'"
    ):
        AUCounts("AU1")
