"""Train, evaluate and use the whole audio-visual Action Unit detector of the paper.

    python recipes/affwild2_au.py demo                     # rendered data, tiny encoders, minutes
    python recipes/affwild2_au.py paper --data.root DIR    # Aff-Wild2, DINOv2-L and WavLM-L
    python recipes/affwild2_au.py smoke                    # seconds: what the tests run
    python recipes/affwild2_au.py hga --data.root DIR      # a row of Table 1: baseline, fm, hga,
                                                           # agssm, full (= paper), focal
    python recipes/affwild2_au.py demo --row hga           # a row at the size of another preset
    python recipes/affwild2_au.py ablation                 # all rows on embedded data, with a table
    python recipes/affwild2_au.py plan paper               # what a step needs, without a GPU
    torchrun --nproc-per-node 8 recipes/affwild2_au.py paper --data.root DIR      # on many GPUs
    python recipes/affwild2_au.py demo --help              # every option and its default

It prepares the videos once (faces, landmarks, sound; cached and resumable), trains, and evaluates
on the validation split with the official metric: F1 of the positive class per Action Unit, pooled
over all labelled frames, unweighted mean, beside what trivial systems score. A run leaves in
`--out`: `config.json` (everything that was set), `metrics.json`, `checkpoint/` (safetensors,
thresholds), `timeline.png` and `predictions.csv` of one held-out video; and in `detector/`, as for
each thing that was trained, `metrics.jsonl`, `best/` (the best validation) and `states/`.

A run that was killed resumes when the same command is given again, and ends as if it had not been:
every random number depends on the seed, the step and the clip alone. Other settings are refused.

What is measured and what is only claimed. `demo` has been run as it stands; its data are rendered
from two photographs, so its score says that the pipeline learns, and nothing about people.
`paper` follows section 4.1 (`docs/paper.md` lists where it differs), but has never been run on
Aff-Wild2, whose data are licensed; 59.45 % is the paper's own validation figure, not ours.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

# Two busy cores otherwise spend their time waiting for each other; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from affwild2_data import (
    ClipModel,
    FrameModel,
    TrainingClips,
    TrainingFrames,
    Video,
    prepare_data,
    region_tokens,
    score,
    to_device,
)
from affwild2_presets import PRESETS, ROWS, Config, presets_with_row, problems_of, stop_if
from affwild2_report import provenance_of, report
from torch import Tensor, nn

from mmau._checks import did_you_mean
from mmau._files import atomic_write
from mmau.data.affwild2 import AnnotationError
from mmau.evaluation import AUCounts
from mmau.media.errors import MediaError
from mmau.models import AUDetector, build_detector, save_pretrained
from mmau.modules import LOSSES
from mmau.modules.losses import MultiLabelLoss
from mmau.progress import progress_bar
from mmau.training import (
    BestSoFar,
    MetricsLog,
    NotFiniteError,
    Resumable,
    StateFileError,
    StateFiles,
    StepOrder,
    SubmoduleAverage,
    check_finite,
    parameter_groups,
    seed_everything,
    set_learning_rates,
    sum_over_ranks,
    warmup_cosine_factor,
)


# ------------------------------------------------------------------ the run
def run(config: Config) -> dict[str, Any] | None:
    """Prepare, train, evaluate, save and predict; returns what `metrics.json` holds."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    stop_if(problems_of(config, settings, int(os.environ.get("WORLD_SIZE", "1"))))
    started = time.monotonic()
    accelerator = start_accelerator(config)
    if accelerator.is_main_process:
        with atomic_write(config.out / "config.json") as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    videos = prepare_data(config, accelerator)
    num_frames = {s: sum(len(v.labels) for v in found) for s, found in videos.items()}
    accelerator.print(
        f"  {len(videos['train'])} training videos with {num_frames['train']} frames, "
        f"{len(videos['validation'])} held-out videos with {num_frames['validation']} frames"
    )
    systems, tokens = build_and_train(config, videos, accelerator)
    logits = {
        name: score(detector, videos["validation"], tokens, accelerator)
        for name, detector in systems.items()
    }
    metrics = None
    if accelerator.is_main_process:
        provenance = provenance_of(config, videos, time.monotonic() - started)
        metrics = report(config, videos["validation"], systems, logits, provenance)
        print(f"done in {time.monotonic() - started:.0f} s")
        if not config.states.keep_when_done:
            for folder in config.out.glob("*/states"):
                StateFiles(folder).clear()
    accelerator.end_training()
    return metrics


