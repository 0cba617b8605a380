"""Which videos the user means: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmau.cli._console import UserError

__all__ = ["VIDEO_SUFFIXES", "FoundVideo", "find_videos", "is_single_file"]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


class FoundVideo(NamedTuple):
    """One video to work on."""

    path: Path
    """The file."""
    name: str
    """Its path without extension, relative to the folder that was given; what outputs are
    called."""


def is_single_file(sources: Sequence[str]) -> bool:
    """Tell whether the user named one file, rather than a folder, a pattern or several.

    Args:
        sources: What was given.

    Returns:
        True for one path that is no folder and no pattern.

    Examples:
        >>> is_single_file(["a.mp4"]), is_single_file(["a.mp4", "b.mp4"]), is_single_file(["*.mp4"])
        (True, False, False)
    """
    (first, *more) = sources
    return not more and not Path(first).is_dir() and (Path(first).exists() or not _is_glob(first))


def find_videos(sources: Sequence[str]) -> list[FoundVideo]:
    """Find the videos; every one must get a name of its own.

    Args:
        sources: Files, folders (searched to any depth for the usual extensions) and patterns such
            as `clips/**/*.mp4`. Hidden files in folders are passed over.

    Returns:
        Videos, each once, in the order given, folders sorted.

    Raises:
        UserError: If a file, or any video of a folder or pattern, is missing, or two videos would
            be called the same.
    """
    found: dict[Path, str] = {}
    for source in sources:
        for path, name in _of_source(source):
            found.setdefault(path, name)
    owner: dict[str, Path] = {}
    for path, name in found.items():
        if name in owner:
            raise UserError(
                f"{owner[name]} and {path} share the name {name!r}, so one would overwrite what is "
                "written for the other; give their folders one by one."
            )
        owner[name] = path
    return [FoundVideo(path, name) for path, name in found.items()]


def _of_source(source: str) -> list[tuple[Path, str]]:
    path = Path(source)
    if path.is_dir():
        inside = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        if not inside:
            raise UserError(f"no video in the folder {path}; looked for {' '.join(VIDEO_SUFFIXES)}")
        return [(p, p.relative_to(path).with_suffix("").as_posix()) for p in inside]
    if path.exists() or not _is_glob(source):
        # A file that is not there is one failure among others in a batch, so it passes here.
        return [(path, path.stem)]
    matches = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
    if not matches:
        raise UserError(f"no file matches {source!r}.")
    return [(p, p.stem) for p in matches]


def _is_glob(source: str) -> bool:
    return any(letter in source for letter in "*?[")
