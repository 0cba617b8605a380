"""The ablation on embedded data: every row of Table 1, and settings made for one component each.

    python recipes/affwild2_au.py ablation                        # everything; see `--help`
    python recipes/affwild2_au.py ablation --settings table1 --seeds 1

All rows of a setting have the same data, the same steps and the same seeds. Each row is trained
once per seed; counts are pooled over the seeds, and 95 % CIs resample videos, paired between a row
and its baseline row. Finished rows are kept and not trained again.

What stands for what. The foundation encoder is a small one, pretrained on single labelled frames of
the training clips; the baseline's is the same one, randomly initialised. Nothing stands for WavLM
against Whisper: all rows have the same log-mel energies. So "+ foundation encoders" shows what a
pretrained encoder is worth here, and says nothing about DINOv2 or WavLM. The data are rendered from
two photographs: a component that helps here need not help on people, nor the other way round.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from accelerate import Accelerator
from affwild2_au import start_accelerator, train_detector, train_on_frames
from affwild2_data import Video, prepare_data, region_tokens, score
from affwild2_presets import DEMO, ROWS, Config, FrameStage, RenderConfig, at_demo_size
from affwild2_report import scored_trials
from torch import Tensor, nn

from mmau._files import atomic_write
from mmau.encoders.backbone import count_parameters
from mmau.evaluation import (
    AUCounts,
    BootstrapOptions,
    FitOptions,
    Interval,
    bootstrap_by_video,
    evaluate_trials,
    paired_bootstrap_by_video,
)
from mmau.functional import region_pooling
from mmau.models import AUDetector, Component, build_detector
from mmau.modules import LOSSES, HGAOutput
from mmau.synthetic import SyntheticConfig
from mmau.training import StateFiles, seed_everything


# ------------------------------------------------------------------ what is compared
@dataclass(frozen=True)
class Variant:
    """One line of a table: a row of Table 1, or one with a change."""

    title: str
    row: str
    """Key of `ROWS`."""
    baseline: str | None = None
    """Which line of the same table it is compared with."""
    temporal: Component | None = None
    """Another temporal model than the row's."""
    loss: Component | None = None
    """Another loss than the row's."""
    pooled_regions: bool = False
    """Regions without cross-attention in place of HGA."""
    window: float | None = None
    """Seconds after which the state is reset in evaluation; never if `None`."""
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
    """Passes over the single frames that pretrain the encoder."""


def tcn(num_layers: int) -> Component:
    """Return the TCN of Table 1 with another number of layers."""
    return Component("tcn", {"num_layers": num_layers, "d_hidden": 64, "dropout": 0.1})


# The range of step sizes that Mamba starts from: up to a thousand frames of memory.
SLOW = Component("agssm", {"num_layers": 2, "dropout": 0.1, "dt_range": (1e-3, 0.3)})


def rendered(*, clips: tuple[int, int] = (160, 40), **difficulty: Any) -> RenderConfig:
    """Return data of another difficulty than the default."""
    return RenderConfig(
        num_train=clips[0], num_validation=clips[1], clip=SyntheticConfig(**difficulty)
    )