def start_accelerator(config: Config) -> Accelerator:
    """Find out which of how many processes this is, on which device, with which arithmetic."""
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision={"fp32": "no"}.get(config.optim.precision, config.optim.precision),
        kwargs_handlers=[
            # A process whose clips are all silent gives the audio weights no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # The others wait while one of them renders data or prepares a long video.
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
        ],
    )


# ------------------------------------------------------------------ the stages
def build_and_train(
    config: Config, videos: dict[str, list[Video]], accelerator: Accelerator
) -> tuple[dict[str, AUDetector], dict[str, Tensor]]:
    """Build a detector by name and train it; a second one without sound if it is asked for."""
    seed_everything(config.seed, 0)
    detector = build_detector(config.model).to(accelerator.device)
    tokens: dict[str, Tensor] = {}
    if config.frame_stage is not None:
        if config.frame_stage.epochs:
            train_on_frames(detector, videos["train"], config, accelerator)
        every = [*videos["train"], *videos["validation"]]
        tokens = region_tokens(detector, every, quiet=not accelerator.is_main_process)
    train_detector("detector", detector, videos, tokens, config, accelerator)
    systems = {"audio + video" if config.model.audio else "video": detector}
    if config.compare_video_only and config.model.audio is not None:
        # The same encoder, so that only the sound makes the difference.
        silent_config = replace(config, model=replace(config.model, audio=None))
        seed_everything(config.seed, 0)
        video_only = build_detector(silent_config.model).to(accelerator.device)
        video_only.visual_encoder, video_only.hga = detector.visual_encoder, detector.hga
        train_detector("video_only", video_only, videos, tokens, silent_config, accelerator)
        systems["video only"] = video_only
    return systems, tokens


def train_on_frames(
    detector: AUDetector, videos: Sequence[Video], config: Config, accelerator: Accelerator
) -> None:
    """Pretrain encoder and HGA on shuffled single frames in which a face was found."""
    stage = config.frame_stage
    seed_everything(config.seed, 1)
    model = FrameModel(detector)
    task = Task(
        "frame_stage",
        model,
        TrainingFrames(videos),
        parameter_groups(model, lr=stage.lr, weight_decay=stage.weight_decay, adapters_in=()),
        LOSSES.create("bce"),
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        warmup_epochs=0.5,
    )
    fit(task, config, accelerator)


