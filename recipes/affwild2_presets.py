"""Options of the recipe, presets, rows of the ablation (Table 1), and what rules a run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmau.data.affwild2_check import check_data_root
from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.models import Component, DetectorConfig
from mmau.modules import LOSSES, TEMPORAL_MODELS
from mmau.synthetic import SyntheticConfig
from mmau.training import differing_settings


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """The embedded data set, rendered at run time."""

    num_train: int = 160
    """Training clips."""
    num_validation: int = 40
    """Held-out clips: other seeds, other proportions of the face, the same two photographs."""
    clip: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Size, difficulty and appearance of a clip."""


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
    flip: float = 0.0
    """Share of training clips that are mirrored."""
    drop_sound: float = 0.0
    """Share of training clips that lose their sound (modality dropout)."""
    drop_face: float = 0.0
    """Share of training clips that lose their images; never both at once."""
    jobs: int = 2
    """Processes that prepare videos, on each machine or GPU."""
    workers: int = 0
    """Processes that read clips ahead of training, per GPU; 0 reads in the training process."""


@dataclass(frozen=True, kw_only=True)
class FrameStage:
    """Pretrain the visual encoder on single frames before the temporal model is trained.

    A supervised stand-in for a foundation model, for encoders that start from random weights. It
    uses the labels of training frames in which a face was found, and nothing else. The encoder is
    frozen afterwards, and its features are computed once.
    """

    epochs: int = 3
    """Passes over the frames; 0 leaves the encoder randomly initialised."""
    batch_size: int = 32
    """Frames per step; small steps learn far more per second here."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """AdamW weight decay."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the detector is trained; the defaults follow section 4.1."""

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
    """Clips per step, over all GPUs and micro-batches (paper: 16 per GPU)."""
    accumulate: int = 1
    """Micro-batches of a step, one after the other, whose gradients are added up: less memory."""
    clip_grad: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and loss stay fp32. fp16 needs a GPU."""
    swa_epochs: int = 5
    """Last epochs whose weights are averaged; 0 for none. The paper says 'the last few'."""
    swa_lr: float | None = None
    """Constant learning rate of the new modules in those epochs; the cosine if left out."""
    final_lr: float = 0.05
    """Share of the peak rate at the end: a cosine to zero would leave nothing to average."""
    validate_every: int = 1
    """Epochs from one validation to the next; 0 for never. The best one is kept in `best/`."""
    patience: int | None = None
    """Validations without a gain after which training stops; never if left out."""


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """How often a run makes sure that it can be continued."""

    every: int = 100
    """Steps from one state on disk to the next."""
    keep: int = 2
    """States that are kept."""
    keep_when_done: bool = True
    """Keep the last states of a finished run: the same command then trains nothing again."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    loss: Component = field(default_factory=lambda: Component("asl"))
    """Training loss; `asl` has the paper's gamma_pos 1, gamma_neg 4, margin 0.05 by default."""
    frame_stage: FrameStage | None = None
    """Train the visual encoder on single frames first, then freeze it and cache its features."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    states: StateConfig = field(default_factory=StateConfig)
    compare_video_only: bool = False
    """Also train the same detector without sound, and report both on frames without a face."""
    tensorboard: bool = False
    """Write the numbers of `metrics.jsonl` for TensorBoard, too."""
    seed: int = 0
    """Seed of data, weights and order."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; with `torchrun`, one process per GPU."""
    out: Path = Path("runs/affwild2_au")
    """Folder of the run."""


MAY_CHANGE = ("out", "data.jobs", "data.workers", "data.prepared", "states", "tensorboard")
"""Settings that another start of the same run may change; all others would change its result."""

# ------------------------------------------------------------------ the paper
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
    optim=OptimConfig(precision="bf16"),
    device="cuda",
    out=Path("runs/paper"),
)

