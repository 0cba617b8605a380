"""From videos to batches, from batches to logits: what the loop of the recipe reads and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from affwild2_presets import Config
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmau.data.affwild2 import Trial, find_trials, join_labels, read_annotation
from mmau.data.clips import ClipAugmentation, ClipDataset
from mmau.data.prepare import prepare_dataset
from mmau.data.prepared import PreparedTrial, load_trial
from mmau.inference import detector_logits, encode_trial
from mmau.media import FaceOptions
from mmau.models import AUDetector
from mmau.progress import progress_bar
from mmau.synthetic import render_dataset
from mmau.training import ItemKey, gather_by_name, share_longest_first

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Video:
    """One annotated trial, prepared."""

    trial: Trial
    path: Path
    labels: np.ndarray
    """`(t, c)` int8 in {0, 1, -1}, one row per decoded frame."""

    def load(self) -> PreparedTrial:
        """Open crops, landmarks and sound in the cache; they are read when a clip is cut."""
        return load_trial(self.path, verify=False, memory_map=True)


def prepare_data(config: Config, accelerator: Accelerator) -> dict[str, list[Video]]:
    """Render or find the videos, prepare them once, and join the labels by frame number."""
    quiet = not accelerator.is_main_process
    root = config.data.root
    if config.data.render is not None:
        root = config.out / "data"
        if accelerator.is_main_process:
            render = config.data.render
            with progress_bar("render", unit="clips") as progress:
                render_dataset(
                    root,
                    num_train=render.num_train,
                    num_validation=render.num_validation,
                    seed=config.seed,
                    config=render.clip,
                    jobs=config.data.jobs,
                    progress=progress,
                )
        accelerator.wait_for_everyone()
    trials = [*find_trials(root, "train"), *find_trials(root, "validation")]
    paths = _prepare(trials, config, accelerator)
    videos: dict[str, list[Video]] = {"train": [], "validation": []}
    for trial in trials:
        labels = read_annotation(trial.annotation).select(config.model.au_names)
        num_frames = load_trial(paths[trial.name], verify=False, memory_map=True).num_frames
        joined = join_labels(labels, np.arange(1, num_frames + 1))
        if joined.report and not quiet:
            print(f"  {trial.name}: {joined.report}")
        videos[trial.split].append(Video(trial, paths[trial.name], joined.labels))
    for split, found in videos.items():
        if not found:
            raise SystemExit(f"no {split} video in {root}.")
    return videos


def _prepare(
    trials: Sequence[Trial], config: Config, accelerator: Accelerator
) -> Mapping[str, Path]:
    """Find faces and sound: each process in its share of the videos, then all read all."""
    videos = {trial.name: trial.video for trial in trials}
    folder = config.data.prepared or config.out / "prepared"
    shares = [list(videos)]
    if accelerator.num_processes > 1:
        # Two trials may be cut from one video; who prepares it is decided by its size.
        sizes = {name: path.stat().st_size for name, path in videos.items()}
        shares = share_longest_first(sizes, accelerator.num_processes)
    options = {"crop_size": config.model.crop_size, "jobs": config.data.jobs}

    def prepare(names: Sequence[str], *, quiet: bool) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for face in sorted({trial.face for trial in trials}):
            chosen = {t.name: t.video for t in trials if t.face == face and t.name in names}
            label = "find faces" if face == "largest" else f"find faces, {face}"
            with progress_bar(label, unit="videos", quiet=quiet or not chosen) as progress:
                paths |= prepare_dataset(
                    chosen, folder, faces=FaceOptions(face=face), progress=progress, **options
                )
        return paths

    paths = prepare(shares[accelerator.process_index], quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return paths if len(shares) == 1 else prepare(list(videos), quiet=True)


class TrainingFrames(Dataset[dict[str, Any]]):
    """Single frames in which a face was found and something is labelled, in memory."""

    def __init__(self, videos: Sequence[Video]) -> None:
        crops, landmarks, labels = [], [], []
        self.names: list[str] = []
        for video in videos:
            trial = video.load()
            keep = trial.valid & (video.labels >= 0).any(-1)
            crops.append(trial.crops[keep])
            landmarks.append(trial.landmarks[keep])
            labels.append(video.labels[keep])
            self.names += [f"{trial.name} frame {frame + 1}" for frame in np.flatnonzero(keep)]
        self.crops, self.landmarks, self.labels = map(np.concatenate, (crops, landmarks, labels))
        self.num_labelled = torch.from_numpy((self.labels >= 0).sum(-1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[ItemKey]) -> dict[str, Any]:
        """Return a batch at once, which is far faster than frame by frame."""
        items = [key.item for key in keys]
        labels = torch.from_numpy(self.labels[items])
        return {
            "images": torch.from_numpy(self.crops[items]).movedim(-1, 1).contiguous(),
            "landmarks": torch.from_numpy(self.landmarks[items]),
            "labels": labels if keys[0].counts else torch.full_like(labels, -1),
        }

    def name(self, item: int) -> str:
        """Say which frame it is."""
        return self.names[item]

    @staticmethod
    def collate(batch: dict[str, Any]) -> dict[str, Any]:
        """Leave a batch as it is."""
        return batch


class TrainingClips(ClipDataset):
    """Clips with the segment of sound that belongs to them, from crops or from cached tokens."""

    margin = 1.0
    """Seconds of sound on either side of a clip, so that its edges have context."""

    def __init__(
        self, videos: Sequence[Video], config: Config, tokens: Mapping[str, Tensor]
    ) -> None:
        self.sounds, trials = {}, {}
        for video in videos:
            trial = video.load()
            arrays = {
                "labels": video.labels,
                "valid": trial.valid,
                "timestamps": trial.timestamps,
            }
            if tokens:
                arrays["tokens"] = tokens[trial.name]
            else:
                arrays |= {"crops": trial.crops, "landmarks": trial.landmarks}
            trials[trial.name] = arrays
            self.sounds[trial.name] = (trial.waveform, trial.audio_start)
        super().__init__(trials, config.data.clip_frames)
        self.changes = ClipAugmentation(
            seed=config.seed,
            flip=config.data.flip,
            drop_visual=config.data.drop_face,
            drop_audio=config.data.drop_sound,
            scheme=config.model.regions,
        )
        counts = [
            (trials[w.trial]["labels"][w.start : w.start + w.length] >= 0).sum()
            for w in self.windows
        ]
        self.num_labelled = torch.tensor(counts)

    def __getitem__(self, key: ItemKey) -> dict[str, Any]:
        """Return one clip; times are in seconds after the first sample of its own sound."""
        # Drawn from seed, epoch and clip: the same in any process, before and after a resume.
        item = super().__getitem__(key.item)
        item = self.changes(item, epoch=key.epoch, index=key.item)
        waveform, start = self.sounds[item["trial"]]
        times = item.pop("timestamps")[item["mask"]]
        if not bool(item["keep_audio"]):
            waveform = None
        first = last = 0
        if waveform is not None:
            first = max(0, round((float(times[0]) - self.margin - start) * SAMPLE_RATE))
            last = max(first, round((float(times[-1]) + self.margin - start) * SAMPLE_RATE))
            waveform = torch.from_numpy(waveform[first:last])
        item["waveform"] = torch.zeros(0) if waveform is None else waveform
        item["frame_times"] = torch.zeros(self.clip_frames, dtype=torch.float64)
        item["frame_times"][: len(times)] = times - start - first / SAMPLE_RATE
        if not key.counts:
            item["labels"] = torch.full_like(item["labels"], -1)
        return item

    def name(self, item: int) -> str:
        """Say which clip it is."""
        window = self.windows[item]
        return f"{window.trial} frames {window.start + 1}-{window.start + window.length}"

    @staticmethod
    def collate(clips: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack clips, and pad their sounds to the longest."""
        sounds = [clip.pop("waveform") for clip in clips]
        batch = torch.utils.data.default_collate(clips)
        batch["waveform"] = nn.utils.rnn.pad_sequence(sounds, batch_first=True)
        batch["lengths"] = torch.tensor([len(sound) for sound in sounds])
        return batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


