"""`mmau evaluate`: a checkpoint, or tables of predictions, against annotations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmau._files import atomic_write
from mmau.cli.console import Console, UserError, Work, run_batch
from mmau.progress import ProgressCallback

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mmau.data.affwild2 import Trial
    from mmau.evaluation import ScoredTrial
    from mmau.evaluation.counts import AUCounts
    from mmau.inference import AUPredictor, AUTable, VideoLogits

# Who is meant by the suffix of a trial; the official names say no more.


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=parents,
        help="score a checkpoint, or tables of predictions, on annotated videos",
        description="Print the table of results: F1 of the positive class, pooled over all "
        "labelled frames, for every way to decide, with intervals from resampling videos, beside "
        "what trivial systems score. Either --checkpoint and a data root laid out like Aff-Wild2, "
        "or --predictions and --annotations, two folders whose files have the same names.",
    )
    parser.add_argument("root", nargs="?", help="data root, with --checkpoint")
    parser.add_argument("--checkpoint", help="folder written by the recipe")
    parser.add_argument(
        "--split", choices=("train", "validation"), default="validation", help="(%(default)s)"
    )
    parser.add_argument(
        "--prepared", help="folder of prepared trials, filled where it is not: see mmau prepare"
    )
    parser.add_argument(
        "--predictions", help="folder of CSV tables by mmau predict, one per trial, or one file"
    )
    parser.add_argument("--annotations", help="folder of annotation files, with --predictions")
    parser.add_argument("--json", help="also write every number into this file")
    parser.add_argument(
        "--resamples", type=int, default=2000, help="draws of videos per interval (%(default)s)"
    )
    parser.add_argument(
        "--no-smoothing",
        action="store_true",
        help="leave out the row with smoothing, which is slow",
    )
    parser.add_argument("--detector", default="mediapipe", help="face detector (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--device", default="cpu", help="device to run on (%(default)s)")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class _Scored:
    """Everything that is to be printed about."""

    trials: list[ScoredTrial]
    au_names: tuple[str, ...]
    posterior: Any
    decided: AUCounts
    """Of the decisions as they are: the checkpoint's own, or those in the tables."""
    decided_as: str
    failures: list[tuple[str, str]]


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from mmau._checks import check_range
    from mmau.evaluation import BootstrapOptions, FitOptions, evaluate_trials

    check_range("--jobs", arguments.jobs, 1)
    by_checkpoint = arguments.checkpoint is not None
    if by_checkpoint == (arguments.predictions is not None):
        raise UserError("give either --checkpoint with a data root, or --predictions.")
    if by_checkpoint and (arguments.root is None or arguments.annotations is not None):
        raise UserError("--checkpoint goes with a data root: mmau evaluate ROOT --checkpoint DIR.")
    if not by_checkpoint and (arguments.annotations is None or arguments.root is not None):
        raise UserError("--predictions goes with --annotations, and with no data root.")
    scored = (_of_checkpoint if by_checkpoint else _of_tables)(arguments, console)
    if not scored.trials:
        return console.failures(scored.failures, len(scored.failures)) or 1
    report = evaluate_trials(
        scored.trials,
        au_names=scored.au_names,
        posterior=scored.posterior,
        options=FitOptions(smoothing=not arguments.no_smoothing),
        bootstrap=BootstrapOptions(arguments.resamples),
    )
    f1 = scored.decided.mean_f1()
    console.result(report.render())
    console.result(f"\n  {scored.decided_as}: mean F1 {f1:.3f}")
    if arguments.json is not None:
        record = {**report.as_dict(), "decisions": {"what": scored.decided_as, "mean_f1": f1}}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        with atomic_write(arguments.json) as partial:
            partial.write_text(text, encoding="utf-8")
    return console.failures(scored.failures, len(scored.trials) + len(scored.failures))


# ---------------------------------------------------------------------- a checkpoint
@dataclass(frozen=True)
class _Options:
    """What every process needs."""

    checkpoint: str
    device: str
    detector: str


