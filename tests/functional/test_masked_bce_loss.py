import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.asymmetric_loss import masked_bce_loss


@pytest.mark.parametrize("pos_weight", [None, 3.0, [0.5, 1.0, 7.0]])
def test_it_is_torchs_own_over_the_labelled_entries(pos_weight):
    x, y = torch.randn(20, 3), torch.randint(-1, 2, (20, 3))
    weight = None if pos_weight is None else torch.as_tensor(pos_weight)
    entries = F.binary_cross_entropy_with_logits(
        x, y.clamp(min=0).float(), pos_weight=weight, reduction="none"
    )
    assert_close(masked_bce_loss(x, y, pos_weight=pos_weight), entries[y >= 0].mean())
    per_unit = torch.tensor([0.0, 2.0, 1.0])
    weighted = masked_bce_loss(x, y, pos_weight=pos_weight, class_weight=per_unit)
    assert_close(weighted, (entries * per_unit)[y >= 0].mean())
    soft = torch.rand(20, 3)
    assert_close(
        masked_bce_loss(x, soft, pos_weight=pos_weight, soft_labels=True),
        F.binary_cross_entropy_with_logits(x, soft, pos_weight=weight),
    )


@given(garbage=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30]))
def test_masked_labels_have_no_influence(garbage):
    x = torch.tensor([garbage, 0.5, -2.0], requires_grad=True)
    loss = masked_bce_loss(x, torch.tensor([-1, 1, 0]))
    loss.backward()
    assert_close(loss, masked_bce_loss(x[1:], torch.tensor([1, 0])))
    assert x.grad[0] == 0
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, [1.0, 0.0]])
def test_weights_must_be_positive(bad):
    with pytest.raises(ValueError, match=r"`pos_weight` must be in \(0, inf\)"):
        masked_bce_loss(torch.zeros(2), torch.zeros(2), pos_weight=bad)


def test_other_labels_are_refused():
    with pytest.raises(ValueError, match="`target` must be 0 or 1"):
        masked_bce_loss(torch.zeros(1), torch.full((1,), 9))
