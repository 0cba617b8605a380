"""Chunks change neither results nor gradients, and bound what is kept."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.encoders.vision import tiny_dinov2
from mmau.modules.frame_chunked import FrameChunked, run_in_chunks


class Kept:
    """Bytes that autograd keeps while it is open."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frames_per_chunk", [1, 4, 7, 100])
def test_results_and_gradients_are_those_of_one_call(frames_per_chunk, recompute):
    encoder = tiny_dinov2(hidden_size=32, image_size=32).train()
    chunked = FrameChunked(encoder, frames_per_chunk, recompute=recompute)
    images = torch.rand(7, 3, 32, 32)
    grads = []
    for run in (encoder, chunked):
        features = run(images)
        assert features.grid_size == (4, 4)
        encoder.zero_grad()
        (features.patch_tokens * torch.linspace(-1, 1, 32)).square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
        assert features.patch_tokens.shape == (7, 16, 32)
    assert len(grads[0]) > 20
    for one, other in zip(*grads, strict=True):
        assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_inputs_and_outputs():
    """Growth per frame: 96 numbers where the whole network keeps tens of thousands."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.GELU()) for _ in range(12)))

    def kept(recompute, frames):
        module = FrameChunked(layers, 8, recompute=recompute)
        with Kept() as inside:
            module(torch.randn(frames, 96)).sum()
        return inside.bytes

    grown = kept(True, 64) - kept(True, 32)
    assert grown <= 32 * 96 * 4
    assert kept(False, 64) - kept(False, 32) > 20 * max(grown, 32 * 96 * 4)


def test_nothing_is_recomputed_without_gradients():
    calls = []
    run_in_chunks(lambda x: calls.append(len(x)) or x, [torch.zeros(5)], 2, recompute=False)
    assert calls == [2, 2, 1]
    with torch.no_grad():
        out = run_in_chunks(torch.neg, [torch.ones(5, requires_grad=True)], 2, recompute=True)
    assert not out.requires_grad


def test_none_is_handed_on_and_no_frames_are_one_call():
    def run(x, mask):
        assert mask is None
        return x * 2

    assert_close(run_in_chunks(run, [torch.ones(3), None], 2), torch.full((3,), 2.0))
    assert run_in_chunks(run, [torch.ones(0, 4), None], 2).shape == (0, 4)


class Pair(NamedTuple):
    value: torch.Tensor
    size: int


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"same number of frames; got"):
        run_in_chunks(torch.add, [torch.ones(3), torch.ones(4)], 2)
    with pytest.raises(ValueError, match="`frames_per_chunk` must be"):
        FrameChunked(nn.Identity(), 0)
    with pytest.raises(ValueError, match=r"the same value where it is no tensor; got \[2, 1\]"):
        run_in_chunks(lambda x: Pair(x, len(x)), [torch.ones(3)], 2)
