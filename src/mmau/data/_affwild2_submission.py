"""The table that a challenge submission consists of."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmau._files import whole_file
from mmau.action_units import AU_NAMES
from mmau.data._affwild2_text import AnnotationError, header, read_lines

__all__ = ["write_submission"]


def write_submission(
    path: str | Path,
    example: str | Path,
    predictions: Mapping[str, npt.NDArray[Any]],
    *,
    au_names: Sequence[str] = AU_NAMES,
) -> int:
    """Write the frames that the official example file lists, in its order, and no others.

    Args:
        path: File to write, through a temporary name; an older one is replaced.
        example: Official example: header `image_location,AU1,...`, then one row per frame such as
            `2-30-640x360/00001.jpg,0,...`. Its values are not used.
        predictions: Trial name to `(t, c)` decisions, 0 or 1; row i is frame number i + 1.
        au_names: Names of the columns of `predictions`.

    Returns:
        Number of rows written.

    Raises:
        FileNotFoundError: If there is no example file.
        AnnotationError: If a line of the example is not of that form.
        ValueError: If a prediction is missing for a listed frame, or is not 0 or 1.
    """
    lines = read_lines(Path(example))
    if not lines or lines[0].split(",")[0].strip() != "image_location":
        raise AnnotationError(f"{example}, line 1: expected image_location,AU1,AU2,...")
    _, _, named = lines[0].partition(",")
    columns = header(named, f"{example}, line 1")
    lacking = [name for name in columns if name not in au_names]
    if lacking:
        raise ValueError(f"{example} wants {', '.join(lacking)}, which `au_names` does not have.")
    order = [list(au_names).index(name) for name in columns]
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        location = line.split(",")[0].strip()
        match = re.fullmatch(r"(.+)/(\d+)\.(?:jpg|jpeg|png)", location)
        if match is None or int(match[2]) < 1:
            raise AnnotationError(
                f"{example}, line {number}: expected <trial>/<frame number>.jpg; got {location!r}."
            )
        trial, frame = match[1], int(match[2])
        if trial not in predictions:
            raise ValueError(f"no prediction for trial {trial!r} ({example}, line {number}).")
        decided = np.asarray(predictions[trial])
        if decided.ndim != 2 or decided.shape[1] != len(au_names):
            raise ValueError(
                f"the prediction of trial {trial!r} must have shape (t, {len(au_names)}); got "
                f"{decided.shape}."
            )
        if frame > len(decided):
            raise ValueError(
                f"no prediction for frame {frame} of trial {trial!r}, which has {len(decided)} "
                f"({example}, line {number})."
            )
        values = decided[frame - 1][order].tolist()
        if any(value not in (0, 1) for value in values):
            raise ValueError(f"decisions must be 0 or 1; {location} has {values}.")
        rows.append([location, *(int(value) for value in values)])
    _write_table(Path(path), ["image_location", *columns], rows)
    return len(rows)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
