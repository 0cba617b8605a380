"""`mmau predict`: videos to tables of Action Units."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmau.cli.console import (
    VIDEO_SUFFIXES,
    Console,
    FoundVideo,
    Outcome,
    UserError,
    Work,
    find_videos,
    is_single_file,
    run_batch,
)
from mmau.cli.faces import add_face_options, face_options
from mmau.progress import ProgressCallback

if TYPE_CHECKING:
    from mmau.inference import StageTimes
    from mmau.media.faces import FaceOptions


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "predict",
        parents=parents,
        help="videos -> tables of Action Units",
        description="Predict the Action Units of every frame. One video gives the CSV file -o; "
        "several videos, a folder or a pattern give one CSV file each in the folder -o, under the "
        "names of the videos. One broken video does not stop the others: it is listed at the end "
        "and the exit code is 3.",
    )
    parser.add_argument(
        "video", nargs="+", help="video file, folder that is searched, or pattern like 'a/**/*.mp4'"
    )
    parser.add_argument("--checkpoint", required=True, help="folder written by the recipe")
    parser.add_argument(
        "-o", "--output", required=True, help="CSV file to write; a folder for several videos"
    )
    parser.add_argument("--plot", help="also draw the timeline: PNG file; a folder for several")
    parser.add_argument(
        "--annotate",
        help="also write the video with landmarks, regions and bars: MP4 file; a folder for "
        "several",
    )
    add_face_options(parser, all_gives="each face rows of its own")
    parser.add_argument(
        "--strict", action="store_true", help="missing frames are an error, not a note"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--device", default="cpu", help="device to run on (%(default)s)")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class _Options:
    """What every process needs."""

    checkpoint: str
    device: str
    faces: FaceOptions
    strict: bool


@dataclass(frozen=True)
class _Job:
    """One video and what is written about it."""

    video: Path
    table: Path
    plot: Path | None
    annotated: Path | None


@dataclass(frozen=True)
class _Done:
    """What to say about a video that was predicted."""

    num_frames: int
    num_valid: int
    num_people: int | None
    notes: tuple[str, ...]
    stages: StageTimes


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from mmau._checks import check_range

    check_range("--jobs", arguments.jobs, 1)
    single = is_single_file(arguments.video)
    jobs = _jobs(arguments, find_videos(arguments.video), single=single)
    options = _Options(
        arguments.checkpoint, arguments.device, face_options(arguments), arguments.strict
    )
    if single:
        return _predict_one(jobs[0], options, console)
    return _predict_many(jobs, options, arguments.jobs, console)


# ---------------------------------------------------------------------- where things go
def _jobs(arguments: argparse.Namespace, videos: list[FoundVideo], *, single: bool) -> list[_Job]:
    """Refuse before the work, not after it, what cannot be written."""
    from mmau.inference.annotate import ANNOTATED_SUFFIXES

    output = Path(arguments.output)
    plot = None if arguments.plot is None else Path(arguments.plot)
    annotated = None if arguments.annotate is None else Path(arguments.annotate)
    if single:
        if output.is_dir():
            raise UserError(f"{output} is a folder; -o takes the path of the table to write.")
        if output.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(
                f"-o {output} looks like a video; it takes the path of the table to write."
            )
        if annotated is not None and annotated.suffix.lower() not in ANNOTATED_SUFFIXES:
            raise UserError(f"--annotate {annotated} must end in {', '.join(ANNOTATED_SUFFIXES)}.")
        for path in (output, plot, annotated):
            if path is not None and path.exists() and path.samefile(videos[0].path):
                raise UserError(f"{path} is the video itself and would be overwritten.")
        return [_Job(videos[0].path, output, plot, annotated)]
    for flag, folder in (("-o", output), ("--plot", plot), ("--annotate", annotated)):
        if folder is not None and (folder.is_file() or folder.suffix.lower() in _FILE_SUFFIXES):
            raise UserError(f"{flag} {folder} names a file; several videos need a folder.")
    if annotated is not None:
        sources = {video.path.resolve() for video in videos}
        for video in videos:
            if (annotated / f"{video.name}.mp4").resolve() in sources:
                raise UserError(
                    f"--annotate {annotated} would overwrite videos that it reads; give another "
                    "folder."
                )
    return [
        _Job(
            video.path,
            output / f"{video.name}.csv",
            None if plot is None else plot / f"{video.name}.png",
            None if annotated is None else annotated / f"{video.name}.mp4",
        )
        for video in videos
    ]


_FILE_SUFFIXES = (".csv", ".png", ".pdf", ".svg", *VIDEO_SUFFIXES)


# ---------------------------------------------------------------------- the work
def start_worker(options: _Options) -> Work[_Job, _Done]:
    """Load the checkpoint; runs once per process."""
    from mmau.inference import AUPredictor, StageTimes, annotate_video

    predictor = AUPredictor.from_pretrained(options.checkpoint, device=options.device)

    def work(job: _Job, progress: ProgressCallback | None) -> _Done:
        stages = StageTimes()
        passes = 1 if job.annotated is None else 2  # an annotated video is read twice
        table = predictor.predict_file(
            job.video,
            faces=options.faces,
            strict=options.strict,
            geometry=job.annotated is not None,
            stages=stages,
            progress=_pass(progress, 0, passes),
        )
        table.write_csv(job.table)
        if job.plot is not None:
            from mmau.plot import save_timeline

            people = [0] if table.face_id is None else sorted(set(table.face_id.tolist()))
            for person in people:
                several = len(people) > 1
                path = job.plot.with_stem(f"{job.plot.stem}_{person}") if several else job.plot
                title = f"{job.video.name}, person {person}" if several else job.video.name
                save_timeline(table.rows_of(person), path, title=title)
        if job.annotated is not None:
            annotate_video(job.video, table, job.annotated, progress=_pass(progress, 1, passes))
        return _Done(
            len(table),
            int(table.valid.sum()),
            None if table.face_id is None else len(set(table.face_id.tolist())),
            table.notes,
            stages,
        )

    return work


def _pass(progress: ProgressCallback | None, number: int, passes: int) -> ProgressCallback | None:
    """Progress of one pass over the frames of several, so that the bar never goes back."""
    if progress is None or passes == 1:
        return progress
    return lambda done, total: progress(done + number * total, passes * total)


def _predict_one(job: _Job, options: _Options, console: Console) -> int:
    work = start_worker(options)
    with console.progress(job.video.name) as progress:
        done = work(job, progress)
    for note in done.notes:
        console.note(note, video=str(job.video))
    _report(job, done, console)
    console.summary(done.stages.render(), stages=done.stages.seconds, frames=done.num_frames)
    return 0


def _report(job: _Job, done: _Done, console: Console) -> None:
    people = "" if done.num_people is None else f" of {done.num_people} people"
    console.summary(
        f"{job.table}: {done.num_frames} frames, {done.num_valid} with a face{people}",
        video=str(job.video),
        table=str(job.table),
        frames=done.num_frames,
        valid=done.num_valid,
    )


def _predict_many(jobs: list[_Job], options: _Options, processes: int, console: Console) -> int:
    from mmau.inference import StageTimes

    total = StageTimes()
    failures: list[Outcome[_Job, _Done]] = []
    with console.progress("predicting", unit="videos") as progress:
        outcomes = run_batch(jobs, start_worker, options, processes=processes, progress=progress)
        for outcome in outcomes:
            if outcome.result is None:
                failures.append(outcome)
                continue
            for note in outcome.result.notes:
                console.note(f"{outcome.job.video}: {note}", video=str(outcome.job.video))
            total.add(outcome.result.stages)
            _report(outcome.job, outcome.result, console)
    console.summary(
        f"{len(jobs) - len(failures)} of {len(jobs)} videos done; {total.render()}",
        done=len(jobs) - len(failures),
        total=len(jobs),
        stages=total.seconds,
    )
    return console.failures([(str(f.job.video), f.reason or "") for f in failures], len(jobs))
