"""What goes wrong in published implementations of the asymmetric loss, and does not in ours.

Each row runs the published formula first, so that the table stays true of something.
"""

import importlib.metadata
import importlib.util

import pytest
import torch

from mmau.functional.asymmetric_loss import asymmetric_loss

NAN = float("nan")


def published(logits, target, gamma_pos=1.0, gamma_neg=4.0, margin=0.05):
    """The formula as it is usually coded: probabilities first, logarithms cut at 1e-8, a power."""
    p = torch.sigmoid(logits)
    q = (1 - p + margin).clamp(max=1)
    loss = target * torch.log(p.clamp(min=1e-8)) + (1 - target) * torch.log(q.clamp(min=1e-8))
    chosen = p * target + q * (1 - target)
    return -loss * (1 - chosen) ** (gamma_pos * target + gamma_neg * (1 - target))


def timm(logits, target, **options):
    try:
        path = importlib.metadata.distribution("timm").locate_file("timm/loss/asymmetric_loss.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed")
    spec = importlib.util.spec_from_file_location("timm_asymmetric_loss", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AsymmetricLossMultiLabel(reduction="none", **options)(logits, target)


def ours(logits, target, **options):
    return asymmetric_loss(logits, target, reduction="none", **options)


def gradient(loss, logits, target, dtype=torch.float32, **options):
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(loss(x, torch.tensor(target), **options).sum(), x)
    return found.float()


@pytest.mark.parametrize("others", [published, timm])
def test_float32_loses_the_hardest_positives(others):
    """A positive at -20 should be pulled with all force."""
    logits, target = [-20.0, -40.0, -1000.0], [1.0, 1.0, 1.0]
    assert gradient(others, logits, target).abs().max() < 1e-3
    assert torch.allclose(gradient(ours, logits, target), torch.tensor(-1.0), atol=1e-6)


@pytest.mark.parametrize("others", [published, timm])
def test_an_exponent_below_one_gives_nan(others):
    logits, target = [-6.0, -5.0], [0.0, 0.0]
    assert gradient(others, logits, target, gamma_neg=0.5).isnan().any()
    assert (gradient(ours, logits, target, gamma_neg=0.5) == 0).all()


def test_half_precision_gives_nan_or_infinity():
    """The cut at 1e-8 is 0 in float16."""
    logits, target = [-30.0, 30.0], [1.0, 0.0]
    with_half = torch.tensor(logits, dtype=torch.float16)
    assert not torch.isfinite(published(with_half, torch.tensor(target).half())).all()
    found = gradient(ours, logits, target, dtype=torch.float16)
    exact = gradient(ours, logits, target, dtype=torch.float64)
    assert torch.allclose(found, exact, rtol=1e-3, atol=6e-8)
    assert torch.isfinite(ours(with_half, torch.tensor(target))).all()


@pytest.mark.parametrize("others", [published, timm])
def test_a_label_of_minus_one_pulls_hardest_of_all(others):
    """Missing in Aff-Wild2; a factor and an exponent there."""
    logits, target = [2.0, 4.0], [-1.0, -1.0]
    found = gradient(others, logits, target)
    assert found.isnan().any() or found.abs().max() > 10
    assert (gradient(ours, logits, target) == 0).all()


@pytest.mark.parametrize("others", [published, timm])
def test_a_label_that_is_nan_spreads(others):
    assert gradient(others, [0.5, 0.5], [1.0, NAN]).isnan().any()
    found = gradient(ours, [0.5, 0.5], [1.0, NAN])
    assert found[0] < 0
    assert found[1] == 0


@pytest.mark.parametrize("others", [published, timm])
@pytest.mark.parametrize("garbage", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("mark", [-1.0, NAN])
def test_multiplying_by_a_mask_leaks_the_logit_of_a_missing_label(others, garbage, mark):
    def masked(logits, target):
        known = (target >= 0).float()
        return others(logits, target.nan_to_num(0).clamp(min=0)) * known

    logits, target = [garbage, 0.5], [mark, 1.0]
    if garbage != garbage:
        assert gradient(masked, logits, target).isnan().any()
    found = gradient(ours, logits, target)
    assert found[0] == 0
    assert torch.equal(found[1:], gradient(ours, [0.5], [1.0]))
    assert torch.isfinite(asymmetric_loss(torch.tensor(logits), torch.tensor(target)))


def test_summing_makes_twice_the_batch_twice_the_loss():
    x, y = torch.randn(8, 12), torch.randint(0, 2, (8, 12)).float()
    double_x, double_y = torch.cat([x, x]), torch.cat([y, y])
    assert torch.allclose(published(double_x, double_y).sum(), 2 * published(x, y).sum())
    assert torch.allclose(asymmetric_loss(double_x, double_y), asymmetric_loss(x, y))
