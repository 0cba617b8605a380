"""Pooling: means over sets of patches."""

import pytest
import torch
from torch.testing import assert_close

from mmau.functional.region_attention import region_pooling


def test_is_the_mean_of_the_marked_patches():
    tokens = torch.randn(2, 5, 9, 4, dtype=torch.float64)
    marked = torch.rand(2, 5, 3, 9) > 0.5
    marked[..., 0] = True
    local, overall = region_pooling(tokens, marked.float() / marked.sum(-1, keepdim=True))
    for b in range(2):
        for t in range(5):
            for m in range(3):
                # The weights are float32.
                expected = tokens[b, t, marked[b, t, m]].mean(0)
                assert_close(local[b, t, m], expected, rtol=1e-6, atol=1e-6)
    assert_close(overall, tokens.mean(2))


def test_no_leading_axes():
    local, overall = region_pooling(torch.ones(4, 3), torch.full((2, 4), 0.25))
    assert local.shape == (2, 3)
    assert overall.shape == (3,)


@pytest.mark.parametrize("surplus", [1, 5])
def test_prefix_tokens_are_named(surplus):
    with pytest.raises(
        ValueError, match=f"has {9 + surplus} tokens, .* 9 patches; the {surplus} in"
    ):
        region_pooling(torch.zeros(9 + surplus, 3), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=rf"CLS token .* patch_tokens\[\.\.\., {surplus}:, :\]"):
        region_pooling(torch.zeros(9 + surplus, 3), torch.zeros(2, 9))


def test_another_grid_is_asked_about():
    with pytest.raises(ValueError, match=r"has 8 tokens, .* another grid size"):
        region_pooling(torch.zeros(8, 3), torch.zeros(2, 9))


def test_leading_axes_must_agree():
    with pytest.raises(ValueError, match=r"same leading axes; got .2, 9, 3. and .3, 2, 9."):
        region_pooling(torch.zeros(2, 9, 3), torch.zeros(3, 2, 9))