def _of_checkpoint(arguments: argparse.Namespace, console: Console) -> _Scored:
    import torch

    from mmau.data import find_trials
    from mmau.evaluation.counts import AUCounts
    from mmau.inference import AUPredictor

    predictor = AUPredictor.from_pretrained(arguments.checkpoint, device=arguments.device)
    trials = find_trials(arguments.root, arguments.split)
    options = _Options(arguments.checkpoint, arguments.device, arguments.detector)
    au_names = tuple(predictor.detector.au_names)
    decided = AUCounts(au_names)
    scored: list[ScoredTrial] = []
    failures: list[tuple[str, str]] = []
    for trial, logits, reason in _logits(trials, options, arguments, predictor, console):
        if logits is None:
            failures.append((trial.name, reason or ""))
            continue
        one = _join(trial.name, trial.video_name, trial.annotation, au_names, logits, console)
        scored.append(one)
        prob = predictor.probability(one.logits)
        decided.update(
            predictor.calibration.apply(prob, one.timestamps).active.double(),
            one.labels.to(torch.int64),
        )
    posterior = predictor.probability if predictor.calibration.probability != "raw" else None
    note = predictor.calibration.note or "it does not say on which videos they were chosen"
    return _Scored(
        scored,
        au_names,
        posterior,
        decided,
        f"with the thresholds and the smoothing of the checkpoint ({note})",
        failures,
    )


def _logits(
    trials: Sequence[Trial],
    options: _Options,
    arguments: argparse.Namespace,
    predictor: AUPredictor,
    console: Console,
) -> Iterable[tuple[Trial, VideoLogits | None, str | None]]:
    if arguments.prepared is not None:
        yield from _logits_of_prepared(trials, arguments, predictor, console)
        return
    with console.progress("predicting", unit="videos") as progress:
        for outcome in run_batch(
            trials, start_worker, options, processes=arguments.jobs, progress=progress
        ):
            yield outcome.job, outcome.result, outcome.reason


def start_worker(options: _Options) -> Work[Trial, VideoLogits]:
    """Load the checkpoint; runs once per process."""
    from mmau.inference import AUPredictor
    from mmau.media.faces import FaceOptions

    predictor = AUPredictor.from_pretrained(options.checkpoint, device=options.device)

    def work(trial: Trial, progress: ProgressCallback | None) -> VideoLogits:
        (logits,) = predictor.score_file(
            trial.video,
            faces=FaceOptions(options.detector, face=trial.face),
            progress=progress,
        )
        return logits

    return work


def _logits_of_prepared(
    trials: Sequence[Trial], arguments: argparse.Namespace, predictor: AUPredictor, console: Console
) -> Iterable[tuple[Trial, VideoLogits | None, str | None]]:
    from mmau.data.prepare import PreparationError, prepare_dataset
    from mmau.data.prepared import load_trial
    from mmau.media.faces import FaceOptions

    files: dict[str, Path] = {}
    failures: dict[str, str] = {}
    for face in sorted({trial.face for trial in trials}):
        chosen = {trial.name: trial.video for trial in trials if trial.face == face}
        with console.progress("preparing", unit="videos") as progress:
            try:
                files |= prepare_dataset(
                    chosen,
                    arguments.prepared,
                    crop_size=predictor.crop_size,
                    faces=FaceOptions(arguments.detector, face=face),
                    jobs=arguments.jobs,
                    progress=progress,
                )
            except PreparationError as error:
                files |= error.prepared
                failures |= error.failures
    with console.progress("predicting", unit="videos") as progress:
        for number, trial in enumerate(trials, 1):
            if trial.name in files:
                yield trial, predictor.score_trial(load_trial(files[trial.name])), None
            else:
                yield trial, None, failures[trial.name]
            progress(number, len(trials))


