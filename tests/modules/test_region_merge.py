"""Merging regions: what each mode keeps."""

import pytest
import torch
from torch.testing import assert_close

from mmau.modules.hga import RegionMerge


@pytest.mark.parametrize("mode", ["flatten", "mean", "attention"])
def test_shape_and_gradients(mode):
    merge = RegionMerge(5, 8, 6, mode=mode)
    out = merge(torch.randn(2, 3, 5, 8))
    assert out.shape == (2, 3, 6)
    out.square().sum().backward()
    for name, parameter in merge.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mode", ["mean", "attention"])
def test_pooling_forgets_who_is_who(mode):
    merge, tokens = RegionMerge(5, 8, 6, mode=mode), torch.randn(2, 5, 8)
    if mode == "attention":
        torch.nn.init.normal_(merge.to_score.weight)
    assert_close(merge(tokens.flip(1)), merge(tokens))


def test_flatten_keeps_who_is_who():
    merge, tokens = RegionMerge(5, 8, 6), torch.randn(2, 5, 8)
    assert (merge(tokens.flip(1)) - merge(tokens)).abs().max() > 0.01


def test_attention_starts_as_the_mean():
    attention, mean = RegionMerge(5, 8, 6, mode="attention"), RegionMerge(5, 8, 6, mode="mean")
    attention.to_out.load_state_dict(mean.to_out.state_dict())
    tokens = torch.randn(4, 5, 8)
    assert_close(attention(tokens), mean(tokens))


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((5, 8, 6), {"mode": "max"}, "`mode` must be one of 'flatten', 'mean', 'attention'"),
        ((0, 8, 6), {}, "`num_regions` must be in .1, inf.; got 0"),
        ((5, 0, 6), {}, "`d_model` must be in"),
        ((5, 8, 0), {}, "`d_out` must be in"),
    ],
)
def test_wrong_options_are_refused(args, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RegionMerge(*args, **options)


def test_wrong_number_of_regions_is_refused():
    with pytest.raises(ValueError, match="axis `m` of `tokens` must be 5"):
        RegionMerge(5, 8, 6)(torch.zeros(2, 4, 8))
