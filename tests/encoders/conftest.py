"""What the tests of every trainable encoder do."""

import pytest
import torch
from torch import nn


@pytest.fixture
def shake():
    """Move the up projections off zero; at zero the down projections have no gradient."""

    def change(encoder):
        for name, tensor in encoder.saved_tensors().items():
            if name.endswith(".up") or ".up." in name:
                nn.init.normal_(tensor, std=0.1)
        return encoder

    return change


@pytest.fixture
def check_gradients():
    """Check that every trainable tensor gets a gradient, and no other."""

    def check(encoder, output):
        (output * torch.randn_like(output)).sum().backward()
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 1e-9, name
            else:
                assert parameter.grad is None, name

    return check