# ------------------------------------------------------------------ from batches to logits
class FrameModel(nn.Module):
    """Frames to logits; its head is dropped, the region tokens are what later stages use."""

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
    """Clips to logits, from cached region tokens if there are any.

    With `window`, the state of the temporal model is reset after every so many frames.
    """

    def __init__(self, detector: AUDetector, window: int | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.window = window

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
            encoded = detector.encode_audio(batch["waveform"], batch["lengths"])
            audio, audio_mask = detector.align_audio(
                visual, encoded.features, encoded.times, batch["frame_times"], encoded.mask
            )
        num_frames = visual.shape[1]
        logits = []
        for start in range(0, num_frames, self.window or num_frames):
            part = slice(start, start + (self.window or num_frames))
            logits.append(
                detector.classify(
                    visual[:, part],
                    None if audio is None else audio[:, part],
                    audio_mask=None if audio_mask is None else audio_mask[:, part],
                    mask=batch["mask"][:, part],
                )[0]
            )
        return torch.cat(logits, dim=1)


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


@torch.no_grad()
def score(
    detector: AUDetector,
    videos: Sequence[Video],
    tokens: Mapping[str, Tensor],
    accelerator: Accelerator,
    window: int | None = None,
) -> dict[str, Tensor]:
    """Return the logits of the held-out videos, each process having run its share.

    With `window`, which needs cached tokens, the temporal state is reset after so many frames.
    """
    detector.eval()
    sizes = {video.trial.name: len(video.labels) for video in videos}
    mine = set(share_longest_first(sizes, accelerator.num_processes)[accelerator.process_index])
    logits = {}
    for video in videos:
        name = video.trial.name
        if name not in mine:
            continue
        trial = video.load()
        with accelerator.autocast():
            if name in tokens:
                batch = to_device(whole_video(trial, tokens[name]), accelerator.device)
                logits[name] = ClipModel(detector, window)(batch)[0].float().cpu()
            else:  # in chunks: a video may last an hour
                logits[name] = detector_logits(detector, trial)
    return gather_by_name(logits)


def whole_video(trial: PreparedTrial, tokens: Tensor) -> dict[str, Any]:
    """Return a video as a batch of one clip."""
    waveform = trial.waveform
    return {
        "tokens": tokens[None],
        "valid": torch.from_numpy(trial.valid)[None],
        "frame_times": torch.from_numpy(trial.timestamps - trial.audio_start)[None],
        "mask": torch.ones(1, trial.num_frames, dtype=torch.bool),
        "waveform": torch.zeros(1, 0) if waveform is None else torch.from_numpy(waveform)[None],
        "lengths": None,
    }