# ------------------------------------------------------------------ the embedded default
DEMO = Config(
    data=DataConfig(render=RenderConfig(), clip_frames=160),
    model=DetectorConfig(
        visual=Component("tiny"),
        # `tiny_wavlm`, trained from scratch here, learns too, but less in 13 times the time: mean
        # F1 .59 against .66 on the clips of this preset, .34 against .46 where no face is found.
        audio=Component("log_mel", {"num_mels": 24}),
        d_region=32,
        num_heads=4,
        d_model=64,
        d_audio=32,
        temporal=Component("agssm", {"num_layers": 2, "dropout": 0.1, "dt_range": (0.01, 0.3)}),
        crop_size=64,
    ),
    frame_stage=FrameStage(),
    optim=OptimConfig(lr=3e-3, weight_decay=0.02, epochs=25, warmup_epochs=1.0, validate_every=5),
    states=StateConfig(keep_when_done=False),
    compare_video_only=True,
    out=Path("runs/demo"),
)
SMOKE = replace(
    DEMO,
    data=DataConfig(
        render=RenderConfig(num_train=4, num_validation=3, clip=SyntheticConfig(num_frames=48)),
        clip_frames=32,
        jobs=1,
    ),
    frame_stage=None,
    optim=OptimConfig(lr=1e-3, epochs=2, warmup_epochs=0.5, batch_clips=4, swa_epochs=1),
    compare_video_only=False,
    out=Path("runs/smoke"),
)


# ------------------------------------------------------------------ Table 1
@dataclass(frozen=True)
class Row:
    """One row of the ablation: what differs from the row before it is what it is about."""

    summary: str
    """What the row has."""
    alignment: Literal["global_pool", "hga"]
    """Mean of all patches, or regions by landmarks with cross-attention."""
    temporal: Literal["tcn", "agssm"]
    """Model over time."""
    loss: Literal["bce", "focal", "asl"]
    """Training loss."""
    foundation: bool = True
    """Whether the encoders are the strong ones."""
    paper: float | None = None
    """Validation F1 in % that the paper claims; not ours."""


ROWS: dict[str, Row] = {
    "baseline": Row(
        "ViT-B, Whisper, global pooling, TCN, BCE", "global_pool", "tcn", "bce", False, 36.50
    ),
    "fm": Row("+ foundation encoders", "global_pool", "tcn", "bce", paper=52.41),
    "hga": Row("+ HGA", "hga", "tcn", "bce", paper=55.18),
    "agssm": Row("+ AG-SSM", "hga", "agssm", "bce", paper=57.82),
    "full": Row("+ ASL: the whole system", "hga", "agssm", "asl", paper=59.45),
    "focal": Row("focal instead of ASL, the rejected one", "hga", "agssm", "focal"),
}
"""Table 1, top to bottom; each row keeps everything of the row above but one thing."""


def at_paper_size(row: Row, config: Config = PAPER) -> Config:
    """Return a row with the encoders and widths of the paper.

    Audio cross-attention belongs to the alignment: rows without HGA interpolate.
    """
    model = replace(
        config.model,
        alignment=row.alignment,
        fusion="cross_attention" if row.alignment == "hga" else "interpolate",
        temporal=Component(row.temporal),
    )
    if not row.foundation:
        model = replace(
            model,
            visual=Component("vit", {"name": "google/vit-base-patch16-224-in21k"}),
            audio=Component("whisper", {"name": "openai/whisper-base"}),
        )
    return replace(config, model=model, loss=Component(row.loss))


def at_demo_size(row: Row, config: Config = DEMO) -> Config:
    """Return a row with the small encoders of the embedded default.

    What stands for a foundation encoder is the small one pretrained on single frames; what stands
    for the baseline's is the same one, randomly initialised. Both have the same log-mel energies.
    """
    options = {
        "tcn": {"num_layers": 4, "d_hidden": 64, "dropout": 0.1},
        "agssm": {"num_layers": 2, "dropout": 0.1, "dt_range": (0.01, 0.3)},
    }
    model = replace(
        config.model,
        alignment=row.alignment,
        temporal=Component(row.temporal, options[row.temporal]),
    )
    stage = config.frame_stage
    if stage is not None and not row.foundation:
        stage = replace(stage, epochs=0)
    return replace(config, model=model, loss=Component(row.loss), frame_stage=stage)


