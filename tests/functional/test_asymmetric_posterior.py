import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.asymmetric_loss import (
    asymmetric_posterior,
    logits_from_asymmetric_posterior,
)
from mmau.modules.losses import FocalLoss

TRUTHS = (1e-4, 0.02, 0.147, 0.3, 0.5, 0.8, 0.99)
exponents = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]) | st.floats(0, 6)
margins = st.sampled_from([0.0, 0.05, 0.2]) | st.floats(0, 0.9)


def minimum(truth, gamma_pos, gamma_neg, margin, weight=1.0):
    """Output with the smallest expected loss, by golden section on the paper's formula."""
    with mpmath.workdps(40):

        def expected(x):
            p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
            loss = -weight * truth * q**gamma_pos * mpmath.log(p)
            if p > margin:
                loss -= (1 - truth) * (p - margin) ** gamma_neg * mpmath.log(q + margin)
            return loss

        low, high = mpmath.mpf(-40), mpmath.mpf(40)
        ratio = (mpmath.sqrt(5) - 1) / 2
        for _ in range(80):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if expected(left) < expected(right):
                high = right
            else:
                low = left
        return float((low + high) / 2)


@pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "margin"),
    [(1.0, 4.0, 0.05), (1.0, 4.0, 0.0), (0.3, 2.0, 0.2), (0.5, 0.5, 0.05), (0.0, 0.0, 0.0)],
)
def test_minimising_the_expected_loss_gives_the_posterior_back(gamma_pos, gamma_neg, margin):
    options = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    best = [minimum(truth, **options) for truth in TRUTHS]
    found = asymmetric_posterior(torch.tensor(best, dtype=torch.float64), **options)
    truths = torch.tensor(TRUTHS, dtype=torch.float64)
    assert_close(found, truths, rtol=1e-6, atol=1e-8)
    back = logits_from_asymmetric_posterior(truths, **options)
    assert_close(back, torch.tensor(best, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_minimising_the_expected_focal_loss_gives_its_posterior_back(alpha):
    weight = 1.0 if alpha is None else alpha / (1 - alpha)
    best = [minimum(truth, 2.0, 2.0, 0.0, weight) for truth in TRUTHS]
    loss = FocalLoss(gamma=2.0, alpha=alpha)
    found = loss.posterior(torch.tensor(best, dtype=torch.float64))
    truths = torch.tensor(TRUTHS, dtype=torch.float64)
    assert_close(found, truths, rtol=1e-6, atol=1e-8)
    back = loss.logits_from_posterior(truths)
    assert_close(back, torch.tensor(best, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_weights_of_positives_and_a_detached_focus_shift_the_optimum():
    best = torch.tensor([minimum(0.3, 1.0, 4.0, 0.05, weight=5.0)], dtype=torch.float64)
    assert asymmetric_posterior(best, pos_weight=5.0).item() == pytest.approx(0.3, rel=1e-6)
    p = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    # With a detached focus the gradient is the weight times that of the logarithm.
    odds = (p - 0.05) ** 4 / (1.05 - p) / ((1 - p) / p)
    found = asymmetric_posterior(torch.tensor([0.7], dtype=torch.float64), detach_focus=True)
    assert_close(found, (odds / (1 + odds))[None])


def test_asl_at_one_half_is_a_posterior_of_147_thousandths():
    assert asymmetric_posterior(torch.zeros(1)).item() == pytest.approx(0.147, abs=5e-4)
    assert logits_from_asymmetric_posterior(torch.tensor([0.1473])).abs() < 1e-3


@given(gamma_pos=exponents, gamma_neg=exponents, margin=margins)
def test_posterior_is_a_probability_that_rises_with_the_logit(gamma_pos, gamma_neg, margin):
    x = torch.cat([torch.tensor([-1e4]), torch.linspace(-40, 40, 400), torch.tensor([1e4])])
    for dtype in (torch.float32, torch.float64):
        prob = asymmetric_posterior(
            x.to(dtype), gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin
        )
        assert prob.dtype == dtype
        assert ((prob >= 0) & (prob <= 1)).all()
        assert (prob.diff() > -1e-5).all()


@given(gamma_pos=exponents, gamma_neg=exponents, margin=margins, weight=st.floats(0.1, 10))
def test_the_inverse_round_trip(gamma_pos, gamma_neg, margin, weight):
    options = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    options["pos_weight"] = weight
    prob = torch.cat([torch.logspace(-12, -2, 40), torch.linspace(0.01, 0.9999, 60)]).double()
    logits = logits_from_asymmetric_posterior(prob, **options)
    again = asymmetric_posterior(logits, **options)
    reached = torch.isfinite(logits)
    assert (logits[reached].diff() >= 0).all()
    assert (again[~reached] <= prob[~reached]).all()
    # Just above a margin the posterior may be as steep as a step.
    if margin == 0 or gamma_neg >= 0.2:
        assert_close(again[reached], prob[reached], rtol=1e-5, atol=1e-8)
    x = torch.linspace(-2, 3, 50, dtype=torch.float64)
    back = logits_from_asymmetric_posterior(asymmetric_posterior(x, **options), **options)
    above = torch.sigmoid(x) > margin + 1e-3
    assert_close(back[above], x[above], rtol=1e-6, atol=1e-6)


def test_a_margin_without_focused_positives_leaves_the_last_probabilities_out_of_reach():
    """At p = 1 the odds are (1 - m)^2 / m - 2 (1 - m) log m, with m = 0.2."""
    options = {"gamma_pos": 0.0, "gamma_neg": 2.0, "margin": 0.2}
    odds = 0.64 / 0.2 - 2 * 0.8 * math.log(0.2)
    highest = odds / (1 + odds)
    found = asymmetric_posterior(torch.tensor([500.0], dtype=torch.float64), **options)
    assert found.item() == pytest.approx(highest, rel=1e-9)
    prob = torch.tensor([highest - 1e-3, highest + 1e-3], dtype=torch.float64)
    logits = logits_from_asymmetric_posterior(prob, **options)
    assert torch.isfinite(logits).tolist() == [True, False]
    assert minimum(highest + 1e-3, 0.0, 2.0, 0.2) > 39


def test_the_ends_of_the_inverse():
    ends = torch.tensor([0.0, 1.0, float("nan")])
    inf, nan = float("inf"), float("nan")
    with_margin = logits_from_asymmetric_posterior(ends, margin=0.2)
    expected = torch.tensor([torch.logit(torch.tensor(0.2)).item(), inf, nan])
    assert_close(with_margin, expected, equal_nan=True)
    without = FocalLoss().logits_from_posterior(ends)
    assert_close(without, torch.tensor([-inf, inf, nan]), equal_nan=True)
    per_unit = logits_from_asymmetric_posterior(torch.zeros(2), margin=[0.0, 0.5])
    assert_close(per_unit, torch.tensor([-inf, 0.0]))


def test_options_per_action_unit_are_those_of_each_column():
    x = torch.randn(5, 2, dtype=torch.float64)
    options = {"gamma_neg": [4.0, 1.0], "margin": torch.tensor([0.05, 0.0]).double()}
    both = asymmetric_posterior(x, **options)
    for c in range(2):
        own = {"gamma_neg": options["gamma_neg"][c], "margin": float(options["margin"][c])}
        assert_close(both[:, [c]], asymmetric_posterior(x[:, [c]], **own))
    assert logits_from_asymmetric_posterior(both, **options).shape == (5, 2)


def test_posterior_without_gamma_and_margin_is_the_sigmoid():
    x = torch.linspace(-100, 100, 50)
    prob = asymmetric_posterior(x.half(), gamma_pos=0, gamma_neg=0, margin=0)
    assert_close(prob, torch.sigmoid(x.half().float()))


def test_bad_input_is_refused():
    integers = torch.zeros(3, dtype=torch.int64)
    for posterior in (asymmetric_posterior, FocalLoss().posterior):
        with pytest.raises(TypeError, match=r"`logits` must be floating point; got torch\.int64"):
            posterior(integers)
    for inverse in (logits_from_asymmetric_posterior, FocalLoss().logits_from_posterior):
        with pytest.raises(TypeError, match=r"`prob` must be floating point; got torch\.int64"):
            inverse(integers)
        with pytest.raises(ValueError, match=r"`prob` must be in \[0, 1\]; got 1.5"):
            inverse(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="`alpha` must be in"):
        FocalLoss(alpha=1.0)
    with pytest.raises(ValueError, match="`margin` must be in"):
        asymmetric_posterior(torch.zeros(1), margin=1.0)
