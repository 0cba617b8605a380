"""`mmau prepare`: find faces, landmarks and sound once, and keep them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmau.cli.console import Console, UserError, find_videos, is_single_file
from mmau.cli.faces import add_face_options, face_options


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "prepare",
        parents=parents,
        help="find faces, landmarks and sound once, and cache",
        description="Find the faces, landmarks and sound of videos and keep them, one file each. "
        "Stop it at any time and start it again: what is done is not done twice.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        help="video file, folder that is searched, or pattern like 'a/**/*.mp4'",
    )
    parser.add_argument("-o", "--output", required=True, help="folder for the prepared trials")
    parser.add_argument("--crop-size", type=int, default=224, help="pixels (%(default)s)")
    add_face_options(parser, all_gives="one trial per face")
    parser.add_argument(
        "--strict", action="store_true", help="missing frames are an error, not a note"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace stale or corrupt files")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from mmau.data.prepare import PreparationError, prepare_dataset

    (first, *more) = arguments.source
    if not more and is_single_file([first]) and not Path(first).exists():
        raise UserError(f"no such file or folder: {first}")
    videos = {video.name: video.path for video in find_videos(arguments.source)}
    faces = face_options(arguments)
    failures: dict[str, str] = {}
    with console.progress("preparing", unit="videos") as progress:
        try:
            report = prepare_dataset(
                videos,
                Path(arguments.output),
                crop_size=arguments.crop_size,
                faces=faces,
                strict=arguments.strict,
                jobs=arguments.jobs,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        except PreparationError as error:
            if len(videos) == 1:
                (reason,) = error.failures.values()
                console.error(reason)
                return 1
            report, failures = error.report, error.failures
    for name, warnings in report.warnings.items():
        for warning in warnings:
            console.note(warning, trial=name)
    console.summary(
        f"{len(report)} trials prepared in {arguments.output}, {len(report.reused)} of them before",
        done=len(report),
        total=len(videos),
    )
    return console.failures(
        [(str(videos.get(name, name)), reason) for name, reason in failures.items()], len(videos)
    )
