"""The command `mmau`: list components, prepare videos, predict Action Units."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmau import __version__
from mmau.registry import MissingDependencyError, Registry, UnknownComponentError

__all__ = ["main"]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


class _UserError(Exception):
    """Something the user can mend; printed as one sentence."""


def all_registries() -> list[Registry[Any]]:
    """Return every registry of the library, in the order in which a system is built."""
    from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
    from mmau.functional.selective_scan import SCAN_BACKENDS
    from mmau.landmarks import LANDMARK_SCHEMES
    from mmau.media.faces import FACE_DETECTORS
    from mmau.modules.losses import LOSSES
    from mmau.modules.temporal import TEMPORAL_MODELS

    return [
        FACE_DETECTORS,
        LANDMARK_SCHEMES,
        VISUAL_ENCODERS,
        AUDIO_ENCODERS,
        TEMPORAL_MODELS,
        SCAN_BACKENDS,
        LOSSES,
    ]


def _components(arguments: argparse.Namespace) -> int:
    del arguments
    for registry in all_registries():
        plural = f"{registry.kind}es" if registry.kind.endswith("s") else f"{registry.kind}s"
        print(f"{plural}  (entry-point group {registry.group})")
        rows = registry.describe()
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            origin = "" if row.source == "mmau" else f" [from {row.source}]"
            print(f"  {row.name:<{width}}  {row.summary}{origin}")
            print(f"  {'':<{width}}  {row.status}")
        print()
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from mmau.inference import AUPredictor
    from mmau.progress import progress_bar

    video, output = Path(arguments.video), Path(arguments.output)
    # Refused before the work, not after it.
    if output.is_dir():
        raise _UserError(f"{output} is a folder; -o takes the path of the table to write.")
    if output.suffix.lower() in VIDEO_SUFFIXES:
        raise _UserError(
            f"-o {output} looks like a video; it takes the path of the table to write."
        )
    predictor = AUPredictor.from_pretrained(arguments.checkpoint, device=arguments.device)
    with progress_bar(f"reading {video.name}", quiet=arguments.quiet) as progress:
        table = predictor.predict_file(video, detector=arguments.detector, progress=progress)
    table.write_csv(output)
    for note in table.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.plot:
        from mmau.plot import save_timeline

        save_timeline(table, arguments.plot, title=video.name)
    if not arguments.quiet:
        print(f"{output}: {len(table)} frames, {int(table.valid.sum())} with a face")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from mmau.data.features import prepare_dataset
    from mmau.progress import progress_bar

    source = Path(arguments.source)
    if not source.exists():
        raise _UserError(f"no such file or folder: {source}")
    paths = (
        sorted(p for p in source.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        if source.is_dir()
        else [source]
    )
    if not paths:
        raise _UserError(f"no video in {source}; looked for {', '.join(VIDEO_SUFFIXES)}.")
    videos = {path.stem: path for path in paths}
    if len(videos) != len(paths):
        raise _UserError(f"two videos under {source} share one name; prepare their folders apart.")
    with progress_bar("preparing", unit="videos", quiet=arguments.quiet) as progress:
        prepared = prepare_dataset(
            videos,
            Path(arguments.output),
            crop_size=arguments.crop_size,
            jobs=arguments.jobs,
            progress=progress,
        )
    if not arguments.quiet:
        print(f"{len(prepared)} videos prepared in {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmau",
        description="Audio-visual Action Unit detection.",
        epilog="Exit codes: 0 done, 1 the input or the installation is at fault, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"mmau {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    components = commands.add_parser("components", help="list every registered component")
    components.set_defaults(run=_components)

    predict = commands.add_parser("predict", help="video file -> table of Action Units")
    predict.add_argument("video", help="a video file; its sound track is used if it has one")
    predict.add_argument("--checkpoint", required=True, help="folder written by the recipe")
    predict.add_argument("-o", "--output", required=True, help="CSV file to write")
    predict.add_argument("--plot", help="also draw the timeline into this PNG file")
    predict.add_argument("--detector", default="mediapipe", help="face detector (%(default)s)")
    predict.add_argument("--device", default="cpu", help="device to run on (%(default)s)")
    predict.add_argument("--quiet", action="store_true", help="no progress, no summary")
    predict.set_defaults(run=_predict)

    prepare = commands.add_parser("prepare", help="find faces, landmarks and sound once, and cache")
    prepare.add_argument("source", help="a video, or a folder that is searched for videos")
    prepare.add_argument("-o", "--output", required=True, help="folder for the prepared trials")
    prepare.add_argument("--crop-size", type=int, default=224, help="pixels (%(default)s)")
    prepare.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    prepare.add_argument("--quiet", action="store_true", help="no progress, no summary")
    prepare.set_defaults(run=_prepare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words after `mmau`; those of the process if left out.

    Returns:
        0 if done, 1 if the input or the installation is at fault.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (
        _UserError,
        MissingDependencyError,
        UnknownComponentError,
        OSError,
        ValueError,
    ) as error:
        # These carry a sentence for the user; anything else is a bug and keeps its traceback.
        print(f"mmau: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmau: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
