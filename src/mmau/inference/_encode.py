"""Crops to region tokens, and a prepared trial to logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau.data.features import PreparedTrial
from mmau.inference._sound import SoundStream, cut_sound
from mmau.inference._stream import LogitStream
from mmau.models import AUDetector
from mmau.progress import ProgressCallback

__all__ = ["detector_logits", "encode_crops", "encode_trial"]


@torch.no_grad()
def encode_crops(
    detector: AUDetector,
    crops: NDArray[np.uint8],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
    *,
    frames_at_once: int = 64,
) -> Tensor:
    """Turn the frames that show a face into one vector each; the others get the learned one.

    Args:
        detector: The detector, in eval mode.
        crops: `(t, s, s, 3)`, RGB, aligned faces.
        landmarks: `(t, 68, 2)`, in crop pixels.
        valid: `(t,)`, whether there is a face.
        frames_at_once: Frames that the visual encoder sees at once; bounds the memory.

    Returns:
        `(t, d_model)`, on the detector's device.
    """
    tokens = _region_tokens(detector, crops, landmarks, np.asarray(valid), frames_at_once, None)
    return detector.merge_regions(tokens[None], _on(detector, valid)[None])[0]


@torch.no_grad()
def encode_trial(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Turn every frame that shows a face into region tokens, chunk by chunk.

    Args:
        detector: The detector.
        trial: Crops, landmarks and masks of a video.
        frames_per_chunk: Frames that the visual encoder sees at once; bounds the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, m, d)`, on the detector's device; zeros where there is no face.
    """
    return _region_tokens(
        detector, trial.crops, trial.landmarks, trial.valid, frames_per_chunk, progress
    )


def detector_logits(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Run a detector over one prepared trial.

    Args:
        detector: The detector, in eval mode.
        trial: Crops, landmarks, masks, timestamps and sound of a video.
        frames_per_chunk: Frames that the visual encoder and the temporal model see at once; bounds
            the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, c)`, logits on the CPU.
    """
    stream = LogitStream(detector)
    sound = None
    if detector.audio_encoder is not None and trial.waveform is not None:
        sound = SoundStream(detector, cut_sound([trial.waveform], trial.audio_start))
    ready = []
    for rows in _slices(trial.num_frames, frames_per_chunk):
        visual = encode_crops(
            detector,
            trial.crops[rows],
            trial.landmarks[rows],
            trial.valid[rows],
            frames_at_once=frames_per_chunk,
        )
        heard = () if sound is None else sound.align(visual, trial.timestamps[rows])
        ready.append(stream.push(visual, *heard).float().cpu())
        if progress is not None:
            progress(rows.stop, trial.num_frames)
    ready.append(stream.finish().float().cpu())
    return torch.cat(ready)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _on(detector: AUDetector, array: NDArray[np.generic]) -> Tensor:
    # A copy of what lies in a memory-mapped file.
    return torch.from_numpy(np.array(array)).to(detector.no_face.device)


@torch.no_grad()
def _region_tokens(
    detector: AUDetector,
    crops: NDArray[np.uint8],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
    frames_at_once: int,
    progress: ProgressCallback | None,
) -> Tensor:
    device = detector.no_face.device
    tokens = torch.zeros(len(valid), detector.num_regions, detector.d_region, device=device)
    seen = np.flatnonzero(valid)
    for rows in (seen[part] for part in _slices(len(seen), frames_at_once)):
        images = _on(detector, crops[rows]).movedim(-1, 1).float() / 255
        encoded = detector.encode_frames(images, _on(detector, landmarks[rows]))
        tokens[torch.from_numpy(rows).to(device)] = encoded.to(tokens.dtype)
        if progress is not None:
            progress(int(np.searchsorted(seen, rows[-1])) + 1, len(seen))
    return tokens
