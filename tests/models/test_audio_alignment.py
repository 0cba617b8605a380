"""Blocks of frames hear what the whole clip hears."""

import pytest
import torch
from torch.testing import assert_close

from mmau.models.audio_alignment import retrieve_audio
from mmau.modules import AsymmetricCrossAttention


@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_are_the_whole(block):
    attention = AsymmetricCrossAttention(8, 6, 2, window=0.3).eval()
    visual, features = torch.randn(2, 40, 8), torch.randn(2, 70, 6)
    frames = torch.arange(40, dtype=torch.float64).expand(2, -1) / 15 + torch.tensor(
        [[0.0], [0.05]]
    )
    times = torch.arange(70, dtype=torch.float64).expand(2, -1) / 50
    mask = torch.rand(2, 70) < 0.8
    mask[1] = False
    frames[:, 20] = torch.nan  # padding
    whole, heard = retrieve_audio(attention, visual, features, times, frames, mask)
    pieces, _ = retrieve_audio(attention, visual, features, times, frames, mask, block=block)
    assert_close(pieces, whole, rtol=0, atol=1e-6)
    distance = (frames[:, :, None] - times[:, None]).abs().masked_fill(~mask[:, None], torch.inf)
    assert torch.equal(heard, (distance <= 0.3).any(-1))
    assert not heard[1].any()
    assert_close(whole[1], whole[1, :1].expand(40, -1))  # the null key alone
