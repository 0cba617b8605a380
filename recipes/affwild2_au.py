"""Train, evaluate and use the whole audio-visual Action Unit detector of the paper.

    python recipes/affwild2_au.py demo                     # rendered data, tiny encoders, minutes
    python recipes/affwild2_au.py paper --data.root DIR    # Aff-Wild2, DINOv2-L and WavLM-L
    python recipes/affwild2_au.py smoke                    # seconds: what the tests run
    python recipes/affwild2_au.py demo --help              # every option and its default

It prepares the videos once (faces, landmarks, sound; cached and resumable), trains, and evaluates
on the validation split with the official metric: F1 of the positive class per Action Unit, pooled
over all labelled frames, unweighted mean, beside what trivial systems score. A run leaves in
`--out`: `config.json` (everything that was set), `metrics.json`, `checkpoint/` (safetensors,
thresholds), `timeline.png` and `predictions.csv` of one held-out video.

What is measured and what is only claimed. `demo` has been run as it stands; its data are rendered
from two photographs, so its score says that the pipeline learns, and nothing about people.
`paper` holds every setting of section 4.1, but has never been run on Aff-Wild2, whose data are
licensed; 59.45 % is the paper's own validation figure, not ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

# Two busy cores otherwise spend their time waiting for each other; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor, nn

import mmau
from mmau._files import whole_file
from mmau.calibration import Calibration, best_thresholds, cross_fitted_predictions
from mmau.data.affwild2 import Trial, find_trials, join_labels, read_annotation
from mmau.data.clips import ClipDataset, ClipSampler
from mmau.data.features import prepare_dataset
from mmau.data.prepared_trial import PreparedTrial, load_trial
from mmau.data.synthetic import SyntheticConfig, render_dataset
from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.inference import AUPredictor, detector_logits, encode_trial
from mmau.metrics import (
    AUCounts,
    average_precision,
    bootstrap_by_video,
    paired_bootstrap_by_video,
    trivial_floors,
)
from mmau.models import AUDetector, Component, DetectorConfig, build_detector, save_pretrained
from mmau.modules import LOSSES, TEMPORAL_MODELS
from mmau.plot import save_timeline
from mmau.progress import progress_bar
from mmau.training import SubmoduleAverage, parameter_groups, warmup_cosine

SAMPLE_RATE = 16000


# ------------------------------------------------------------------ configuration
@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """The embedded data set, rendered at run time."""

    num_train: int = 160
    """Training clips."""
    num_validation: int = 40
    """Held-out clips: other seeds, other proportions of the face, the same two photographs."""
    num_frames: int = 160
    """Frames per clip."""
    fps: float = 15.0
    """Frames per second."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the videos are and how they are cut."""

    root: Path | None = None
    """Aff-Wild2: `videos/` and `AU_Detection_Challenge/{Train_Set,Validation_Set}/` in it."""
    render: RenderConfig | None = None
    """Render a data set instead of reading one."""
    prepared: Path | None = None
    """Cache of faces, landmarks and sound; `<out>/prepared` if left out."""
    clip_frames: int = 256
    """Consecutive frames per clip (paper: 256)."""
    jobs: int = 2
    """Processes that prepare videos."""