PRESETS: dict[str, tuple[str, Config]] = {
    "demo": ("Embedded data, tiny encoders from scratch: minutes on two cores.", DEMO),
    "smoke": ("A few clips, end to end: whether everything runs.", SMOKE),
    "paper": ("Section 4.1 of the paper; needs Aff-Wild2 and pretrained weights.", PAPER),
    **{
        name: (
            f"Table 1 at paper size: {row.summary}.",
            replace(at_paper_size(row), out=Path(f"runs/{name}")),
        )
        for name, row in ROWS.items()
    },
}
"""Name to what it is for and its settings; `paper` and `full` are the same system."""


def presets_with_row(name: str) -> Mapping[str, tuple[str, Config]]:
    """Return the presets with the components of one row of Table 1, each at its own size."""
    row = ROWS[name]
    changed = {}
    for preset, (summary, config) in PRESETS.items():
        size = at_demo_size if config.data.render is not None else at_paper_size
        out = config.out.with_name(f"{config.out.name}-{name}")
        changed[preset] = (summary, replace(size(row, config), out=out))
    return changed


# ------------------------------------------------------------------ before the work
def problems_of(config: Config, settings: Mapping[str, Any], num_ranks: int = 1) -> list[str]:
    """Return everything that stands in the way of a run; `settings` are the config as JSON."""
    optim, problems = config.optim, _problems_of_data_root(config)
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
        if name and not Path(name).is_dir() and not _weights_at_hand(name):
            problems.append(
                f"the weights of {name!r} are not on this machine: "
                f"`hf download {name}` fetches them once."
            )
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda, but torch finds no CUDA device.")
    if config.device == "cpu" and optim.precision == "fp16":
        problems.append("--optim.precision fp16 needs a GPU; on a CPU, bf16 or fp32 work.")
    if optim.swa_epochs > optim.epochs:
        problems.append("--optim.swa-epochs must not exceed --optim.epochs.")
    if optim.swa_lr is not None and not 0 <= optim.swa_lr <= optim.lr:
        problems.append(f"--optim.swa-lr must be 0 to --optim.lr, {optim.lr}; got {optim.swa_lr}.")
    if optim.patience is not None and not optim.validate_every:
        problems.append("--optim.patience counts validations: it needs --optim.validate-every.")
    if optim.batch_clips < num_ranks:
        problems.append(
            f"--optim.batch-clips {optim.batch_clips} cannot be shared by {num_ranks} processes; "
            "give at least one clip to each."
        )
    if config.data.drop_sound + config.data.drop_face > 1:
        problems.append("--data.drop-sound and --data.drop-face must not exceed 1 together.")
    if config.data.flip and config.frame_stage is not None:
        problems.append("--data.flip mirrors images, but a frame stage caches their features.")
    record = config.out / "config.json"
    if any(config.out.glob("*/states/step-*.pt")):
        differing = differing_settings(record, settings, ignore=MAY_CHANGE)
        if differing:
            problems.append(
                f"{config.out} holds a run with other settings ({'; '.join(differing[:4])}"
                f"{f'; and {len(differing) - 4} more' if len(differing) > 4 else ''}). Give "
                "another --out, or delete that folder to start over."
            )
    return problems


def stop_if(problems: Sequence[str]) -> None:
    """End the run with one line per problem, if there is any."""
    if problems:
        raise SystemExit("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def _problems_of_data_root(config: Config) -> list[str]:
    if (config.data.root is None) == (config.data.render is None):
        return ["give the data: --data.root DIR (the Aff-Wild2 folder), or a render preset."]
    if config.data.root is None:
        return []
    labels = config.data.root / "AU_Detection_Challenge"
    folders = (
        config.data.root,
        config.data.root / "videos",
        labels / "Train_Set",
        labels / "Validation_Set",
    )
    missing = [f"no such folder: {folder}" for folder in folders if not folder.is_dir()]
    if missing:
        return missing
    # `mmau doctor` opens the videos, too, and lists what is merely odd.
    findings = check_data_root(config.data.root, open_videos=False)
    return [f"{one.where}: {one.message}" for one in findings if one.severity == "error"]


def _weights_at_hand(name: str) -> bool:
    """Return whether a model of the hub is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
