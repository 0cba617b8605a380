"""Loudness and zero-crossing rate as an audio encoder: two numbers per window, no parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmau.encoders import AudioFeatures

__all__ = ["EnergyEncoder"]


class EnergyEncoder(nn.Module):
    """Describe each window of sound by its level in decibels and its zero-crossing rate.

    Args:
        frames_per_second: Windows per second; they do not overlap.
    """

    d_out = 2
    sample_rate = 16000

    def __init__(self, *, frames_per_second: float = 50.0) -> None:
        super().__init__()
        if frames_per_second <= 0:
            raise ValueError(f"`frames_per_second` must be positive; got {frames_per_second}.")
        self.window = round(self.sample_rate / frames_per_second)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Return features `(b, s, 2)`, window centres in seconds and which windows hold sound."""
        windows = waveform.unfold(-1, self.window, self.window)
        level = 10 * torch.log10(windows.square().mean(-1) + 1e-10)
        crossings = (windows[..., 1:] * windows[..., :-1] < 0).float().mean(-1)
        count = windows.shape[1]
        times = (torch.arange(count, device=waveform.device) + 0.5) * self.window / self.sample_rate
        if lengths is None:
            mask = torch.ones(level.shape, dtype=torch.bool, device=waveform.device)
        else:
            ends = torch.arange(1, count + 1, device=waveform.device) * self.window
            mask = ends <= lengths[:, None]
        return AudioFeatures(
            torch.stack([level / 20, crossings], dim=-1), times.expand(len(waveform), -1), mask
        )
