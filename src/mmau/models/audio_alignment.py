"""Audio features on the clock of the frames, also for videos of an hour."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmau.functional.time_alignment import interpolate_features

# Frames per block; a clip of training (256 in the paper) is one block.
_BLOCK = 1024


def retrieve_audio(
    attention: nn.Module,
    visual: Tensor,
    features: Tensor,
    feature_times: Tensor,
    frame_times: Tensor,
    feature_mask: Tensor | None = None,
    *,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Let frames retrieve audio context, block by block.

    A frame hears nothing outside the window, so each block of frames only needs the features near
    it: the result is the same, and memory grows with the length of the video, not with its square.
    """
    window = float(cast("Any", attention).window)
    _, heard = interpolate_features(
        features[..., :1].detach(),
        feature_times,
        frame_times,
        feature_mask=feature_mask,
        max_gap=window,
    )
    if visual.shape[1] <= block:
        context: Tensor = attention(visual, features, frame_times, feature_times, feature_mask)
        return context, heard
    pieces = []
    for start in range(0, visual.shape[1], block):
        frames = slice(start, start + block)
        times = frame_times[:, frames]
        clock = torch.nan_to_num(times, nan=torch.inf), torch.nan_to_num(times, nan=-torch.inf)
        near = feature_times >= clock[0].amin() - window
        near &= feature_times <= clock[1].amax() + window
        chosen = near.any(0).nonzero().flatten()
        first, last = (int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else (0, 0)
        pieces.append(
            attention(
                visual[:, frames],
                features[:, first:last],
                times,
                feature_times[:, first:last],
                None if feature_mask is None else feature_mask[:, first:last],
            )
        )
    return torch.cat(pieces, dim=1), heard
