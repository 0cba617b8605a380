"""The recipe's data: videos prepared once, frames and clips as batches for training."""

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
from mmau.media import FaceOptions
from mmau.progress import progress_bar
from mmau.synthetic import render_dataset
from mmau.training import ItemKey, share_longest_first

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
    """Clips with the stretch of sound that belongs to them, from crops or from cached tokens."""

    margin = 1.0
    """Seconds of sound on either side of a clip, so that its edges are heard in context."""

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
