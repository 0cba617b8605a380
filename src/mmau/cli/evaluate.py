"""`mmau evaluate`: a checkpoint, or tables of predictions, against annotations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmau._files import atomic_write
from mmau.cli.console import Console, UserError, Work, run_batch
from mmau.progress import ProgressCallback

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mmau.data.affwild2 import Trial
    from mmau.evaluation import AUCounts, ScoredTrial
    from mmau.inference import AUPredictor, AUTable, VideoLogits


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=parents,
        help="score a checkpoint, or tables of predictions, on annotated videos",
        description="Print the table of results: F1 of the positive class, pooled over all "
        "labelled frames, for every way to decide, with 95 % CI from resampling videos, beside "
        "trivial baselines. Either --checkpoint and a data root laid out like Aff-Wild2, "
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


@dataclass
class _Scored:
    """Everything that is to be printed about."""

    decided_as: str
    au_names: tuple[str, ...] = ()
    posterior: Any = None
    trials: list[ScoredTrial] = field(default_factory=list)
    decided: AUCounts | None = None
    """Of the decisions as they are: the checkpoint's own, or those in the tables."""
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, trial: ScoredTrial, active: Tensor) -> None:
        from mmau.evaluation import AUCounts

        self.trials.append(trial)
        self.decided = self.decided or AUCounts(self.au_names)
        self.decided.update(active, trial.labels)


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
    if scored.decided is None:
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
def _of_checkpoint(arguments: argparse.Namespace, console: Console) -> _Scored:
    import numpy as np
    import torch

    from mmau.data import find_trials
    from mmau.evaluation import ScoredTrial
    from mmau.inference import AUPredictor
    from mmau.inference.session import increasing

    predictor = AUPredictor.from_pretrained(arguments.checkpoint, device=arguments.device)
    calibration = predictor.calibration
    note = calibration.note or "it does not say on which videos they were chosen"
    scored = _Scored(
        f"with the thresholds and the smoothing of the checkpoint ({note})",
        calibration.au_names,
        calibration.probability_of if calibration.probability != "raw" else None,
    )
    trials = find_trials(arguments.root, arguments.split)
    predict = _predict_videos if arguments.prepared is None else _predict_prepared
    for trial, logits, reason in predict(trials, arguments, predictor, console):
        if logits is None:
            scored.failures.append((trial.name, reason or ""))
            continue
        numbers = logits.first_frame + 1 + np.arange(len(logits.valid))
        labels = _labels(trial.name, trial.annotation, scored.au_names, numbers, console)
        one = ScoredTrial(
            trial.name,
            trial.video_name,
            logits.logits,
            labels,
            torch.from_numpy(increasing(logits.timestamps)),
            torch.from_numpy(logits.valid),
        )
        prob = calibration.probability_of(one.logits)
        scored.add(one, calibration.apply(prob, one.timestamps).active)
    return scored


def _predict_videos(
    trials: Sequence[Trial], arguments: argparse.Namespace, predictor: AUPredictor, console: Console
) -> Iterable[tuple[Trial, VideoLogits | None, str | None]]:
    options = arguments.checkpoint, arguments.device, arguments.detector
    with console.progress("predicting", unit="videos") as progress:
        for outcome in run_batch(
            trials, start_worker, options, processes=arguments.jobs, progress=progress
        ):
            yield outcome.job, outcome.result, outcome.reason


def start_worker(options: tuple[str, str, str]) -> Work[Trial, VideoLogits]:
    """Load the checkpoint; runs once per process."""
    from mmau.inference import AUPredictor
    from mmau.media.faces import FaceOptions

    checkpoint, device, detector = options
    predictor = AUPredictor.from_pretrained(checkpoint, device=device)

    def work(trial: Trial, progress: ProgressCallback | None) -> VideoLogits:
        faces = FaceOptions(detector, face=trial.face)
        (logits,) = predictor.score_file(trial.video, faces=faces, progress=progress)
        return logits

    return work


def _predict_prepared(
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


def _labels(
    name: str,
    annotation: Path,
    au_names: tuple[str, ...],
    numbers: NDArray[np.int64],
    console: Console,
) -> Tensor:
    """Give every frame the annotation row of its number."""
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
    from mmau.inference import read_table
    from mmau.inference.session import increasing

    scored = _Scored("with the decisions in the tables")
    pairs = _pairs(Path(arguments.predictions), Path(arguments.annotations))
    with console.progress("reading", unit="tables") as progress:
        for number, (file, annotation) in enumerate(pairs, 1):
            try:
                table = read_table(file)
                _check_table(table, scored.au_names, file)
                scored.au_names = table.au_names
                labels = _labels(file.stem, annotation, table.au_names, table.frames, console)
                # Half of the last digit that the file holds: 0 and 1 have no logit.
                prob = torch.from_numpy(table.probability).clamp(5e-6, 1 - 5e-6)
                trial = ScoredTrial(
                    file.stem,
                    video_of_trial(file.stem),
                    torch.logit(prob),
                    labels,
                    torch.from_numpy(increasing(table.timestamps)),
                    torch.from_numpy(table.valid),
                )
            except (OSError, ValueError) as error:
                scored.failures.append((str(file), str(error)))
            else:
                scored.add(trial, torch.from_numpy(table.active))
            progress(number, len(pairs))
    return scored


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
