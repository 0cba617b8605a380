import pytest
import torch
from torch.testing import assert_close

from mmau.evaluation import calibration_error, reliability_curve
from mmau.functional import asymmetric_posterior


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
