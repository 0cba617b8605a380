"""Pooling of shared tokens is a matrix product whose gradient needs no memory of its own."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mmau.functional.region_attention import (
    pool_shared_tokens,
    region_attention,
)
from mmau.modules.hga import HGA, HGAOutput


def leaves(b=2, r=3, p=5, e=4):
    shapes = ((b, p, e), (b, r, p), (e, e))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def shared(tokens, rows, weight):
    pooled, tokens = pool_shared_tokens(tokens, rows)
    return pooled.square(), (tokens @ weight).sin()


def plain(tokens, rows, weight):
    return (rows @ tokens).square(), (tokens @ weight).sin()


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_values_and_gradients_are_those_of_the_product(used):
    args = leaves()
    losses = [sum(run(*args)[i].sum() for i in used) for run in (shared, plain)]
    assert_close(losses[0], losses[1])
    got, wanted = (torch.autograd.grad(loss, args, allow_unused=True) for loss in losses)
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_second_derivatives_and_repeated_backward():
    args = leaves()
    assert torch.autograd.gradcheck(shared, args)
    assert torch.autograd.gradgradcheck(shared, args)
    loss = sum(part.sum() for part in shared(*args))
    first = torch.autograd.grad(loss, args, retain_graph=True)
    assert_close(torch.autograd.grad(loss, args), first, rtol=0, atol=0)


def test_an_expanded_gradient_is_left_alone():
    """The gradient of a sum is one number that looks like many: it cannot be added to."""
    args = leaves()
    pooled, tokens = pool_shared_tokens(*args[:2])
    got = torch.autograd.grad(pooled.square().sum() + tokens.sum(), args[:2])
    wanted = torch.autograd.grad((args[1] @ args[0]).square().sum() + args[0].sum(), args[:2])
    assert_close(got, wanted)


def test_frozen_tokens_are_handed_on():
    tokens, rows, _ = leaves()
    pooled, same = pool_shared_tokens(tokens.detach(), rows)
    assert not same.requires_grad
    assert pooled.requires_grad


class CountLarge(TorchDispatchMode):
    """Counts the buffers of one size or more that are made while it is on."""

    def __init__(self, size):
        super().__init__()
        self.size, self.known, self.made = size, set(), []

    def know(self, *tensors):
        self.known |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            place = out.untyped_storage().data_ptr()
            if place not in self.known:
                self.known.add(place)
                # Kept, so that a second buffer cannot reuse the place of the first.
                self.made.append((str(function), out))
        return out


@pytest.mark.parametrize("what", ["attention", "hga"])
def test_the_gradient_of_the_tokens_is_one_buffer(what):
    tokens = torch.randn(2, 64, 32, requires_grad=True)
    if what == "attention":
        weight = torch.randn(32, 32, requires_grad=True)
        out = region_attention(
            torch.randn(2, 3, 32), tokens, weight, weight, num_heads=4, implementation="folded"
        ).context
    else:
        hga = HGA(32, 32, 4, attention="folded")
        out = hga(tokens, torch.rand(2, 3, 64).softmax(-1)).tokens
    loss = out.square().sum()
    with CountLarge(tokens.numel()) as counted:
        counted.know(tokens)
        loss.backward()
    assert len(counted.made) == 1, [name for name, _ in counted.made]
    assert tokens.grad.untyped_storage().data_ptr() in counted.known


def test_attention_on_the_grid_is_a_view_row_by_row():
    attention = torch.arange(12.0).view(2, 6)
    out = HGAOutput(torch.zeros(2, 1), attention)
    grid = out.attention_maps((2, 3))
    assert grid[1].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert grid.data_ptr() == attention.data_ptr()
    with pytest.raises(ValueError, match="covers 6 patches, but a grid of 3 rows and 3 columns"):
        out.attention_maps((3, 3))


@pytest.mark.parametrize(
    ("tokens", "rows", "sentence"),
    [
        (torch.zeros(5, 4), torch.zeros(2, 3, 5), "`tokens` must have shape"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 3, 6), "axis `p` is 5 in `tokens` but 6 in `rows`"),
    ],
)
def test_wrong_shapes_are_refused(tokens, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        pool_shared_tokens(tokens, rows)
