import pickle

import pytest
import torch
from torch.testing import assert_close

from mmau.functional import (
    asymmetric_loss,
    asymmetric_posterior,
    focal_loss,
    masked_bce_loss,
)
from mmau.modules.losses import LOSSES, AsymmetricLoss, FocalLoss, MaskedBCELoss


@pytest.fixture(params=sorted(LOSSES))  # registering a loss is testing it
def loss(request):
    return LOSSES.create(request.param)


@pytest.fixture
def batch():
    return torch.randn(3, 5, 12, requires_grad=True), torch.randint(-1, 2, (3, 5, 12))


def test_every_loss_is_a_masked_mean_with_a_gradient(loss, batch):
    logits, target = batch
    value = loss(logits, target)
    value.backward()
    assert value.shape == ()
    assert (logits.grad[target == -1] == 0).all()
    assert (logits.grad[target == 1] < 0).all()
    twice = loss(torch.cat([logits, logits]), torch.cat([target, target]))
    assert_close(twice, value)
    assert_close(loss(logits, target, 1), value * (target >= 0).sum())


# torch's own tracer instantiates autograd.Function and so triggers torch's own warning about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_every_loss_compiles_pickles_and_has_no_state(loss, batch):
    logits, target = batch
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(logits, target), loss(logits, target))
    assert_close(pickle.loads(pickle.dumps(loss))(logits, target), loss(logits, target))
    assert loss.state_dict() == {}
    assert "ignore_index=-1, reduction='mean'" in repr(loss)


def test_every_posterior_is_a_probability_and_monotone(loss):
    prob = loss.posterior(torch.linspace(-30, 30, 100, dtype=torch.float64))
    assert ((prob >= 0) & (prob <= 1)).all()
    assert (prob.diff() >= -1e-12).all()
    assert prob[-1] > 0.99
    assert prob[0] < 0.01


@pytest.mark.parametrize(
    "loss",
    [
        AsymmetricLoss(reduction="none"),
        AsymmetricLoss(gamma_pos=0.5, gamma_neg=2.0, margin=0.2, reduction="none"),
        FocalLoss(reduction="none"),
        FocalLoss(gamma=1.0, alpha=0.25, reduction="none"),
        MaskedBCELoss(reduction="none"),
        MaskedBCELoss(pos_weight=5.0, reduction="none"),
        AsymmetricLoss(pos_weight=3.0, class_weight=[2.0], reduction="none"),
        MaskedBCELoss(class_weight=[3.0], reduction="none"),
    ],
    ids=repr,
)
def test_posterior_undoes_the_loss(loss):
    x = torch.linspace(-10, 10, 50_001, dtype=torch.float64)[:, None]
    positive, negative = loss(x, torch.ones_like(x)), loss(x, torch.zeros_like(x))
    for truth in (0.1, 0.4, 0.7):
        best = x[(truth * positive + (1 - truth) * negative).argmin()]
        assert loss.posterior(best[None]).item() == pytest.approx(truth, abs=1e-3)
        wanted = torch.tensor([truth], dtype=torch.float64)
        assert_close(loss.posterior(loss.logits_from_posterior(wanted)), wanted)


def test_options_reach_the_functions(batch):
    logits, target = batch
    per_unit = torch.linspace(0, 4, 12)
    assert_close(
        AsymmetricLoss(gamma_neg=per_unit, margin=0.1)(logits, target),
        asymmetric_loss(logits, target, gamma_neg=per_unit, margin=0.1),
    )
    assert_close(
        FocalLoss(gamma=3, alpha=0.3)(logits, target),
        focal_loss(logits, target, gamma=3, alpha=0.3),
    )
    assert_close(
        MaskedBCELoss(pos_weight=per_unit + 1, reduction="sum")(logits, target),
        masked_bce_loss(logits, target, pos_weight=per_unit + 1, reduction="sum"),
    )
    assert AsymmetricLoss(gamma_neg=[0.0] * 12).posterior(logits).shape == logits.shape
    options = {"class_weight": per_unit, "pos_weight": 2.0, "detach_focus": True}
    ours = AsymmetricLoss(**options)(logits, target)
    assert_close(ours, asymmetric_loss(logits, target, **options))
    (gradient,) = torch.autograd.grad(ours, logits)
    (expected,) = torch.autograd.grad(asymmetric_loss(logits, target, **options), logits)
    assert_close(gradient, expected)
    zeros = torch.zeros(1)
    detached = AsymmetricLoss(detach_focus=True).posterior(zeros)
    assert_close(detached, asymmetric_posterior(zeros, detach_focus=True))
    assert detached != AsymmetricLoss().posterior(zeros)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_labels_are_read_as_the_module_was_told(name):
    soft = LOSSES.create(name, soft_labels=True)
    assert torch.isfinite(soft(torch.zeros(2), torch.tensor([0.5, -1.0])))
    with pytest.raises(ValueError, match="between 0 and 1 need `soft_labels=True`"):
        LOSSES.create(name)(torch.zeros(1), torch.tensor([0.5]))
    assert LOSSES.create(name, check_labels=False)(torch.zeros(1), torch.tensor([0.5])).isnan()
    assert "soft_labels=True, ignore_index=-1, reduction='mean'" in repr(soft)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AsymmetricLoss(gamma_pos=-1), "`gamma_pos` must be in"),
        (lambda: AsymmetricLoss(gamma_neg=[1.0, -1.0]), "`gamma_neg` must be in"),
        (lambda: AsymmetricLoss(margin=1.0), "`margin` must be in"),
        (lambda: AsymmetricLoss(reduction="avg"), "`reduction` must be one of"),
        (lambda: FocalLoss(gamma=-1), "`gamma` must be in"),
        (lambda: FocalLoss(alpha=0), "`alpha` must be in"),
        (lambda: AsymmetricLoss(pos_weight=0), "`pos_weight` must be in"),
        (lambda: FocalLoss(class_weight=[-1.0]), "`class_weight` must be in"),
        (lambda: MaskedBCELoss(pos_weight=0), "`pos_weight` must be in"),
    ],
)
def test_bad_options_are_refused_when_the_loss_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_mistyped_option_is_named():
    with pytest.raises(TypeError, match="loss 'asl' takes no option 'gama_pos'; did you mean"):
        LOSSES.create("asl", gama_pos=1.0)


@pytest.mark.parametrize(
    "loss",
    [
        AsymmetricLoss(gamma_neg=[1.0, 4.0], pos_weight=2.0),
        FocalLoss(alpha=0.25, detach_focus=True),
        FocalLoss(gamma=1.5),
        MaskedBCELoss(pos_weight=[3.0, 0.5]),
    ],
)
def test_the_options_describe_the_posterior(loss):
    """A checkpoint keeps them and nothing else of the loss."""
    logits = torch.linspace(-6, 6, 13).repeat(2, 1).T
    found = asymmetric_posterior(logits, **loss.posterior_options)
    assert torch.equal(found, loss.posterior(logits))
    if isinstance(loss, FocalLoss):
        weights = {} if loss.alpha is None else {"pos_weight": loss.alpha / (1 - loss.alpha)}
        focus = {"gamma_pos": loss.gamma, "gamma_neg": loss.gamma, "margin": 0.0}
        expected = asymmetric_posterior(logits, **focus, detach_focus=loss.detach_focus, **weights)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss.posterior(loss.logits_from_posterior(found)), found)
    assert None not in loss.posterior_options.values()
