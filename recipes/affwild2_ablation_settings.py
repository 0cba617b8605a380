"""What the ablation compares: tables, their lines, and the data that are made for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from affwild2_presets import DEMO, ROWS, Config, FrameStage, RenderConfig, at_demo_size

from mmau.models import Component
from mmau.synthetic import SyntheticConfig


@dataclass(frozen=True)
class Variant:
    """One line of a table: a row of Table 1, or one with a change."""

    title: str
    row: str
    """Key of `ROWS`."""
    against: str | None = None
    """Which line of the same table it is compared with."""
    temporal: Component | None = None
    """Another temporal model than the row's."""
    loss: Component | None = None
    """Another loss than the row's."""
    pooled_regions: bool = False
    """Regions without cross-attention in place of HGA."""
    window: float | None = None
    """Seconds after which the state is thrown away in evaluation; never if `None`."""
    trained_as: str | None = None
    """Take the weights of that line."""


@dataclass(frozen=True)
class Setting:
    """Data made for a question, and the lines that answer it."""

    question: str
    variants: Mapping[str, Variant]
    render: RenderConfig = field(default_factory=RenderConfig)
    clip_frames: int = 160
    epochs: int = 20
    batch_clips: int = 16
    frame_epochs: int = 2
    """Passes over the single frames that teach the encoder."""


def _tcn(num_layers: int) -> Component:
    return Component("tcn", {"num_layers": num_layers, "d_hidden": 64, "dropout": 0.1})


# The range of step sizes that Mamba starts from: up to a thousand frames of memory.
_SLOW = Component("agssm", {"num_layers": 2, "dropout": 0.1, "dt_range": (1e-3, 0.3)})


def _hard(*, clips: tuple[int, int] = (160, 40), **difficulty: Any):
    return RenderConfig(
        num_train=clips[0], num_validation=clips[1], clip=SyntheticConfig(**difficulty)
    )


SETTINGS = {
    "table1": Setting(
        "Every row of Table 1 on the default data: what does each step add?",
        {
            "baseline": Variant("untaught encoder, global pooling, TCN, BCE", "baseline"),
            "fm": Variant("+ taught encoder", "fm", "baseline"),
            "hga": Variant("+ HGA", "hga", "fm"),
            "agssm": Variant("+ AG-SSM", "agssm", "hga"),
            "full": Variant("+ ASL", "full", "agssm"),
            "focal": Variant("focal instead of ASL", "focal", "agssm"),
        },
    ),
    "occlusion": Setting(
        "Something covers part of the face half of the time: does attention see past it?",
        {
            "fm": Variant("global pooling", "fm"),
            "pool": Variant("region means, no cross-attention", "hga", "fm", pooled_regions=True),
            "hga": Variant("HGA: region means and cross-attention", "hga", "pool"),
        },
        _hard(occluded=0.5, hidden=(0.0, 0.0)),
        epochs=12,
        frame_epochs=1,  # of more than twice as many frames: the face is never hidden
    ),
    "memory": Setting(
        "A bell decides what sounds mean for the next 30 to 80 s, mostly with no face to be seen: "
        "who remembers it?",
        {
            "tcn": Variant("TCN that sees 12 s back", "hga", temporal=_tcn(4)),
            "long": Variant("TCN that sees 50 s back", "hga", "tcn", temporal=_tcn(6)),
            "agssm": Variant("AG-SSM, state carried", "agssm", "tcn", temporal=_SLOW),
            "reset": Variant(
                "AG-SSM, state thrown away every 10 s", "agssm", "agssm", temporal=_SLOW,
                window=10.0, trained_as="agssm",
            ),
        },
        _hard(
            clips=(80, 24), num_frames=600, fps=5.0, context=(30.0, 80.0), distractors=0.1,
            silent=0.05, visible=(1.5, 3.0), hidden=(6.0, 12.0),
        ),
        clip_frames=600,
        epochs=40,
        batch_clips=8,
    ),
    "rare": Setting(
        "Four of six episodes are rare: which loss is right at the fixed threshold of 0.5?",
        {
            "agssm": Variant("BCE", "agssm"),
            "full": Variant("ASL", "full", "agssm"),
            "focal": Variant("focal", "focal", "agssm"),
        },
        _hard(clips=(160, 80), episode_weights=(0.42, 0.42, 0.04, 0.04, 0.04, 0.04)),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What to run."""

    settings: tuple[Literal["table1", "occlusion", "memory", "rare"], ...] = (
        "table1",
        "occlusion",
        "memory",
        "rare",
    )
    """Which tables."""
    seeds: int = 3
    """Trainings of each line, which differ in weights and order, not in the data."""
    jobs: int = 2
    """Trainings at the same time, one thread each."""
    scale: float = 1.0
    """Share of the clips and epochs; below 1 only to see that everything runs."""
    out: Path = Path("runs/ablation")
    """Where data, trained lines, `ablation.json` and `ablation.md` go."""


def config_of(name: str, variant: Variant, seed: int, ablation: AblationConfig) -> Config:
    """Return the settings of one line of one table."""
    setting, scale = SETTINGS[name], ablation.scale
    render = replace(
        setting.render,
        num_train=max(2, round(scale * setting.render.num_train)),
        num_validation=max(2, round(scale * setting.render.num_validation)),
    )
    epochs = max(1, round(scale * setting.epochs))
    config = at_demo_size(
        ROWS[variant.row],
        replace(
            DEMO,
            data=replace(DEMO.data, render=render, clip_frames=setting.clip_frames),
            frame_stage=FrameStage(epochs=max(1, round(scale * setting.frame_epochs))),
            optim=replace(
                DEMO.optim,
                epochs=epochs,
                batch_clips=setting.batch_clips,
                swa_epochs=min(5, epochs),
                validate_every=0,
            ),
            seed=seed,
        ),
    )
    return replace(
        config,
        model=replace(config.model, temporal=variant.temporal or config.model.temporal),
        loss=variant.loss or config.loss,
    )
