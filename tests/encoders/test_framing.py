"""Windows, times and chunks, against direct counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mmau.encoders.log_mel import Framing

layers = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4)


@given(layers=layers, num_samples=st.integers(1, 200))
def test_count_and_window_are_those_of_the_convolutions(layers, num_samples):
    kernels, strides = zip(*layers, strict=True)
    framing = Framing.from_convolutions(kernels, strides)
    stack = nn.Sequential(*(nn.Conv1d(1, 1, k, s, bias=False) for k, s in layers))
    for layer in stack:
        nn.init.ones_(layer.weight)
    assert framing.count(framing.window - 1) == 0
    if framing.count(num_samples) == 0:
        return
    x = torch.zeros(1, 1, num_samples, requires_grad=True)
    y = stack(x)
    assert y.shape[-1] == framing.count(num_samples)
    last = y.shape[-1] - 1
    y[0, 0, last].backward()
    seen = x.grad[0, 0].nonzero().flatten()
    centre = (seen.min() + seen.max()).double() / 2
    assert_close(framing.times(last + 1)[last] * framing.sample_rate, centre)
    assert seen.max() - seen.min() + 1 <= framing.window


@given(
    total=st.integers(1, 400),
    chunk=st.integers(3, 60),
    margin=st.integers(0, 20),
    hop=st.integers(1, 4),
)
def test_chunks_tile_the_features(total, chunk, margin, hop):
    margin = min(margin, (chunk - 1) // 2)
    framing = Framing(window=2 * hop + 1, hop=hop)
    num_samples = (total - 1) * hop + framing.window + hop - 1
    kept = []
    for span in framing.chunks(num_samples, chunk, margin):
        first = span.first_sample // hop
        encoded = framing.count(span.last_sample - span.first_sample)
        assert span.keep_to <= encoded <= chunk
        assert first == 0 or span.keep_from >= margin
        assert first + encoded == total or encoded - span.keep_to >= margin
        kept += range(first + span.keep_from, first + span.keep_to)
    assert kept == list(range(total))


def test_the_mask_counts_whole_windows():
    framing = Framing(window=4, hop=2)
    features, times, mask = framing.label(torch.ones(4, 4, 1), torch.tensor([10, 7, 3, 0]))
    assert mask.sum(1).tolist() == [4, 2, 0, 0]
    assert features.sum((1, 2)).tolist() == [4, 2, 0, 0]
    assert_close(times[0] * 16000, torch.tensor([1.5, 3.5, 5.5, 7.5], dtype=torch.float64))


def test_unequal_lists_of_kernels_and_strides():
    with pytest.raises(ValueError, match="shorter"):
        Framing.from_convolutions((3, 3), (1,))
