import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import ensemble, fill_gaps

NAN = float("nan")


# ------------------------------------------------------------------------------------------- gaps
@given(seed=st.integers(0, 10_000))
def test_a_straight_line_is_restored_exactly_on_an_irregular_clock(seed):
    """Reversed weights, or weights by frame number, restore nothing but the middle."""
    generator = torch.Generator().manual_seed(seed)
    times = (0.01 + torch.rand(30, generator=generator, dtype=torch.float64)).cumsum(0)
    slope = torch.tensor([0.02, -0.01], dtype=torch.float64)
    line = 0.4 + slope * times[:, None]
    valid = torch.rand(30, generator=generator) < 0.5
    prob = line.masked_fill(~valid[:, None], NAN)
    filled, known = fill_gaps(prob, times, valid, max_gap=100.0)
    inside = torch.zeros(30, dtype=torch.bool)
    if valid.any():
        first, last = valid.nonzero()[0], valid.nonzero()[-1]
        inside[first : last + 1] = True
    assert torch.equal(known, inside)
    assert_close(filled[inside], line[inside], rtol=0, atol=1e-12)
    assert filled[~inside].isnan().all()


def test_the_nearer_neighbour_weighs_more():
    times = torch.tensor([0.0, 0.1, 0.4])
    filled = fill_gaps(
        torch.tensor([[0.0], [NAN], [1.0]]), times, torch.tensor([True, False, True])
    )
    assert_close(filled.prob[1], torch.tensor([0.25]))  # reversed weights: 0.75


def test_long_gaps_and_the_ends_stay_empty():
    times = torch.arange(9, dtype=torch.float64) / 10
    valid = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    prob = torch.where(valid, 0.5, NAN)[:, None]
    filled = fill_gaps(prob, times, valid, max_gap=0.2)
    assert filled.valid.tolist() == [False, True, True, True, False, False, False, True, False]
    assert torch.equal(filled.prob.isnan()[:, 0], ~filled.valid)
    wider = fill_gaps(prob, times, valid, max_gap=0.4)
    assert wider.valid.tolist() == [False, *[True] * 7, False]
    assert prob.isnan().sum() == 6, "the input was changed"


def test_no_line_leads_through_a_clock_that_stands_or_jumps_back():
    valid = torch.tensor([True, False, True])
    prob = torch.tensor([[0.2], [NAN], [0.6]])
    for times in ([0.0, 0.0, 0.1], [0.0, 0.1, 0.1], [1.0, 0.0, 1.1], [1.0, 0.5, 0.0]):
        filled = fill_gaps(prob, torch.tensor(times), valid)
        assert filled.valid.tolist() == valid.tolist(), times


def test_nothing_to_fill():
    empty = fill_gaps(torch.ones(0, 2), torch.ones(0), torch.ones(0, dtype=torch.bool))
    assert empty.prob.shape == (0, 2)
    nobody = fill_gaps(torch.ones(3, 1), torch.arange(3.0), torch.zeros(3, dtype=torch.bool))
    assert not nobody.valid.any()


# -------------------------------------------------------------------------------------- ensembles
@given(seed=st.integers(0, 10_000), average=st.sampled_from(["logit", "probability"]))
def test_a_mean_of_models_is_symmetric_bounded_and_keeps_what_all_agree_on(seed, average):
    generator = torch.Generator().manual_seed(seed)
    probs = list(torch.rand(3, 5, 2, generator=generator, dtype=torch.float64))
    weights = [1.0, 2.0, 0.5]
    together = ensemble(probs, average=average, weights=weights)
    backwards = ensemble(probs[::-1], average=average, weights=weights[::-1])
    assert_close(together, backwards)
    stacked = torch.stack(probs)
    assert bool((together >= stacked.amin(0) - 1e-12).all())
    assert bool((together <= stacked.amax(0) + 1e-12).all())
    assert_close(ensemble([1 - p for p in probs], average=average, weights=weights), 1 - together)
    assert_close(ensemble([probs[0]] * 3, average=average), probs[0])
    assert_close(ensemble([probs[0], probs[1]], average=average, weights=[0, 3]), probs[1])


def test_logit_averaging_averages_logits_and_weighting_repeats_a_model():
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    probs = [torch.sigmoid(one) for one in logits]
    assert_close(ensemble(probs), torch.sigmoid(logits.mean(0)))
    assert_close(ensemble(probs, weights=[2, 1]), ensemble([probs[0], *probs]))


def test_one_certain_model_does_not_outvote_all_others():
    certain, doubt = torch.tensor([1.0]), torch.tensor([0.01])
    assert float(ensemble([certain, *[doubt] * 9])) < 0.1
    assert ensemble([torch.tensor([NAN]), certain]).isnan().all()
    assert float(ensemble([certain, torch.tensor([0.0])])) == 0.5


ONE = torch.full((2, 1), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fill_gaps(ONE, torch.full((2,), NAN), torch.ones(2, dtype=torch.bool)),
            "`timestamps` must be finite",
        ),
        (
            lambda: fill_gaps(ONE, torch.arange(2.0), torch.ones(2, dtype=torch.bool), max_gap=0),
            "`max_gap` must be in",
        ),
        (lambda: ensemble([]), "at least one model; got none"),
        (lambda: ensemble([ONE, ONE[:1]]), r"one shape; got \(2, 1\) and, at 1, \(1, 1\)"),
        (lambda: ensemble([ONE, 4 * ONE]), r"`probs\[1\]` must be in \[0, 1\].* Are these logits"),
        (lambda: ensemble([ONE], average="mean"), "`average` must be one of"),
        (lambda: ensemble([ONE], weights=[1, 1]), "`weights` must be 1 numbers; got 2"),
        (lambda: ensemble([ONE, ONE], weights=[1, -1]), "`weights` must be in"),
        (lambda: ensemble([ONE], weights=[0]), "`weights` must not all be 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="`valid` must be a bool tensor"):
        fill_gaps(ONE, torch.arange(2.0), torch.ones(2))
    with pytest.raises(TypeError, match=r"`probs\[0\]` must be a tensor"):
        ensemble([0.5])