@dataclass(frozen=True, kw_only=True)
class FrameStage:
    """Teach the visual encoder on single frames before the temporal model sees it.

    A supervised stand-in for a foundation model, for encoders that start from random weights. It
    uses the labels of training frames in which a face was found, and nothing else.
    """

    epochs: int = 3
    """Passes over the frames."""
    batch_size: int = 32
    """Frames per step; small steps learn far more per second here."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """AdamW weight decay."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the detector is trained; the defaults are the paper's (section 4.1)."""

    lr: float = 2e-4
    """Peak learning rate of the new modules."""
    lr_adapters: float = 1e-5
    """Peak learning rate of LoRA and adapter weights inside the encoders."""
    weight_decay: float = 1e-4
    """AdamW weight decay; norms, biases, A_log and the bias of Delta are exempt."""
    epochs: int = 30
    """Passes over the clips. The paper does not say; we chose."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up before the cosine."""
    batch_clips: int = 16
    """Clips per step."""
    clip_grad: float = 1.0
    """Largest norm of the gradient."""
    swa_epochs: int = 5
    """Last epochs whose weights are averaged; 0 for none. The paper says 'the last few'."""
    final_lr: float = 0.05
    """Share of the peak rate at the end: a cosine to zero would leave nothing to average."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    loss: Component = field(default_factory=lambda: Component("asl"))
    """Training loss; `asl` has the paper's gamma_pos 1, gamma_neg 4, margin 0.05 by default."""
    frame_stage: FrameStage | None = None
    """Train the visual encoder on single frames first, then freeze and cache what it sees."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    compare_video_only: bool = False
    """Also train the same detector without sound, and report both on frames without a face."""
    seed: int = 0
    """Seed of data, weights and order."""
    device: str = "cpu"
    """Device to train on."""
    out: Path = Path("runs/affwild2_au")
    """Folder of the run."""


PAPER = Config(
    model=DetectorConfig(
        visual=Component(
            "dinov2", {"name": "facebook/dinov2-large", "lora_rank": 8, "lora_alpha": 16}
        ),
        audio=Component("wavlm", {"name": "microsoft/wavlm-large"}),
        fusion="cross_attention",
        frames_per_chunk=64,
        checkpoint_frames=True,
    ),
    out=Path("runs/paper"),
)
DEMO = Config(
    data=DataConfig(render=RenderConfig(), clip_frames=160),
    model=DetectorConfig(
        visual=Component("tiny"),
        # `tiny_wavlm`, trained from scratch here, learns too, but less in 13 times the time: mean
        # F1 .59 against .66 on the clips of this preset, .34 against .46 where no face is seen.
        audio=Component("log_mel", {"num_mels": 24}),
        d_region=32,
        num_heads=4,
        d_model=64,
        d_audio=32,
        temporal=Component("agssm", {"num_layers": 2, "dropout": 0.1, "dt_range": (0.01, 0.3)}),
        crop_size=64,
    ),
    frame_stage=FrameStage(),
    optim=OptimConfig(lr=3e-3, weight_decay=0.02, epochs=25, warmup_epochs=1.0),
    compare_video_only=True,
    out=Path("runs/demo"),
)
SMOKE = replace(
    DEMO,
    data=DataConfig(
        render=RenderConfig(num_train=4, num_validation=3, num_frames=48), clip_frames=32, jobs=1
    ),
    frame_stage=None,
    optim=OptimConfig(lr=1e-3, epochs=2, warmup_epochs=0.5, batch_clips=4, swa_epochs=1),
    compare_video_only=False,
    out=Path("runs/smoke"),
)
PRESETS = {
    "demo": ("Embedded data, tiny encoders from scratch: minutes on two cores.", DEMO),
    "smoke": ("A few clips, end to end: whether everything runs.", SMOKE),
    "paper": ("Every setting of section 4.1; needs Aff-Wild2 and pretrained weights.", PAPER),
}


def problems_of(config: Config) -> list[str]:
    """Return everything that stands in the way of a run, before any work is done."""
    problems = []
    if (config.data.root is None) == (config.data.render is None):
        problems.append(
            "give the data: --data.root DIR (the Aff-Wild2 folder), or a render preset."
        )
    elif config.data.root is not None:
        labels = config.data.root / "AU_Detection_Challenge"
        for folder in (
            config.data.root,
            config.data.root / "videos",
            labels / "Train_Set",
            labels / "Validation_Set",
        ):
            if not folder.is_dir():
                problems.append(f"no such folder: {folder}")
    for registry, component in (
        (VISUAL_ENCODERS, config.model.visual),
        (AUDIO_ENCODERS, config.model.audio),
        (TEMPORAL_MODELS, config.model.temporal),
        (LOSSES, config.loss),
    ):
        if component is not None:
            try:
                registry.check_options(component.name, component.options)
            except (LookupError, ImportError, TypeError) as error:
                problems.append(str(error))
    for component in (config.model.visual, config.model.audio):
        name = component.options.get("name") if component else None
        if name and not Path(name).is_dir() and not weights_at_hand(name):
            problems.append(
                f"the weights of {name!r} are not on this machine: "
                f"`hf download {name}` fetches them once."
            )
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"--device {config.device}, but torch sees no CUDA device.")
    if config.frame_stage is not None and config.model.alignment != "hga":
        problems.append("the frame stage caches region tokens: it needs --model.alignment hga.")
    if config.optim.swa_epochs > config.optim.epochs:
        problems.append("--optim.swa-epochs must not exceed --optim.epochs.")
    return problems


def weights_at_hand(name: str) -> bool:
    """Return whether a model of the hub is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