def train_detector(
    name: str,
    detector: AUDetector,
    videos: Mapping[str, list[Video]],
    tokens: Mapping[str, Tensor],
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Train on clips; the temporal and alignment modules end as the mean of the last epochs."""
    optim = config.optim
    clips = TrainingClips(videos["train"], config, tokens)
    num_ranks = accelerator.num_processes
    if len(clips) < num_ranks:
        problem = (
            f"{num_ranks} processes cannot share {len(clips)} training clips; start at most "
            f"{len(clips)}, or cut shorter clips with --data.clip-frames."
        )
        stop_if([problem])
    averaged = ["merge", "temporal", "head_norm", "head"]
    averaged += ["hga"] if detector.hga is not None and not tokens else []
    averaged += ["audio_cross_attention"] if detector.audio_cross_attention is not None else []
    if tokens:  # what the frame stage has trained stays as it is
        for part in (detector.visual_encoder, detector.hga):
            if part is not None:
                part.requires_grad_(False)
    model = ClipModel(detector)
    from_scratch = config.frame_stage is not None or config.model.visual.name == "tiny"
    groups = parameter_groups(
        model,
        lr=optim.lr,
        lr_adapters=optim.lr_adapters,
        weight_decay=optim.weight_decay,
        adapters_in=() if from_scratch else ("detector.visual_encoder", "detector.audio_encoder"),
    )

    def validate() -> float:
        logits = score(detector, videos["validation"], tokens, accelerator)
        counts = AUCounts(config.model.au_names)
        for video in videos["validation"]:
            prob = torch.sigmoid(logits[video.trial.name])
            counts.update(prob, torch.from_numpy(video.labels))
        return float(counts.mean_f1())

    def keep_best() -> None:
        save_pretrained(detector, config.out / name / "best", config=config.model)

    task = Task(
        name,
        model,
        clips,
        groups,
        LOSSES.create(config.loss.name, **config.loss.options),
        epochs=optim.epochs,
        batch_size=optim.batch_clips,
        warmup_epochs=optim.warmup_epochs,
        averaged=[f"detector.{part}" for part in averaged],
        validate=validate,
        keep_best=keep_best,
    )
    fit(task, config, accelerator)


@dataclass(frozen=True)
class Task:
    """One thing to train: what, on what, and for how long."""

    name: str
    """Folder of its logs and states, below that of the run."""
    model: nn.Module
    """A batch to logits."""
    items: TrainingFrames | TrainingClips
    groups: list[dict[str, Any]]
    """Parameter groups with their peak learning rates."""
    loss: MultiLabelLoss
    epochs: int
    batch_size: int
    warmup_epochs: float
    averaged: Sequence[str] = ()
    """Parts of the model whose weights are averaged over the last epochs."""
    validate: Callable[[], float] | None = None
    """Return the mean F1 on the held-out videos."""
    keep_best: Callable[[], None] | None = None
    """Save the detector as the best so far."""


# ------------------------------------------------------------------ the loop
def fit(task: Task, config: Config, accelerator: Accelerator) -> None:
    """Train a task to its end, from its last state on disk if there is one."""
    optim, folder, main = config.optim, config.out / task.name, accelerator.is_main_process
    order = StepOrder(len(task.items), task.batch_size, config.seed)
    per_epoch = order.steps_per_epoch
    total = task.epochs * per_epoch
    swa_epochs = min(optim.swa_epochs, task.epochs) if task.averaged else 0
    schedule = partial(
        warmup_cosine_factor,
        warmup_steps=round(min(task.warmup_epochs, task.epochs) * per_epoch),
        total_steps=total,
        final_factor=optim.final_lr,
        constant_steps=swa_epochs * per_epoch,
        constant_factor=None if optim.swa_lr is None else optim.swa_lr / optim.lr,
    )
    optimizer = torch.optim.AdamW(task.groups, betas=(0.9, 0.98))
    model, optimizer = accelerator.prepare(task.model, optimizer)
    average = SubmoduleAverage(task.model, task.averaged)
    best = BestSoFar(patience=optim.patience)

    states = StateFiles(folder / "states", keep=config.states.keep)
    parts = {"optimizer": optimizer, "average": average, "best": best, "scaler": accelerator.scaler}
    run = Resumable(states, task.model, parts)
    step, counters = run.resume()
    if step:
        accelerator.print(f"  {task.name}: resumes from step {step} of {total}")
    counters = counters or {"loss": 0.0, "f1": None, "seconds": 0.0, "stopped": False}

    batches = batches_of(task, order, range(step, total), config, accelerator)
    log_file = folder / "metrics.jsonl"
    with (
        MetricsLog(log_file, step=step, active=main, tensorboard=config.tensorboard) as log,
        progress_bar(task.name, unit="steps", quiet=not main) as progress,
    ):
        progress(step, total)
        while step < total and not counters["stopped"]:
            started = time.monotonic()
            epoch, place = divmod(step, per_epoch)
            chosen = order.batch(step)
            seed_everything(config.seed, step, accelerator.process_index)
            rates = set_learning_rates(optimizer, schedule(step))
            loss, norm = backward(task, model, chosen, batches, config, accelerator)
            # With fp16 an infinite gradient is expected: the scaler leaves that step out.
            norms = {} if accelerator.scaler else {"norm_of_the_gradient": norm}
            try:
                where = f"step {step + 1} (epoch {epoch + 1}) of {task.name}"
                check_finite(f"{where}, on {names_of(task, chosen)}", loss=loss, **norms)
            except NotFiniteError as error:
                last = states.newest() or "none yet"
                raise SystemExit(f"{error} The last good state: {last}.") from None
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            counters["loss"] = loss + (counters["loss"] if place else 0.0)
            record = {"step": step, "epoch": epoch, "loss": loss, "grad_norm": norm, "lr": rates}
            if step % per_epoch == 0:
                if epoch >= task.epochs - swa_epochs:
                    average.update()
                if task.validate and is_due(epoch + 1, optim.validate_every, task.epochs):
                    with average.swapped_in() if average.num_updates else nullcontext():
                        counters["f1"] = record["f1"] = task.validate()
                        if best.update(record["f1"]) and main and task.keep_best:
                            task.keep_best()
                    counters["stopped"] = best.exhausted
            log.write({**record, "items": chosen})
            counters["seconds"] += time.monotonic() - started
            if main and (is_due(step, config.states.every, total) or counters["stopped"]):
                run.save(step, counters)
            progress(step, total, loss=counters["loss"] / (place + 1), f1=counters["f1"])
    if average.num_updates:
        average.apply()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.print(
        f"  {task.name}: {len(task.items)} items, {step} steps in {counters['seconds']:.0f} s, "
        f"loss of the last epoch {counters['loss'] / per_epoch:.4f}"
    )


def backward(
    task: Task,
    model: nn.Module,
    chosen: list[int],
    batches: Iterator[dict[str, Any]],
    config: Config,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """Leave the gradient of one step in the parameters; return the loss and the gradient's norm."""
    task.model.train()
    # Every process knows the labels of the whole step, so the loss is divided by their number over
    # all processes and parts. A mean of each one's mean would weigh a label by where it landed.
    labelled = max(1, int(task.items.num_labelled[chosen].sum()))
    total = torch.zeros((), device=accelerator.device)
    for part in range(config.optim.accumulate):
        batch = to_device(next(batches), accelerator.device)
        is_last = part + 1 == config.optim.accumulate
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss = task.loss(model(batch).float(), batch["labels"], normalizer=labelled)
            # Distributed training averages gradients, but these shares are to be added up.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
    return float(sum_over_ranks(total)), float(norm)


def batches_of(
    task: Task, order: StepOrder, steps: range, config: Config, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """Return this process's share of the steps, read ahead by workers if there are any."""
    loader = torch.utils.data.DataLoader(
        task.items,
        batch_sampler=order.micro_batches(
            steps,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            accumulate=config.optim.accumulate,
        ),
        collate_fn=task.items.collate,
        num_workers=config.data.workers,
        pin_memory=config.device == "cuda",
        generator=torch.Generator(),  # its own: else making the iterator draws from the run's
    )
    return iter(loader)


def names_of(task: Task, chosen: Sequence[int]) -> str:
    """Name the items of a step, for an error message."""
    more = f" and {len(chosen) - 16} more" if len(chosen) > 16 else ""
    return f"{', '.join(map(task.items.name, chosen[:16]))}{more}"


def is_due(count: int, every: int, last: int) -> bool:
    """Return whether something that is done every so often, and at the end, is due."""
    return every > 0 and (count % every == 0 or count == last)


# ------------------------------------------------------------------ the command
COMMANDS = {"ablation": "affwild2_ablation", "plan": "affwild2_plan"}
"""What else the first word may be: the module beside this one whose `main(words)` does it."""


def main() -> None:
    """Read the command line and run."""
    import tyro

    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        importlib.import_module(COMMANDS[words[0]]).main(words[1:])  # which imports this file
        return
    presets: Mapping[str, tuple[str, Config]] = PRESETS
    if "--row" in words:
        place = words.index("--row")
        row = words[place + 1] if place + 1 < len(words) else ""
        if row not in ROWS:
            raise SystemExit(f"no row named {row!r}{did_you_mean(row, ROWS)} {listed(ROWS)}")
        presets = presets_with_row(row)
        del words[place : place + 2]
    if words and not words[0].startswith("-") and words[0] not in presets:
        known = [*presets, *COMMANDS]
        raise SystemExit(
            f"no preset named {words[0]!r}{did_you_mean(words[0], known)} {listed(known)}"
        )
    config = tyro.extras.overridable_config_cli(presets, description=__doc__, args=words)
    try:
        run(config)
    except (AnnotationError, FileNotFoundError, MediaError, StateFileError) as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(
            f"no space left on the device of {config.out}; everything that was complete is kept: "
            "free some space, and the same command resumes."
        ) from None


def listed(names: Iterable[str]) -> str:
    """List what exists, for an error."""
    return f"Available: {', '.join(names)}."


if __name__ == "__main__":
    main()
