import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import (
    best_thresholds,
    cross_fitted_thresholds,
    fit_thresholds,
    shrink_thresholds,
)


@given(
    threshold=st.floats(0.001, 0.999),
    default=st.floats(0.05, 0.95),
    videos=st.integers(0, 500),
    shrinkage=st.floats(0, 50),
)
def test_the_rule(threshold, default, videos, shrinkage):
    one = torch.tensor([threshold], dtype=torch.float64)
    count = torch.tensor([videos])
    shrunk = shrink_thresholds(one, count, default=default, shrinkage=shrinkage)
    if videos == 0:
        assert shrunk.item() == pytest.approx(default)
        return
    share = videos / (videos + shrinkage)
    start = torch.tensor(default, dtype=torch.float64).logit()
    assert_close(shrunk.logit(), share * one.logit() + (1 - share) * start)
    low, high = sorted([threshold, default])
    assert low - 1e-9 <= shrunk.item() <= high + 1e-9
    more = shrink_thresholds(one, count + 1, default=default, shrinkage=shrinkage)
    assert abs(more.item() - threshold) <= abs(shrunk.item() - threshold) + 1e-9


def test_halfway_after_as_many_videos_as_the_default_is_worth():
    thresholds = torch.tensor([0.2, 0.2, 0.0, 1.0], dtype=torch.float64)
    shrunk = shrink_thresholds(thresholds, torch.tensor([3, 300, 3, 3]), shrinkage=3)
    assert shrunk[0].item() == pytest.approx(1 / 3)  # odds 1/4 and 1: 1/2
    assert shrunk[1].item() == pytest.approx(0.2, abs=0.003)
    assert bool(((shrunk > 0) & (shrunk < 1)).all()), "a certain threshold never lets go"
    assert torch.equal(shrink_thresholds(thresholds, torch.ones(4), shrinkage=0), thresholds)


def test_videos_count_and_frames_do_not():
    """The same frames in one video, or in ten, or in ten trials of one video."""
    prob = torch.linspace(0, 0.4, 40)[:, None]
    target = (prob > 0.2).long()
    order = torch.arange(40).reshape(4, 10).T.flatten()  # each tenth has both labels
    prob, target = prob[order], target[order]
    whole = fit_thresholds({"a": prob}, {"a": target})
    tenths = dict(enumerate(prob.chunk(10))), dict(enumerate(target.chunk(10)))
    assert all(bool(part.any()) for part in tenths[1].values())
    ten = fit_thresholds(*tenths)
    grouped = fit_thresholds(*tenths, groups=dict.fromkeys(range(10), "x"))
    best = best_thresholds(prob, target)
    assert_close(whole, shrink_thresholds(best, torch.tensor([1])))
    assert_close(ten, shrink_thresholds(best, torch.tensor([10])))
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

    from mmau.evaluation import AUCounts

    prob, target = zip(video(40), video(40), strict=True)
    probs, targets = dict(enumerate(prob)), dict(enumerate(target))
    test_prob, test_target = video(4000)
    score = {
        s: AUCounts(200)
        .update(test_prob, test_target, fit_thresholds(probs, targets, default=0.65, shrinkage=s))
        .mean_f1()
        for s in (0.0, 2.0)
    }
    assert score[2.0] > score[0.0] + 0.005


def test_cross_fitting_shrinks_by_the_videos_outside_the_fold():
    probs = {n: torch.tensor([[0.1], [0.3]]) for n in "abc"}
    targets = {n: torch.tensor([[0], [1]]) for n in "abc"}
    found = cross_fitted_thresholds(probs, targets, num_folds=3, shrinkage=2)
    expected = shrink_thresholds(torch.tensor([0.2]), torch.tensor([2]), shrinkage=2)
    for threshold in found.values():
        assert_close(threshold, expected, rtol=0, atol=1e-6)


HALF = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shrink_thresholds(HALF, torch.ones(2)), "axis `c` is 1 in `thresholds` but 2"),
        (lambda: shrink_thresholds(HALF * 3, torch.ones(1)), r"`thresholds` must be in \[0, 1\]"),
        (lambda: shrink_thresholds(HALF, -torch.ones(1)), "`num_groups` must not be negative"),
        (lambda: shrink_thresholds(HALF, torch.ones(1), default=1), r"`default` must be in \(0, 1"),
        (lambda: shrink_thresholds(HALF, torch.ones(1), shrinkage=-1), "`shrinkage` must be in"),
        (lambda: fit_thresholds({}, {}), "`probs` must hold at least one video; got none"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