# ------------------------------------------------------------------ data
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


def prepare_data(config: Config) -> dict[str, list[Video]]:
    """Render or find the videos, prepare them once, and join the labels by frame number."""
    root = config.data.root
    if config.data.render is not None:
        root = config.out / "data"
        with progress_bar("render", unit="clips") as progress:
            render_dataset(
                root,
                **dataclasses.asdict(config.data.render),
                seed=config.seed,
                config=SyntheticConfig(),
                jobs=config.data.jobs,
                progress=progress,
            )
    trials = [*find_trials(root, "train"), *find_trials(root, "validation")]
    folder = config.data.prepared or config.out / "prepared"
    with progress_bar("find faces", unit="videos") as progress:
        paths = prepare_dataset(
            {trial.name: trial.video for trial in trials},
            folder,
            crop_size=config.model.crop_size,
            jobs=config.data.jobs,
            progress=progress,
        )
    videos: dict[str, list[Video]] = {"train": [], "validation": []}
    for trial in trials:
        labels = read_annotation(trial.annotation).select(config.model.au_names)
        num_frames = load_trial(paths[trial.name], verify=False, memory_map=True).num_frames
        joined = join_labels(labels, np.arange(1, num_frames + 1))
        if joined.report:
            print(f"  {trial.name}: {joined.report}")
        videos[trial.split].append(Video(trial, paths[trial.name], joined.labels))
    for split, found in videos.items():
        if not found:
            raise SystemExit(f"no {split} video in {root}.")
    return videos


