"""The detector as the recipe trains it: on single frames, on clips, and on whole videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from affwild2_data import Video, to_device
from torch import Tensor, nn

from mmau.data.prepared import PreparedTrial
from mmau.inference import detector_logits, encode_trial
from mmau.models import AUDetector
from mmau.progress import progress_bar
from mmau.training import gather_by_name, share_longest_first


class FrameModel(nn.Module):
    """Frames to logits; its head is thrown away, the region tokens are what it leaves behind."""

    def __init__(self, detector: AUDetector) -> None:
        super().__init__()
        self.encoder, self.hga = detector.visual_encoder, detector.hga
        self.encode_frames = detector.encode_frames
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(detector.num_regions * detector.d_region, 96),
            nn.GELU(),
            nn.Linear(96, len(detector.au_names)),
        )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return `(n, c)` logits."""
        return self.head(self.encode_frames(batch["images"].float() / 255, batch["landmarks"]))


class ClipModel(nn.Module):
    """Clips to logits, from cached region tokens if there are any."""

    def __init__(self, detector: AUDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return `(b, t, c)` logits."""
        detector = self.detector
        has_sound = detector.audio_encoder is not None and batch["waveform"].shape[1] > 0
        if "tokens" not in batch:
            return detector(
                batch["crops"].movedim(-1, 2).float() / 255,
                batch["landmarks"],
                batch["valid"],
                batch["waveform"] if has_sound else None,
                batch["frame_times"],
                lengths=batch["lengths"] if has_sound else None,
                mask=batch["mask"],
            )
        visual = detector.merge_regions(batch["tokens"], batch["valid"])
        audio = audio_mask = None
        if has_sound:
            heard = detector.encode_audio(batch["waveform"], batch["lengths"])
            audio, audio_mask = detector.align_audio(
                visual, heard.features, heard.times, batch["frame_times"], heard.mask
            )
        return detector.classify(visual, audio, audio_mask=audio_mask, mask=batch["mask"])[0]


@torch.no_grad()
def trial_logits(
    detector: AUDetector, trial: PreparedTrial, tokens: Tensor | None, accelerator: Accelerator
) -> Tensor:
    """Run a detector over a whole video, from cached tokens if there are any."""
    device = accelerator.device
    with accelerator.autocast():
        if tokens is None:  # in pieces: a video may last an hour
            return detector_logits(detector, trial)
        batch = {
            "tokens": tokens[None],
            "valid": torch.from_numpy(trial.valid)[None],
            "frame_times": torch.from_numpy(trial.timestamps - trial.audio_start)[None],
            "mask": torch.ones(1, trial.num_frames, dtype=torch.bool),
            "waveform": torch.zeros(1, 0),
            "lengths": None,
        }
        if trial.waveform is not None:
            batch["waveform"] = torch.from_numpy(trial.waveform)[None]
        return ClipModel(detector)(to_device(batch, device))[0].float().cpu()


def score(
    detector: AUDetector,
    videos: Sequence[Video],
    tokens: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Return the logits of the held-out videos, each process having run its share."""
    detector.eval()
    sizes = {video.trial.name: len(video.labels) for video in videos}
    mine = set(share_longest_first(sizes, accelerator.num_processes)[accelerator.process_index])
    logits = {
        video.trial.name: trial_logits(
            detector, video.load(), tokens.get(video.trial.name), accelerator
        )
        for video in videos
        if video.trial.name in mine
    }
    return gather_by_name(logits)


@torch.no_grad()
def region_tokens(
    detector: AUDetector, videos: Sequence[Video], *, quiet: bool
) -> dict[str, Tensor]:
    """Encode every frame with a face once; the temporal stage learns from these tokens."""
    detector.eval()
    cached = {}
    with progress_bar("encode", unit="videos", quiet=quiet) as progress:
        for done, video in enumerate(videos, 1):
            cached[video.trial.name] = encode_trial(detector, video.load()).cpu()
            progress(done, len(videos))
    return cached