def _join(
    name: str,
    group: str,
    annotation: Path,
    au_names: tuple[str, ...],
    logits: VideoLogits,
    console: Console,
) -> ScoredTrial:
    """Give every frame the annotation row of its number."""
    import numpy as np
    import torch

    from mmau.evaluation import ScoredTrial
    from mmau.inference.session import increasing

    numbers = logits.first_frame + 1 + np.arange(len(logits.valid))
    return ScoredTrial(
        name,
        group,
        logits.logits,
        _labels(name, annotation, au_names, numbers, console),
        torch.from_numpy(increasing(logits.timestamps)),
        torch.from_numpy(logits.valid),
    )


def _labels(
    name: str,
    annotation: Path,
    au_names: tuple[str, ...],
    numbers: NDArray[np.int64],
    console: Console,
) -> Any:
    import torch

    from mmau.data import join_labels, read_annotation

    joined = join_labels(read_annotation(annotation).select(au_names), numbers)
    if joined.report:
        console.note(f"{name}: {joined.report}", trial=name)
    return torch.from_numpy(joined.labels)


# ---------------------------------------------------------------------- tables
def _of_tables(arguments: argparse.Namespace, console: Console) -> _Scored:
    import torch

    from mmau.data.affwild2 import video_of_trial
    from mmau.evaluation import ScoredTrial
    from mmau.evaluation.counts import AUCounts
    from mmau.inference import read_table
    from mmau.inference.session import increasing

    pairs = _pairs(Path(arguments.predictions), Path(arguments.annotations))
    scored: list[ScoredTrial] = []
    failures: list[tuple[str, str]] = []
    au_names: tuple[str, ...] = ()
    decided: AUCounts | None = None
    with console.progress("reading", unit="tables") as progress:
        for number, (table_file, annotation) in enumerate(pairs, 1):
            try:
                table = read_table(table_file)
                _check_table(table, au_names, table_file)
                au_names = table.au_names
                labels = _labels(table_file.stem, annotation, au_names, table.frames, console)
                # Half of the last digit that the file holds: 0 and 1 have no logit.
                prob = torch.from_numpy(table.probability).clamp(5e-6, 1 - 5e-6)
                trial = ScoredTrial(
                    table_file.stem,
                    video_of_trial(table_file.stem),
                    torch.logit(prob),
                    labels,
                    torch.from_numpy(increasing(table.timestamps)),
                    torch.from_numpy(table.valid),
                )
            except (OSError, ValueError) as error:
                failures.append((str(table_file), str(error)))
                continue
            decided = decided or AUCounts(au_names)
            decided.update(torch.from_numpy(table.active).double(), labels.to(torch.int64))
            scored.append(trial)
            progress(number, len(pairs))
    return _Scored(
        scored,
        au_names,
        None,
        decided or AUCounts(au_names or ("AU1",)),
        "with the decisions in the tables",
        failures,
    )


def _check_table(table: AUTable, au_names: tuple[str, ...], file: Path) -> None:
    if table.face_id is not None:
        raise ValueError(
            f"the table holds several people, and an annotation is of one: {file}; predict with "
            "--face largest, left or right."
        )
    if au_names and table.au_names != au_names:
        raise ValueError(
            f"the table has {', '.join(table.au_names)}, those before it {', '.join(au_names)}: "
            f"{file}"
        )


def _pairs(predictions: Path, annotations: Path) -> list[tuple[Path, Path]]:
    """Tables that have an annotation of the same name; at least one."""
    if not predictions.exists():
        raise UserError(f"no such file or folder: {predictions}")
    if not annotations.is_dir():
        raise UserError(f"no such folder: {annotations}")
    tables = sorted(predictions.glob("*.csv")) if predictions.is_dir() else [predictions]
    pairs = [(table, annotations / f"{table.stem}.txt") for table in tables]
    pairs = [(table, annotation) for table, annotation in pairs if annotation.is_file()]
    if not pairs:
        raise UserError(
            f"no table in {predictions} has an annotation of its name in {annotations}; looked at "
            f"{len(tables)} *.csv files."
        )
    return pairs
