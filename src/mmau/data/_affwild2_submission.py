"""The table that a challenge submission consists of, and the example file that defines it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmau._checks import check_range
from mmau._files import whole_file
from mmau.action_units import AU_NAMES
from mmau.data._affwild2_text import AnnotationError, header, read_lines

__all__ = ["ListedFrame", "ListedFrames", "listed_frames", "write_submission"]


class ListedFrame(NamedTuple):
    """One line of the example file."""

    location: str
    """As written: `2-30-640x360/00001.jpg`."""
    trial: str
    """Name of the trial."""
    number: int
    """Frame number, counted from 1."""
    line: int
    """Line of the file, counted from 1."""


@dataclass(frozen=True)
class ListedFrames:
    """What a submission must hold."""

    au_names: tuple[str, ...]
    """Names of the columns."""
    frames: tuple[ListedFrame, ...]
    """Rows, in the order of the file."""


def listed_frames(example: str | Path) -> ListedFrames:
    """Read the official example of a submission: which frames, in which order.

    Args:
        example: Text file: header `image_location,AU1,...`, then one row per frame such as
            `2-30-640x360/00001.jpg,0,...`. Its values are not used.

    Returns:
        Columns and frames.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If a line is not of that form, or a frame is listed twice.
    """
    lines = read_lines(Path(example))
    if not lines or lines[0].split(",")[0].strip() != "image_location":
        raise AnnotationError(f"{example}, line 1: expected image_location,AU1,AU2,...")
    _, _, named = lines[0].partition(",")
    columns = header(named, f"{example}, line 1")
    frames: list[ListedFrame] = []
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines[1:], start=2):
        location = line.split(",")[0].strip()
        match = re.fullmatch(r"(.+)/(\d+)\.(?:jpg|jpeg|png)", location)
        if match is None or int(match[2]) < 1:
            raise AnnotationError(
                f"{example}, line {number}: expected <trial>/<frame number>.jpg; got {location!r}."
            )
        frame = ListedFrame(location, match[1], int(match[2]), number)
        first = seen.setdefault((frame.trial, frame.number), number)
        if first != number:
            raise AnnotationError(
                f"{example}, line {number}: {location} is listed before, in line {first}."
            )
        frames.append(frame)
    return ListedFrames(columns, tuple(frames))


def write_submission(
    path: str | Path,
    example: str | Path,
    predictions: Mapping[str, npt.NDArray[Any]],
    *,
    au_names: Sequence[str] = AU_NAMES,
    repeat_last: int = 0,
) -> int:
    """Write the frames that the official example file lists, in its order, and no others.

    Args:
        path: File to write, through a temporary name; an older one is replaced.
        example: Official example: header `image_location,AU1,...`, then one row per frame such as
            `2-30-640x360/00001.jpg,0,...`. Its values are not used.
        predictions: Trial name to `(t, c)` decisions, 0 or 1; row i is frame number i + 1.
        au_names: Names of the columns of `predictions`.
        repeat_last: How many listed frames beyond the last prediction of a trial may take over its
            decisions. Lists that are off by one from what a decoder yields need 1; by default such
            a frame is refused.

    Returns:
        Number of rows written.

    Raises:
        FileNotFoundError: If there is no example file.
        AnnotationError: If a line of the example is not of that form.
        ValueError: If a prediction is missing for a listed frame, or is not 0 or 1.
    """
    check_range("repeat_last", repeat_last, 0)
    wanted = listed_frames(example)
    lacking = [name for name in wanted.au_names if name not in au_names]
    if lacking:
        raise ValueError(f"{example} wants {', '.join(lacking)}, which `au_names` does not have.")
    order = [list(au_names).index(name) for name in wanted.au_names]
    rows = []
    for frame in wanted.frames:
        if frame.trial not in predictions:
            raise ValueError(
                f"no prediction for trial {frame.trial!r} ({example}, line {frame.line})."
            )
        decided = np.asarray(predictions[frame.trial])
        if decided.ndim != 2 or decided.shape[1] != len(au_names):
            raise ValueError(
                f"the prediction of trial {frame.trial!r} must have shape (t, {len(au_names)}); "
                f"got {decided.shape}."
            )
        if not len(decided) or frame.number > len(decided) + repeat_last:
            raise ValueError(
                f"no prediction for frame {frame.number} of trial {frame.trial!r}, which has "
                f"{len(decided)} ({example}, line {frame.line})."
            )
        values = decided[min(frame.number, len(decided)) - 1][order].tolist()
        if any(value not in (0, 1) for value in values):
            raise ValueError(f"decisions must be 0 or 1; {frame.location} has {values}.")
        rows.append([frame.location, *(int(value) for value in values)])
    _write_table(Path(path), ["image_location", *wanted.au_names], rows)
    return len(rows)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