SETTINGS = {
    "table1": Setting(
        "Every row of Table 1 on the default data: what does each step add?",
        {
            "baseline": Variant("random encoder, global pooling, TCN, BCE", "baseline"),
            "fm": Variant("+ pretrained encoder", "fm", "baseline"),
            "hga": Variant("+ HGA", "hga", "fm"),
            "agssm": Variant("+ AG-SSM", "agssm", "hga"),
            "full": Variant("+ ASL", "full", "agssm"),
            "focal": Variant("focal instead of ASL", "focal", "agssm"),
        },
    ),
    "occlusion": Setting(
        "Something covers part of the face half of the time: does attention help?",
        {
            "fm": Variant("global pooling", "fm"),
            "pool": Variant("region means, no cross-attention", "hga", "fm", pooled_regions=True),
            "hga": Variant("HGA: region means and cross-attention", "hga", "pool"),
        },
        rendered(occluded=0.5, hidden=(0.0, 0.0)),
        epochs=12,
        frame_epochs=1,  # of more than twice as many frames: the face is never hidden
    ),
    "memory": Setting(
        "A bell decides what sounds mean for the next 30 to 80 s, mostly with no face in view: "
        "which model remembers it?",
        {
            "tcn": Variant("TCN, receptive field 12 s", "hga", temporal=tcn(4)),
            "long": Variant("TCN, receptive field 50 s", "hga", "tcn", temporal=tcn(6)),
            "agssm": Variant("AG-SSM, state carried", "agssm", "tcn", temporal=SLOW),
            "reset": Variant(
                "AG-SSM, state reset every 10 s", "agssm", "agssm", temporal=SLOW,
                window=10.0, trained_as="agssm",
            ),
        },
        rendered(
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
        rendered(clips=(160, 80), episode_weights=(0.42, 0.42, 0.04, 0.04, 0.04, 0.04)),
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


def data_config(name: str, ablation: AblationConfig) -> Config:
    """Return a config whose data are those of a table; they do not depend on the line."""
    first = next(iter(SETTINGS[name].variants.values()))
    return replace(config_of(name, first, 0, ablation), out=ablation.out / name)


# ------------------------------------------------------------------ one training
class PooledRegions(nn.Module):
    """Region tokens from the local and the global mean alone: HGA without its cross-attention."""

    def __init__(self, d_visual: int, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.mix = nn.Sequential(
            nn.Linear(2 * d_visual, d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )

    def forward(self, patch_tokens: Tensor, weights: Tensor) -> HGAOutput:
        """Return `(..., m, d)` tokens."""
        local, overall = region_pooling(patch_tokens, weights)
        both = torch.cat([local, overall.unsqueeze(-2).expand_as(local)], dim=-1)
        return HGAOutput(self.mix(both), None)


def run_seed(name: str, seed: int, ablation: AblationConfig) -> None:
    """Train and score all lines of a table once; what is finished already is left alone."""
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    folder = ablation.out / name / f"seed-{seed}"
    results = {key: folder / f"{key}.pt" for key in setting.variants}
    if all(path.is_file() for path in results.values()):
        return
    accelerator = start_accelerator(DEMO)
    videos = prepare_data(data_config(name, ablation), accelerator)
    encoded: dict[str, tuple[AUDetector, dict[str, Tensor], float]] = {}
    trained: dict[str, AUDetector] = {}
    for key, variant in setting.variants.items():
        config = replace(config_of(name, variant, seed, ablation), out=folder / key)
        regions = "regions" if variant.pooled_regions else config.model.alignment
        encoder = f"{'frames' if config.frame_stage.epochs else 'random'}-{regions}"
        if encoder not in encoded:
            alone = replace(config, out=folder / encoder)
            encoded[encoder] = encode_videos(variant, alone, videos, accelerator)
        source, tokens, seconds = encoded[encoder]
        started = time.monotonic()
        detector = trained.get(variant.trained_as or "")
        if detector is None:
            seed_everything(seed, 0)
            detector = build(variant, config)
            detector.visual_encoder, detector.hga = source.visual_encoder, source.hga
            train_detector("detector", detector, videos, tokens, config, accelerator)
        trained[key] = detector
        window = variant.window and round(variant.window * setting.render.clip.fps)
        record = {
            "logits": score(detector, videos["validation"], tokens, accelerator, window),
            "parameters": count_parameters(detector)[1],
            "seconds": {"frames": seconds, "clips": time.monotonic() - started},
        }
        with atomic_write(results[key]) as partial:
            torch.save(record, partial)
    for states in folder.glob("*/*/states"):
        StateFiles(states).clear()


def encode_videos(
    variant: Variant,
    config: Config,
    videos: Mapping[str, Sequence[Video]],
    accelerator: Accelerator,
) -> tuple[AUDetector, dict[str, Tensor], float]:
    """Pretrain an encoder and encode all videos with it; lines that share it do so once."""
    started = time.monotonic()
    seed_everything(config.seed, 0)
    detector = build(variant, config)
    if config.frame_stage.epochs:
        train_on_frames(detector, videos["train"], config, accelerator)
    tokens = region_tokens(detector, [*videos["train"], *videos["validation"]], quiet=True)
    return detector, tokens, time.monotonic() - started


def build(variant: Variant, config: Config) -> AUDetector:
    """Build a detector, without the cross-attention over patches if the line is about that."""
    detector = build_detector(config.model)
    if variant.pooled_regions:
        detector.hga = PooledRegions(detector.visual_encoder.d_out, config.model.d_region)
    return detector


# ------------------------------------------------------------------ the tables
WAYS = ("raw at 0.5", "posterior at 0.5", "cross-validated thresholds")


@dataclass(frozen=True)
class Line:
    """One line of a table, over all seeds."""

    variant: Variant
    counts: Mapping[tuple[str, str], Mapping[str, AUCounts]]
    """(way to decide, subset of the frames) to video to counts, added up over the seeds."""
    per_seed: Mapping[str, list[float]]
    """Way to decide to mean F1 on all frames, seed by seed."""
    precision: float
    """Mean average precision, mean over the seeds."""
    parameters: int
    seconds: float
    """Mean over the seeds: pretraining the encoder, encoding and training."""


def line_of(name: str, key: str, videos: Sequence[Video], ablation: AblationConfig) -> Line:
    """Read the results of all seeds of one line, and decide in every way."""
    variant = SETTINGS[name].variants[key]
    config = config_of(name, variant, 0, ablation)
    loss = LOSSES.create(config.loss.name, **config.loss.options)
    counts: dict[tuple[str, str], dict[str, AUCounts]] = {}
    per_seed: dict[str, list[float]] = {way: [] for way in WAYS}
    precisions, seconds, parameters = [], [], 0
    for seed in range(ablation.seeds):
        record = torch.load(ablation.out / name / f"seed-{seed}" / f"{key}.pt")
        report = evaluate_trials(
            scored_trials(videos, record["logits"]),
            au_names=config.model.au_names,
            posterior=loss.posterior,
            options=FitOptions(smoothing=False),
            bootstrap=BootstrapOptions(100),  # the intervals of a single seed are not shown
        )
        for way in WAYS:
            row = report.row(way)
            per_seed[way].append(row.pooled().mean_f1())
            for subset, of_videos in row.counts.items():
                pooled = counts.setdefault((way, subset), {})
                for video, one in of_videos.items():
                    pooled.setdefault(video, AUCounts(config.model.au_names)).merge(one)
        precisions.append(float(report.average_precision["all"].nanmean()))
        seconds.append(sum(record["seconds"].values()))
        parameters = record["parameters"]
    return Line(variant, counts, per_seed, mean(precisions), parameters, mean(seconds))


def table_of(name: str, lines: Mapping[str, Line]) -> tuple[str, dict[str, Any]]:
    """Return a table as Markdown and as JSON."""
    setting = SETTINGS[name]
    subsets = [s for s in ("hidden",) if (WAYS[0], s) in next(iter(lines.values())).counts]
    heads = ["", "raw", "posterior", "cross-validated", *(["no face found"] if subsets else [])]
    heads += ["mAP", "baseline row", "delta F1, raw", "delta F1, cross-validated", "by seed"]
    heads += ["parameters", "s"]
    rows, record = [heads, ["---"] * len(heads)], {}
    for key, line in lines.items():
        title, baseline = line.variant.title, lines.get(line.variant.baseline or "")
        f1 = {which: bootstrap_by_video(videos) for which, videos in line.counts.items()}
        delta, comparison = {}, ["-"] * 4
        if baseline is not None:
            delta = {
                which: paired_bootstrap_by_video(videos, baseline.counts[which])
                for which, videos in line.counts.items()
            }
            pairs = zip(line.per_seed[WAYS[2]], baseline.per_seed[WAYS[2]], strict=True)
            by_seed = " ".join(f"{mine - theirs:+.3f}" for mine, theirs in pairs)
            deltas = [str(delta[way, "all"]) for way in (WAYS[0], WAYS[2])]
            comparison = [baseline.variant.title, *deltas, by_seed]
        cells = [title, *(str(f1[way, "all"]) for way in WAYS)]
        cells += [str(f1[WAYS[2], subset]) for subset in subsets]
        cells += [f"{line.precision:.3f}", *comparison]
        rows.append([*cells, f"{line.parameters:,}", f"{line.seconds:.0f}"])
        record[key] = {
            "title": title,
            "baseline": line.variant.baseline,
            "mean_f1": {f"{way}, {part}": numbers_of(one) for (way, part), one in f1.items()},
            "delta_f1": {f"{way}, {part}": numbers_of(one) for (way, part), one in delta.items()},
            "mean_f1_per_seed": dict(line.per_seed),
            "f1_per_au": {way: pooled_f1(line.counts[way, "all"]) for way in WAYS},
            "mean_average_precision": line.precision,
            "parameters": line.parameters,
            "seconds": line.seconds,
            "paper_validation_f1_percent": ROWS[line.variant.row].paper
            if name == "table1"
            else None,
        }
    table = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([f"### {name}: {setting.question}", "", *table]), record


def numbers_of(interval: Interval) -> dict[str, float | None]:
    """Return an interval for JSON, which knows no NaN."""
    numbers = dataclasses.asdict(interval)
    return {name: None if value != value else value for name, value in numbers.items()}


def pooled_f1(of_videos: Mapping[str, AUCounts]) -> dict[str, float | None]:
    """Return the F1 of each Action Unit over all videos and seeds; `None` without positives."""
    total = AUCounts(next(iter(of_videos.values())).au_names)
    for one in of_videos.values():
        total.merge(one)
    values = zip(total.au_names, total.f1().tolist(), strict=True)
    return {name: None if value != value else value for name, value in values}


# ------------------------------------------------------------------ the run
def run(ablation: AblationConfig) -> dict[str, Any]:
    """Train what is missing, then print and write all tables."""
    started = time.monotonic()
    accelerator = start_accelerator(DEMO)
    videos: dict[str, list[Video]] = {}
    for name in ablation.settings:
        print(f"{name}: {SETTINGS[name].question}")
        config = data_config(name, ablation)
        config = replace(config, data=replace(config.data, jobs=ablation.jobs))
        videos[name] = prepare_data(config, accelerator)["validation"]
    todo = [(name, seed) for name in ablation.settings for seed in range(ablation.seeds)]
    if ablation.jobs == 1:
        for name, seed in todo:
            run_seed(name, seed, ablation)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(ablation.jobs, mp_context=spawn) as pool:
            for done in [pool.submit(run_seed, name, seed, ablation) for name, seed in todo]:
                done.result()
    texts, record = [], {}
    for name in ablation.settings:
        lines = {key: line_of(name, key, videos[name], ablation) for key in SETTINGS[name].variants}
        text, record[name] = table_of(name, lines)
        texts.append(text)
    text = "\n\n".join(texts) + "\n\n" + NOTES.format(seeds=ablation.seeds) + "\n"
    with atomic_write(ablation.out / "ablation.md") as partial:
        partial.write_text(text)
    with atomic_write(ablation.out / "ablation.json") as partial:
        settings = dataclasses.asdict(ablation) | {"out": str(ablation.out)}
        partial.write_text(json.dumps({"settings": settings, "tables": record}, indent=2) + "\n")
    print(f"\n{text}\n{ablation.out}: ablation.md, ablation.json")
    print(f"done in {time.monotonic() - started:.0f} s")
    return record


NOTES = """Mean F1 over 12 AUs on held-out clips, counts added up over {seeds} seeds; brackets: 95 %
CI (video bootstrap), paired for `delta F1`, which is against the `baseline row`; `by seed`: delta
F1 at cross-validated thresholds, seed by seed. `s`: seconds of one training, encoder included.
Rendered from two photographs: these figures compare parts of this system with each other and say
nothing about people."""


def main(words: Sequence[str]) -> None:
    """Read the command line and run."""
    import tyro

    run(tyro.cli(AblationConfig, args=words, description=__doc__))
