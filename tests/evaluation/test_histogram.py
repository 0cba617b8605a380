import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import AUCounts, ScoreHistogram, best_thresholds


def random_data(seed, n=80, c=3):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(n, c, generator=generator, dtype=torch.float64)
    # Scores on the edges of the bins, 0 and 1 included, as half of them.
    prob[::2] = (prob[::2] * 16).round() / 16
    return prob, torch.randint(-1, 2, (n, c), generator=generator)


@given(seed=st.integers(0, 10_000))
def test_every_point_of_the_curve_is_what_the_counter_counts_there(seed):
    prob, target = random_data(seed)
    histogram = ScoreHistogram(3, num_bins=16).update(prob, target)
    curve = histogram.curve()
    at_edges = histogram.counts_at_thresholds()
    for k, threshold in enumerate(curve.thresholds.tolist()):
        counts = AUCounts(3).update(prob, target, threshold)
        assert torch.equal(at_edges[:, k], counts.counts)
        assert_close(curve.f1[:, k], counts.f1(), equal_nan=True)
        assert_close(curve.precision[:, k], counts.precision(), equal_nan=True)
        assert_close(curve.recall[:, k], counts.recall(), equal_nan=True)
        together = histogram.counts_at(torch.full((3,), threshold))
        assert torch.equal(together.counts, counts.counts)


@given(seed=st.integers(0, 10_000))
def test_best_edge_equals_exhaustive_search_over_edges_and_the_highest_wins(seed):
    prob, target = random_data(seed, n=15)
    found = ScoreHistogram(3, num_bins=16).update(prob, target).best_thresholds(default=0.3)
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
    histogram = ScoreHistogram().update(prob, target)
    coarse = histogram.counts_at(histogram.best_thresholds()).f1()
    exact = AUCounts().update(prob, target, best_thresholds(prob, target)).f1()
    loss = exact - coarse
    assert float(loss.min()) >= 0
    assert float(loss.max()) < 1.5e-3  # the rarest: 800 positives
    assert float(loss.mean()) < 3e-4


@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 80), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_neither_cutting_nor_the_order_of_merging_matters(seed, cuts, order):
    prob, target = random_data(seed)
    edges = [0, *sorted(cuts), 80]
    parts = [ScoreHistogram(3).update(prob[a:b], target[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = ScoreHistogram(3)
    for part in parts:
        merged.merge(part)
    assert merged.counts.dtype == torch.int64
    assert torch.equal(merged.counts, ScoreHistogram(3).update(prob, target).counts)


def test_action_units_without_positives_have_no_curve():
    histogram = ScoreHistogram(["AU1", "AU2"], num_bins=2)
    histogram.update(torch.tensor([[0.9, 0.9]]), torch.tensor([[1, 0]]))
    assert histogram.curve().f1[1].isnan().all()
    assert histogram.best_thresholds(default=0.4).tolist() == [0.5, 0.4]
    assert repr(histogram) == "ScoreHistogram(2 bins; AU1: 1, AU2: 1)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScoreHistogram(1, num_bins=1000), "must be a power of two from 2 to 65536; got"),
        (lambda: ScoreHistogram(1, num_bins=1), "must be a power of two"),
        (
            lambda: ScoreHistogram(1).merge(ScoreHistogram(1, num_bins=2)),
            "must have the same 1024 bins and Action Units, 0; got 2 bins and 0",
        ),
        (lambda: ScoreHistogram(1).merge(ScoreHistogram(2)), "got 1024 bins and 0, 1"),
        (
            lambda: ScoreHistogram(1).update(torch.tensor([[float("nan")]]), torch.ones(1, 1)),
            "`prob` is NaN at 1 of 1 labelled entries",
        ),
        (
            lambda: ScoreHistogram(1, num_bins=4).counts_at(torch.tensor([0.3])),
            "must be one multiple of 1/4 per Action Unit",
        ),
        (
            lambda: ScoreHistogram(2, num_bins=4).counts_at(torch.tensor([0.25])),
            "must be one multiple of 1/4 per Action Unit",
        ),
        (
            lambda: ScoreHistogram(1, num_bins=4).counts_at(torch.tensor([1.0])),
            r"`thresholds` must be in \[0, 1\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
