"""The ablation on embedded data: every row of Table 1, and settings made for one component each.

    python recipes/affwild2_au.py ablation                        # everything; see `--help`
    python recipes/affwild2_au.py ablation --settings table1 --seeds 1

All rows of a setting have the same data, the same steps and the same seeds. Each row is trained
once per seed; counts are pooled over the seeds, and intervals resample videos, paired between a row
and the one it is compared with. Finished rows are kept and not trained again.

What stands for what. The foundation encoder is a small one, taught on single labelled frames of the
training clips; the baseline's is the same one untaught. Nothing stands for WavLM against Whisper:
all rows hear the same log-mel energies. So "+ foundation encoders" shows what a taught encoder is
worth here, and says nothing about DINOv2 or WavLM. The data are rendered from two photographs: a
component that helps here need not help on people, nor the other way round.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from affwild2_ablation_settings import SETTINGS, AblationConfig, Variant, config_of
from affwild2_ablation_table import line_of, table_of
from affwild2_au import start_accelerator, train_detector, train_on_frames
from affwild2_data import Video, prepare_data
from affwild2_models import region_tokens, score
from affwild2_presets import DEMO, Config
from torch import Tensor, nn

from mmau._files import atomic_write
from mmau.functional import region_pooling
from mmau.models import AUDetector, build_detector
from mmau.training import StateFiles, seed_everything


# ------------------------------------------------------------------ one training
class PooledRegions(nn.Module):
    """Region tokens from the local and the global mean alone: HGA without its cross-attention."""

    class Output(NamedTuple):
        """Looks like `HGAOutput`."""

        tokens: Tensor
        attention: None = None

    def __init__(self, d_visual: int, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.mix = nn.Sequential(
            nn.Linear(2 * d_visual, d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )

    def forward(self, patch_tokens: Tensor, weights: Tensor) -> Output:
        """Return `(..., m, d)` tokens."""
        local, overall = region_pooling(patch_tokens, weights)
        both = torch.cat([local, overall.unsqueeze(-2).expand_as(local)], dim=-1)
        return self.Output(self.mix(both))


def run_seed(name: str, seed: int, ablation: AblationConfig) -> None:
    """Train and score all lines of a table once; what is finished already is left alone."""
    torch.set_num_threads(1)
    variants = SETTINGS[name].variants
    folder = ablation.out / name / f"seed-{seed}"
    results = {key: folder / f"{key}.pt" for key in variants}
    if all(path.is_file() for path in results.values()):
        return
    accelerator = start_accelerator(DEMO)
    data = replace(
        config_of(name, next(iter(variants.values())), 0, ablation), out=ablation.out / name
    )
    videos = prepare_data(data, accelerator)
    seen: dict[str, tuple[AUDetector, dict[str, Tensor], float]] = {}
    trained: dict[str, AUDetector] = {}
    for key, variant in variants.items():
        config = replace(config_of(name, variant, seed, ablation), out=folder / key)
        stage = config.frame_stage
        how = "regions" if variant.pooled_regions else config.model.alignment
        how = f"frames-{how}" if stage.epochs else f"untaught-{how}"
        if how not in seen:
            seen[how] = see(variant, replace(config, out=folder / how), videos, accelerator)
        taught, tokens, seconds = seen[how]
        started = time.monotonic()
        detector = trained.get(variant.trained_as or "")
        if detector is None:
            seed_everything(seed, 0)
            detector = build(variant, config)
            detector.visual_encoder, detector.hga = taught.visual_encoder, taught.hga
            train_detector("detector", detector, videos, tokens, config, accelerator)
        trained[key] = detector
        fps = SETTINGS[name].render.clip.fps
        with forgetful(detector, variant.window and round(variant.window * fps)):
            logits = score(detector, videos["validation"], tokens, accelerator)
        record = {
            "logits": logits,
            "parameters": count_parameters(detector),
            "seconds": {"frames": seconds, "clips": time.monotonic() - started},
        }
        with atomic_write(results[key]) as partial:
            torch.save(record, partial)
    for states in folder.glob("*/*/states"):
        StateFiles(states).clear()


def see(
    variant: Variant,
    config: Config,
    videos: Mapping[str, Sequence[Video]],
    accelerator: Accelerator,
) -> tuple[AUDetector, dict[str, Tensor], float]:
    """Teach an encoder on frames and encode all videos with it; lines that share it do so once."""
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


@contextmanager
def forgetful(detector: AUDetector, num_frames: int | None) -> Iterator[None]:
    """Throw the state of the temporal model away every so many frames, if at all."""
    whole = detector.classify

    def in_windows(
        visual: Tensor, audio: Tensor | None, *, audio_mask: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, None]:
        pieces = []
        for start in range(0, visual.shape[1], num_frames):
            part = slice(start, start + num_frames)
            sound = [None if one is None else one[:, part] for one in (audio, audio_mask)]
            logits, _ = whole(visual[:, part], sound[0], audio_mask=sound[1], mask=mask[:, part])
            pieces.append(logits)
        return torch.cat(pieces, dim=1), None

    if num_frames is None:
        yield
        return
    detector.classify = in_windows
    try:
        yield
    finally:
        del detector.classify


def count_parameters(detector: AUDetector) -> int:
    """Return the number of weights of all parts, taught or not."""
    return sum(parameter.numel() for parameter in detector.parameters())


# ------------------------------------------------------------------ the run
def run(ablation: AblationConfig) -> dict[str, Any]:
    """Train what is missing, then print and write all tables."""
    started = time.monotonic()
    accelerator = start_accelerator(DEMO)
    videos: dict[str, list[Video]] = {}
    for name in ablation.settings:
        print(f"{name}: {SETTINGS[name].question}")
        first = next(iter(SETTINGS[name].variants.values()))
        data = replace(config_of(name, first, 0, ablation), out=ablation.out / name)
        data = replace(data, data=replace(data.data, jobs=ablation.jobs))
        videos[name] = prepare_data(data, accelerator)["validation"]
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
intervals from resampling videos, paired where two lines are compared (this line minus the one that
`minus` names); `by seed`: the cross-fitted difference, seed by seed. `weights`: all parameters.
`s`: seconds of one training, encoder included. Rendered from two photographs: these figures compare
parts of this system with each other and say nothing about people."""


def main(words: Sequence[str]) -> None:
    """Read the command line and run."""
    import tyro

    run(tyro.cli(AblationConfig, args=words, description=__doc__))