class TrainingClips(ClipDataset):
    """Clips with the stretch of sound that belongs to them."""

    margin = 1.0
    """Seconds of sound on either side of a clip, so that its edges are heard in context."""

    def __init__(self, videos: list[Video], clip_frames: int, tokens: Mapping[str, Tensor]) -> None:
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
        super().__init__(trials, clip_frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one clip; times are in seconds after the first sample of its own sound."""
        item = super().__getitem__(index)
        waveform, start = self.sounds[item["trial"]]
        times = item.pop("timestamps")[item["mask"]]
        first = last = 0
        if waveform is not None:
            first = max(0, round((float(times[0]) - self.margin - start) * SAMPLE_RATE))
            last = max(first, round((float(times[-1]) + self.margin - start) * SAMPLE_RATE))
            waveform = torch.from_numpy(waveform[first:last])
        item["waveform"] = torch.zeros(0) if waveform is None else waveform
        item["frame_times"] = torch.zeros(self.clip_frames, dtype=torch.float64)
        item["frame_times"][: len(times)] = times - start - first / SAMPLE_RATE
        return item

    def batches(self, config: Config, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield batches in an order that depends on the seed and the epoch alone."""
        sampler = ClipSampler(len(self), seed=config.seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        for begin in range(0, len(order), config.optim.batch_clips):
            clips = [self[i] for i in order[begin : begin + config.optim.batch_clips]]
            sounds = [clip.pop("waveform") for clip in clips]
            batch = torch.utils.data.default_collate(clips)
            batch["waveform"] = nn.utils.rnn.pad_sequence(sounds, batch_first=True)
            batch["lengths"] = torch.tensor([len(sound) for sound in sounds])
            yield {
                key: value.to(config.device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }


# ------------------------------------------------------------------ training
def clip_logits(detector: AUDetector, batch: dict[str, Any]) -> Tensor:
    """Run the detector over a batch of clips, from cached region tokens if there are any."""
    has_sound = detector.audio_encoder is not None and batch["waveform"].shape[1] > 0
    if "tokens" not in batch:
        images = batch["crops"].movedim(-1, 2).float() / 255
        return detector(
            images,
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


def optimise(
    model: nn.Module, groups: list[dict[str, Any]], config: OptimConfig, steps: int, warmup: int
) -> Any:
    """Return a function that takes one step for a loss, and stops the run if it is not finite."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = warmup_cosine(
        optimizer, warmup_steps=warmup, total_steps=steps, final_factor=config.final_lr
    )

    def step(loss: Tensor, where: str) -> float:
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} at {where}; nothing was saved.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def train_on_frames(detector: AUDetector, videos: list[Video], config: Config) -> None:
    """Teach encoder and HGA on shuffled single frames in which a face was found."""
    stage = config.frame_stage
    crops, landmarks, labels = [], [], []
    for video in videos:
        trial = video.load()
        keep = trial.valid & (video.labels >= 0).any(-1)
        crops.append(trial.crops[keep])
        landmarks.append(trial.landmarks[keep])
        labels.append(video.labels[keep])
    images = torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2).contiguous()
    points, target = map(torch.from_numpy, map(np.concatenate, (landmarks, labels)))
    # The head of this stage is thrown away; the region tokens are what it leaves behind.
    head = nn.Sequential(
        nn.Flatten(),
        nn.LazyLinear(96),
        nn.GELU(),
        nn.Linear(96, len(config.model.au_names)),
    ).to(config.device)
    seen = nn.ModuleDict({"encoder": detector.visual_encoder, "hga": detector.hga, "head": head})
    detector.train()
    head(detector.encode_frames(images[:2].to(config.device) / 255, points[:2].to(config.device)))
    loss_function = LOSSES.create("bce")
    groups = parameter_groups(seen, lr=stage.lr, weight_decay=stage.weight_decay, adapters_in=())
    steps_per_epoch = math.ceil(len(images) / stage.batch_size)
    step = optimise(
        seen, groups, config.optim, stage.epochs * steps_per_epoch, steps_per_epoch // 2
    )
    generator = torch.Generator().manual_seed(config.seed)
    with progress_bar("frame stage", unit="frames") as progress:
        done = 0
        for epoch in range(stage.epochs):
            total = 0.0
            for chosen in torch.randperm(len(images), generator=generator).split(stage.batch_size):
                pictures = images[chosen].to(config.device).float() / 255
                tokens = detector.encode_frames(pictures, points[chosen].to(config.device))
                loss = loss_function(head(tokens), target[chosen].to(config.device))
                total += step(loss, f"frame stage, epoch {epoch + 1}") * len(chosen)
                done += len(chosen)
                progress(done, stage.epochs * len(images))
    print(f"  frame stage: {len(images)} frames, loss of the last epoch {total / len(images):.3f}")


@torch.no_grad()
def region_tokens(detector: AUDetector, videos: list[Video]) -> dict[str, Tensor]:
    """Encode every frame with a face once; the temporal stage learns from these tokens."""
    detector.eval()
    cached = {}
    with progress_bar("encode", unit="videos") as progress:
        for done, video in enumerate(videos, 1):
            cached[video.trial.name] = encode_trial(detector, video.load()).cpu()
            progress(done, len(videos))
    return cached


def train_detector(
    detector: AUDetector, videos: list[Video], tokens: Mapping[str, Tensor], config: Config
) -> None:
    """Train on clips; the temporal and alignment modules end as the mean of the last epochs."""
    optim = config.optim
    clips = TrainingClips(videos, config.data.clip_frames, tokens)
    from_scratch = config.frame_stage is not None or config.model.visual.name == "tiny"
    if tokens:  # what the frame stage taught stays as it is
        for part in (detector.visual_encoder, detector.hga):
            part.requires_grad_(False)
    groups = parameter_groups(
        detector,
        lr=optim.lr,
        lr_adapters=optim.lr_adapters,
        weight_decay=optim.weight_decay,
        adapters_in=() if from_scratch else ("visual_encoder", "audio_encoder"),
    )
    loss_function = LOSSES.create(config.loss.name, **config.loss.options)
    steps_per_epoch = math.ceil(len(clips) / optim.batch_clips)
    step = optimise(
        detector,
        groups,
        optim,
        optim.epochs * steps_per_epoch,
        round(optim.warmup_epochs * steps_per_epoch),
    )
    averaged = ["merge", "temporal", "head_norm", "head"]
    averaged += ["hga"] if detector.hga is not None and not tokens else []
    averaged += ["audio_query"] if detector.audio_query is not None else []
    average = SubmoduleAverage(detector, averaged)
    label = "train" if detector.audio_encoder is not None else "train without sound"
    with progress_bar(label, unit="clips") as progress:
        done = 0
        for epoch in range(optim.epochs):
            detector.train()
            total = 0.0
            for batch in clips.batches(config, epoch):
                loss = loss_function(clip_logits(detector, batch), batch["labels"])
                names = ", ".join(batch["trial"][:4])
                total += step(loss, f"epoch {epoch + 1}, clips {names}") * len(batch["trial"])
                done += len(batch["trial"])
                progress(done, optim.epochs * len(clips))
            if epoch >= optim.epochs - optim.swa_epochs:
                average.update()
    if average.num_updates:
        average.apply()
    print(f"  {label}: {len(clips)} clips, loss of the last epoch {total / len(clips):.4f}")


# ------------------------------------------------------------------ evaluation
@dataclass(frozen=True)
class Scored:
    """What one detector said about the held-out videos."""

    logits: dict[str, Tensor]
    """Video to `(t, c)`."""
    labels: dict[str, Tensor]
    seen: dict[str, Tensor]
    """Video to `(t)`, whether a face was found."""
    groups: dict[str, str]
    """Trial to the video it is cut from: what thresholds must not be chosen on."""


def score(detector: AUDetector, videos: list[Video]) -> Scored:
    """Run a detector over the held-out videos."""
    detector.eval()
    logits, seen = {}, {}
    with progress_bar("evaluate", unit="videos") as progress:
        for done, video in enumerate(videos, 1):
            trial = video.load()
            logits[trial.name] = detector_logits(detector, trial)
            seen[trial.name] = torch.from_numpy(trial.valid)
            progress(done, len(videos))
    return Scored(
        logits,
        {video.trial.name: torch.from_numpy(video.labels) for video in videos},
        seen,
        {video.trial.name: video.trial.video_name for video in videos},
    )


def decisions_of(scored: Scored, loss: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Turn logits into decisions in the ways that are compared; none looks at its own video."""
    probs = {name: torch.sigmoid(logits) for name, logits in scored.logits.items()}
    ways = {"raw at 0.5": {name: prob >= 0.5 for name, prob in probs.items()}}
    if hasattr(loss, "posterior"):
        ways["posterior at 0.5"] = {
            name: loss.posterior(logits) >= 0.5 for name, logits in scored.logits.items()
        }
    ways["thresholds of other videos"] = cross_fitted_predictions(
        probs, scored.labels, groups=scored.groups
    )
    return ways


Subset = Literal["all", "seen", "hidden"]


def labels_of(scored: Scored, subset: Subset) -> dict[str, Tensor]:
    """Return the labels, unknown (-1) outside of the subset of frames."""
    if subset == "all":
        return scored.labels
    kept = {name: seen if subset == "seen" else ~seen for name, seen in scored.seen.items()}
    return {
        name: labels.masked_fill(~kept[name][:, None], -1) for name, labels in scored.labels.items()
    }


def counts_of(
    decisions: dict[str, Tensor], labels: dict[str, Tensor], au_names: tuple[str, ...]
) -> dict[str, AUCounts]:
    """Count each video by itself, so that videos can be resampled."""
    return {
        name: AUCounts(au_names).update(decided, labels[name])
        for name, decided in decisions.items()
    }


def pooled(counts: Mapping[str, AUCounts]) -> AUCounts:
    """Add up all videos: the official score."""
    total = AUCounts(next(iter(counts.values())).au_names)
    for one in counts.values():
        total.merge(one)
    return total


def evaluate(systems: dict[str, Scored], config: Config) -> dict[str, Any]:
    """Print and return every score of every system, with the floors beside them."""
    names = config.model.au_names
    loss = LOSSES.create(config.loss.name, **config.loss.options)
    best_way = "thresholds of other videos"
    main = next(iter(systems.values()))
    subsets: tuple[Subset, ...] = ("all", "seen", "hidden")
    subsets = tuple(
        s for s in subsets if any((one != -1).any() for one in labels_of(main, s).values())
    )
    heads = {"all": "all frames", "seen": "face seen", "hidden": "no face seen"}
    report: dict[str, Any] = {"subsets": {}, "systems": {}, "differences": {}}

    print(f"\nMean F1 over {len(names)} AUs, pooled over {len(main.labels)} held-out videos")
    print("  [95 % interval from resampling videos]\n")
    print(f"  {'':<42}" + "".join(f"{heads[s]:>24}" for s in subsets))
    floors = {
        s: trivial_floors(torch.cat(list(labels_of(main, s).values())), names) for s in subsets
    }
    for title, attribute in (
        ("floor: every AU in every frame", "mean_all_ones"),
        ("floor: chance at the true rate", "mean_prevalence_random"),
    ):
        row = [getattr(floors[s], attribute) for s in subsets]
        report["subsets"][title] = dict(zip(subsets, row, strict=True))
        print(f"  {title:<42}" + "".join(f"{value:>24.3f}" for value in row))

    per_video: dict[tuple[str, str], dict[str, AUCounts]] = {}
    for system, scored in systems.items():
        entry: dict[str, Any] = {}
        for way, decided in decisions_of(scored, loss).items():
            cells = []
            for subset in subsets:
                counts = counts_of(decided, labels_of(scored, subset), names)
                interval = bootstrap_by_video(counts)
                cells.append(str(interval))
                entry.setdefault(way, {})[subset] = dataclasses.asdict(interval)
                if way == best_way:
                    per_video[system, subset] = counts
            title = f"{system}, {way}"
            print(f"  {title:<42}" + "".join(f"{cell:>24}" for cell in cells))
        ranking = []
        for subset in subsets:
            labels = labels_of(scored, subset)
            prob = torch.cat([torch.sigmoid(scored.logits[name]) for name in labels])
            precision = average_precision(prob, torch.cat(list(labels.values())))
            ranking.append(float(precision.nanmean()))
        entry["mean average precision"] = dict(zip(subsets, ranking, strict=True))
        title = f"{system}, mean average precision"
        print(f"  {title:<42}" + "".join(f"{value:>24.3f}" for value in ranking))
        report["systems"][system] = entry

    first, *others = systems
    for other in others:
        for subset in subsets:
            gain = paired_bootstrap_by_video(per_video[first, subset], per_video[other, subset])
            report["differences"][f"{first} - {other}, {subset}"] = dataclasses.asdict(gain)
            print(f"  {first} minus {other}, {heads[subset]}: {gain}")

    total = pooled(per_video[first, "all"])
    print(f"\n  {'F1 per AU (' + first + ')':<26}{'F1':>8}{'floor':>8}{'% active':>10}")
    for i, name in enumerate(names):
        share = 100 * float(total.num_positive[i]) / max(1.0, float(total.num_labelled[i]))
        floor = float(floors["all"].all_ones[i])
        print(f"  {name:<26}{float(total.f1()[i]):>8.3f}{floor:>8.3f}{share:>10.1f}")
    if total.without_positives:
        print(f"  no positive label, so no F1: {', '.join(total.without_positives)}")
    report["per_au"] = total.as_dict()
    return report


# ------------------------------------------------------------------ the run
def provenance_of(config: Config, videos: dict[str, list[Video]], seconds: float) -> dict[str, Any]:
    """Say what the weights were trained on, by what, and on which machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "recipe": "affwild2_au",
        "data": "rendered from two photographs" if config.data.render else "Aff-Wild2",
        "num_videos": {split: len(found) for split, found in videos.items()},
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "commit": commit or "unknown",
        "versions": {"mmau": mmau.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.device}",
    }


def build_and_train(config: Config, videos: list[Video]) -> tuple[AUDetector, AUDetector | None]:
    """Build a detector by name and train it; a second one without sound if it is asked for."""
    torch.manual_seed(config.seed)
    detector = build_detector(config.model).to(config.device)
    tokens: Mapping[str, Tensor] = {}
    if config.frame_stage is not None:
        train_on_frames(detector, videos, config)
        tokens = region_tokens(detector, videos)
    train_detector(detector, videos, tokens, config)
    if not config.compare_video_only or config.model.audio is None:
        return detector, None
    # The same encoder, so that only the sound makes the difference.
    deaf_model = replace(config.model, audio=None)
    torch.manual_seed(config.seed)
    deaf = build_detector(deaf_model).to(config.device)
    deaf.visual_encoder, deaf.hga = detector.visual_encoder, detector.hga
    if not tokens:
        tokens = region_tokens(detector, videos)
    train_detector(deaf, videos, tokens, replace(config, model=deaf_model))
    return detector, deaf


def run(config: Config) -> dict[str, Any]:
    """Prepare, train, evaluate, save and predict; returns what `metrics.json` holds."""
    problems = problems_of(config)
    if problems:
        raise SystemExit("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))
    started = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    with whole_file(config.out / "config.json") as partial:
        partial.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")
    videos = prepare_data(config)
    num_frames = {s: sum(len(v.labels) for v in found) for s, found in videos.items()}
    print(
        f"  {len(videos['train'])} training videos with {num_frames['train']} frames, "
        f"{len(videos['validation'])} held-out videos with {num_frames['validation']} frames"
    )
    detector, deaf = build_and_train(config, videos["train"])
    systems = {"audio + video" if config.model.audio else "video": detector}
    if deaf is not None:
        systems["video only"] = deaf
    scored = {name: score(one, videos["validation"]) for name, one in systems.items()}
    metrics = evaluate(scored, config)

    main = scored[next(iter(scored))]
    probs = torch.cat([torch.sigmoid(one) for one in main.logits.values()])
    calibration = Calibration(
        au_names=config.model.au_names,
        thresholds=tuple(best_thresholds(probs, torch.cat(list(main.labels.values()))).tolist()),
        note="chosen on all held-out videos of the run; the reported scores are cross-fitted",
    )
    checkpoint = config.out / "checkpoint"
    provenance = provenance_of(config, videos, time.monotonic() - started)
    save_pretrained(detector, checkpoint, config=config.model, provenance=provenance)
    calibration.save(checkpoint / "calibration.json")
    metrics["provenance"] = provenance
    with whole_file(config.out / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n")

    example = videos["validation"][0]
    trial = example.load()
    table = AUPredictor.from_pretrained(checkpoint).predict_trial(trial)
    table.write_csv(config.out / "predictions.csv")
    save_timeline(
        table,
        config.out / "timeline.png",
        labels=example.labels,
        waveform=trial.waveform,
        audio_start=trial.audio_start,
        images=trial.crops,
        title=f"{trial.name} (held out)",
    )
    print(f"\n{config.out}: checkpoint/, metrics.json, config.json, timeline.png, predictions.csv")
    print(f"try: mmau predict {example.trial.video} --checkpoint {checkpoint} \\")
    print("         -o out.csv --plot out.png")
    if config.data.render is not None:
        print(
            "These scores are on clips rendered from two photographs: they say that the pipeline "
            "learns, and nothing about people."
        )
    print(f"done in {time.monotonic() - started:.0f} s")
    return metrics


def main() -> None:
    """Read the command line and run."""
    import tyro

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and sys.argv[1] not in PRESETS:
        from mmau._checks import did_you_mean

        raise SystemExit(
            f"no preset named {sys.argv[1]!r}{did_you_mean(sys.argv[1], PRESETS)} "
            f"Available: {', '.join(PRESETS)}."
        )
    run(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))


if __name__ == "__main__":
    main()
