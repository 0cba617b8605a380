"""Tables of Action Units as other programs write and read them: OpenFace and py-feat.

OpenFace counts frames from 1, py-feat from 0; OpenFace writes intensities 0 to 5 (`AU01_r`) and
decisions (`AU01_c`), py-feat one column `AU01` per Action Unit, between 0 and 1. A `ForeignAUTable`
holds either, or what a detector predicted, with the frame counted from 1 and -1 or NaN for what is
not known.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.tables.label_conventions import AnnotationError, arrange_columns, read_lines

Floats = npt.NDArray[np.float64]

_ROW_ARRAYS = ("face_ids", "timestamps", "confidence", "success")
_UNIT_ARRAYS = ("prob", "intensity", "labels")


class PredictedTable(Protocol):
    """What a detector predicted, a row per frame and face; `mmau.inference.AUTable` is one."""

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the columns."""

    @property
    def frames(self) -> npt.NDArray[np.int64]:
        """`(n)`, frame number, counted from 1."""

    @property
    def face_id(self) -> npt.NDArray[np.int64] | None:
        """`(n)`, which person, or `None` if there is one."""

    @property
    def timestamps(self) -> npt.NDArray[np.float64]:
        """`(n)`, seconds."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """`(n)`, whether a face was found."""

    @property
    def confidence(self) -> npt.NDArray[np.floating]:
        """`(n)`, in [0, 1]."""

    @property
    def probability(self) -> npt.NDArray[np.floating]:
        """`(n, c)`, in [0, 1]."""

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """`(n, c)`, the decisions."""


@dataclass(frozen=True)
class ForeignAUTable:
    """A table of another program, or for one: a row per frame and face."""

    au_names: tuple[str, ...]
    """Names of the columns, `AU1` and so on, without leading zeros."""
    frames: npt.NDArray[np.int64]
    """`(n)`, frame number, counted from 1."""
    face_ids: npt.NDArray[np.int64]
    """`(n)`, which face of the frame, counted from 0."""
    timestamps: npt.NDArray[np.float64]
    """`(n)`, seconds; NaN where the table does not say."""
    confidence: npt.NDArray[np.float64]
    """`(n)`, of the face, in [0, 1]; NaN where the table does not say."""
    success: npt.NDArray[np.bool_]
    """`(n)`, whether there was a face to judge."""
    prob: npt.NDArray[np.float64] | None = None
    """`(n, c)`, probability in [0, 1], NaN where unknown; `None` if the table has none."""
    intensity: npt.NDArray[np.float64] | None = None
    """`(n, c)`, FACS intensity 0 to 5, NaN where unknown; `None` if the table has none."""
    labels: npt.NDArray[np.int8] | None = None
    """`(n, c)`, 1, 0 or -1; `None` if the table has no decisions."""

    def __post_init__(self) -> None:
        rows = len(self.frames)
        for name in _ROW_ARRAYS:
            if getattr(self, name).shape != (rows,):
                raise ValueError(
                    f"`{name}` must have shape ({rows},), as `frames`; got "
                    f"{getattr(self, name).shape}."
                )
        for name in _UNIT_ARRAYS:
            array = getattr(self, name)
            if array is not None and array.shape != (rows, len(self.au_names)):
                raise ValueError(
                    f"`{name}` must have shape ({rows}, {len(self.au_names)}); got {array.shape}."
                )

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def from_predictions(cls, table: PredictedTable) -> ForeignAUTable:
        """Turn what a detector predicted into a table for other programs.

        Args:
            table: Predictions, such as those of an `AUPredictor`.

        Returns:
            A table with `prob` and `labels`. `success` is whether a face was found: elsewhere the
            prediction is kept, but programs that follow the formats will not use it.

        Examples:
            ```python
            table = AUPredictor.from_pretrained("checkpoint").predict("talk.mp4")
            write_openface("talk.csv", ForeignAUTable.from_predictions(table))
            ```
        """
        rows = len(table.frames)
        return cls(
            tuple(table.au_names),
            frames=np.asarray(table.frames, dtype=np.int64),
            face_ids=np.asarray(
                np.zeros(rows) if table.face_id is None else table.face_id, dtype=np.int64
            ),
            timestamps=np.asarray(table.timestamps, dtype=np.float64),
            confidence=np.asarray(table.confidence, dtype=np.float64),
            success=np.asarray(table.valid, dtype=np.bool_),
            prob=np.asarray(table.probability, dtype=np.float64),
            labels=np.asarray(table.active, dtype=np.int8),
        )

    def face(self, face_id: int) -> ForeignAUTable:
        """Keep the rows of one face, by its number in `face_ids`; `LookupError` if it has none."""
        rows = self.face_ids == face_id
        if not rows.any():
            known = ", ".join(str(i) for i in np.unique(self.face_ids)) or "none"
            raise LookupError(f"no face {face_id} in the table; it has {known}.")
        kept = {
            name: getattr(self, name)[rows]
            for name in ("frames", *_ROW_ARRAYS, *_UNIT_ARRAYS)
            if getattr(self, name) is not None
        }
        return replace(self, **kept)

    def select(
        self, name: str, au_names: Sequence[str] = AU_NAMES
    ) -> npt.NDArray[np.float64] | npt.NDArray[np.int8]:
        """Arrange the columns of one array by Action Unit.

        Args:
            name: `"prob"`, `"intensity"` or `"labels"`.
            au_names: Wanted columns, in order.

        Returns:
            `(n, c)`; NaN, or -1 for labels, in columns that the table does not have.

        Raises:
            LookupError: If the table has no such array.
        """
        array = getattr(self, name) if name in _UNIT_ARRAYS else None
        if array is None:
            raise LookupError(f"the table has no {name!r}.")
        fill = -1 if name == "labels" else math.nan
        return arrange_columns(array, self.au_names, au_names, fill)


# ------------------------------------------------------------------------------------- one reader
class _Csv:
    """A table as text, whose cells are asked for by column; errors name the file and the line."""

    def __init__(self, path: str | Path, needed: Sequence[str], writer: str) -> None:
        self.path = path
        table = [row for row in csv.reader(read_lines(Path(path))) if row]
        if not table:
            raise AnnotationError(f"{path} is empty; expected a header.")
        self.columns = [name.strip() for name in table[0]]
        self.rows = table[1:]
        twice = sorted({name for name in self.columns if name and self.columns.count(name) > 1})
        if twice:
            raise AnnotationError(f"{path}, line 1: column {twice[0]!r} occurs twice.")
        for line, row in enumerate(self.rows, start=2):
            if len(row) != len(self.columns):
                raise AnnotationError(
                    f"{path}, line {line}: expected {len(self.columns)} values, as the header has; "
                    f"got {len(row)}. The table may have been cut."
                )
        lacking = [name for name in needed if name not in self.columns]
        if lacking:
            raise AnnotationError(
                f"{path}, line 1: no column {', '.join(lacking)}; expected a table of {writer}."
            )

    def units(self, pattern: str) -> dict[str, str]:
        """Action Units whose columns follow a pattern with their number, to those columns."""
        found = ((re.fullmatch(pattern, column), column) for column in self.columns)
        return {f"AU{int(match[1])}": column for match, column in found if match}

    def numbers(self, column: str) -> Floats:
        """One column; NaN where a cell is empty."""
        place = self.columns.index(column)
        values = np.empty(len(self.rows))
        for row, cells in enumerate(self.rows):
            text = cells[place].strip()
            try:
                values[row] = float(text) if text else math.nan
            except ValueError as error:
                raise AnnotationError(
                    f"{self.path}, line {row + 2}: {column} must be a number; got {text!r}."
                ) from error
        return values

    def whole_numbers(self, column: str) -> npt.NDArray[np.int64]:
        """One column of whole numbers."""
        values = self.numbers(column)
        for row in np.flatnonzero(~(values == np.round(values))):
            text = self.rows[row][self.columns.index(column)].strip()
            raise AnnotationError(
                f"{self.path}, line {row + 2}: {column} must be a whole number; got {text!r}."
            )
        return values.astype(np.int64)

    def table(self, names: Sequence[str], columns: Mapping[str, str]) -> Floats:
        """The columns of Action Units, `(n, c)`; NaN for those that have none."""
        values = np.full((len(self.rows), len(names)), math.nan)
        for place, name in enumerate(names):
            if name in columns:
                values[:, place] = self.numbers(columns[name])
        return values


def _by_number(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: int(name[2:])))


def _two_digits(name: str) -> str:
    return f"AU{int(name[2:]):02d}"


def _write_lines(path: str | Path, lines: Sequence[str]) -> Path:
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return Path(path)


# ------------------------------------------------------------------------------------- OpenFace
def read_openface(path: str | Path) -> ForeignAUTable:
    r"""Read a table of OpenFace's FeatureExtraction or FaceLandmarkVidMulti.

    Blanks in the header are dropped and other columns (gaze, pose, landmarks) are ignored. Rows
    without success hold no measurement, only zeros, so their values become NaN and -1.

    Args:
        path: CSV file; `face_id` may be missing, as in tables of older versions.

    Returns:
        Intensities and decisions. Action Units with only one of the two, such as AU28, have NaN or
        -1 in the other.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If a column is missing or a value is not a number; says which line.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "talk.csv"
        >>> _ = path.write_text(
        ...     "frame, face_id, timestamp, confidence, success, AU01_r, AU01_c\n"
        ...     "1, 0, 0.000, 0.98, 1, 2.31, 1.00\n2, 0, 0.033, 0.02, 0, 0.00, 0.00\n")
        >>> table = read_openface(path)
        >>> table.au_names, table.intensity.tolist(), table.labels.tolist()
        (('AU1',), [[2.31], [nan]], [[1], [-1]])
    """
    needed = ("frame", "timestamp", "confidence", "success")
    table = _Csv(path, needed, "FeatureExtraction")
    intensities, decisions = table.units(r"AU(\d+)_r"), table.units(r"AU(\d+)_c")
    names = _by_number({*intensities, *decisions})
    if not names:
        raise AnnotationError(f"{path}, line 1: no column of an Action Unit, such as AU01_r.")
    success = table.numbers("success") == 1
    intensity, decided = table.table(names, intensities), table.table(names, decisions)
    intensity[~success] = decided[~success] = math.nan
    if ((decided != 0) & (decided != 1) & ~np.isnan(decided)).any():
        raise AnnotationError(f"{path}: decisions (columns AUxx_c) must be 0 or 1.")
    if "face_id" in table.columns:
        face_ids = table.whole_numbers("face_id")
    else:
        face_ids = np.zeros(len(success), dtype=np.int64)
    return ForeignAUTable(
        names,
        frames=table.whole_numbers("frame"),
        face_ids=face_ids,
        timestamps=table.numbers("timestamp"),
        confidence=table.numbers("confidence"),
        success=success,
        intensity=intensity if intensities else None,
        labels=np.nan_to_num(decided, nan=-1).astype(np.int8) if decisions else None,
    )


def write_openface(
    path: str | Path, table: ForeignAUTable, *, prob_as_intensity: bool = False
) -> Path:
    """Write a table that programs made for OpenFace can read: `frame, face_id, ..., AU01_c`.

    Columns are those of OpenFace, with blanks after the commas of the header as it writes them.
    What is not known is written as 0, together with `success` 0 if nothing of the row is known:
    the format has no other word for it.

    Args:
        path: File to write, through a temporary name.
        table: What to write; `intensity` gives `AUxx_r`, `labels` gives `AUxx_c`.
        prob_as_intensity: Whether to write `5 * prob` as `AUxx_r` where the table has no
            `intensity`. A probability is not an intensity: only for programs that insist on the
            column.

    Returns:
        The path.

    Raises:
        ValueError: If the table has nothing that OpenFace has a column for, or both `intensity` and
            `prob_as_intensity`.
    """
    intensity = table.intensity
    if prob_as_intensity:
        if intensity is not None:
            raise ValueError("`prob_as_intensity` is for tables that have no `intensity`.")
        if table.prob is None:
            raise ValueError("`prob_as_intensity` needs a table that has `prob`.")
        intensity = 5 * table.prob
    if intensity is None and table.labels is None:
        raise ValueError(
            "an OpenFace table needs `intensity` (AUxx_r) or `labels` (AUxx_c); the table has "
            "neither."
        )
    heading = ["frame", "face_id", "timestamp", "confidence", "success"]
    known = np.zeros(len(table), dtype=np.bool_)
    values = np.zeros((len(table), 0))
    if intensity is not None:
        heading += [f"{_two_digits(name)}_r" for name in table.au_names]
        known |= (~np.isnan(intensity)).any(axis=1)
        values = np.nan_to_num(intensity, nan=0.0)
    if table.labels is not None:
        heading += [f"{_two_digits(name)}_c" for name in table.au_names]
        known |= (table.labels >= 0).any(axis=1)
        values = np.concatenate([values, np.maximum(table.labels, 0)], axis=1)
    timestamps, confidence = np.nan_to_num(table.timestamps), np.nan_to_num(table.confidence)
    lines = [", ".join(heading)]
    for row in range(len(table)):
        first = (
            f"{table.frames[row]}",
            f"{table.face_ids[row]}",
            f"{timestamps[row]:.3f}",
            f"{confidence[row]:.2f}",
            f"{int(table.success[row] and known[row])}",
        )
        lines.append(", ".join((*first, *(f"{value:.2f}" for value in values[row]))))
    return _write_lines(path, lines)


# -------------------------------------------------------------------------------------- py-feat
def read_pyfeat(path: str | Path) -> ForeignAUTable:
    r"""Read a table of py-feat, as `Fex.to_csv` writes it.

    Args:
        path: CSV file with `frame` (counted from 0) and `AU01` and so on, between 0 and 1. A column
            `FaceScore` is the confidence. Rows with one frame are faces 0, 1, ... in their order.

    Returns:
        Probabilities. `timestamps` are NaN: py-feat rounds its `approx_time` to whole seconds.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If a column is missing, or a value is not a number or outside [0, 1].

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "talk.csv"
        >>> _ = path.write_text("FaceScore,AU01,AU12,frame\n0.99,0.25,0.75,0\n,,,1\n")
        >>> table = read_pyfeat(path)
        >>> table.frames.tolist(), table.success.tolist(), table.prob.tolist()
        ([1, 2], [True, False], [[0.25, 0.75], [nan, nan]])
    """
    table = _Csv(path, ("frame",), "py-feat's Fex.to_csv")
    units = table.units(r"AU(\d+)")
    if not units:
        raise AnnotationError(f"{path}, line 1: no column of an Action Unit, such as AU01.")
    names = _by_number(units)
    prob = table.table(names, units)
    if ((prob < 0) | (prob > 1)).any():
        raise AnnotationError(f"{path}: the columns of Action Units must be within 0 and 1.")
    frames = table.whole_numbers("frame") + 1
    face_ids = np.zeros(len(frames), dtype=np.int64)
    seen: Counter[int] = Counter()
    for row, frame in enumerate(frames.tolist()):
        face_ids[row] = seen[frame]
        seen[frame] += 1
    nothing = np.full(len(frames), math.nan)
    return ForeignAUTable(
        names,
        frames=frames,
        face_ids=face_ids,
        timestamps=nothing,
        confidence=table.numbers("FaceScore") if "FaceScore" in table.columns else nothing,
        success=np.asarray(~np.isnan(prob).all(axis=1)),
        prob=prob,
    )


def write_pyfeat(path: str | Path, table: ForeignAUTable) -> Path:
    """Write a table that `feat.utils.io.read_feat` and pandas can read.

    Args:
        path: File to write, through a temporary name.
        table: What to write: its `prob`, or its `labels` if it has none. What is not known stays
            empty.

    Returns:
        The path.

    Raises:
        ValueError: If the table has neither.
    """
    values = table.prob
    if values is None and table.labels is not None:
        values = np.where(table.labels < 0, math.nan, table.labels)
    if values is None:
        raise ValueError("a py-feat table needs `prob` or `labels`; the table has neither.")
    lines = [",".join(("FaceScore", *(_two_digits(name) for name in table.au_names), "frame"))]
    for row in range(len(table)):
        cells = [table.confidence[row], *values[row]]
        shown = ["" if math.isnan(cell) else repr(float(cell)) for cell in cells]
        lines.append(",".join((*shown, str(int(table.frames[row]) - 1))))
    return _write_lines(path, lines)
