"""Tables of Action Units as other programs write and read them: OpenFace and py-feat.

OpenFace counts frames from 1, py-feat from 0; OpenFace writes intensities 0 to 5 (`AU01_r`) and
decisions (`AU01_c`), py-feat one column `AU01` per Action Unit, between 0 and 1. A `ForeignAUTable`
holds either, or what one of our detectors predicted, with the frame counted from 1 and -1 or NaN
for what is not known.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.tables.label_conventions import AnnotationError

_ROW_COLUMNS = ("frames", "face_ids", "timestamps", "confidence", "success")


class PredictedTable(Protocol):
    """What `from_predictions` takes; the table of `mmau.inference` is one."""

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the columns."""
        ...

    @property
    def frames(self) -> npt.NDArray[np.int64]:
        """`(n)`, frame number, counted from 1."""
        ...

    @property
    def face_id(self) -> npt.NDArray[np.int64] | None:
        """`(n)`, which person, or `None` if there is one."""
        ...

    @property
    def timestamps(self) -> npt.NDArray[np.float64]:
        """`(n)`, seconds."""
        ...

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """`(n)`, whether a face was found."""
        ...

    @property
    def confidence(self) -> npt.NDArray[np.floating]:
        """`(n)`, in [0, 1]."""
        ...

    @property
    def probability(self) -> npt.NDArray[np.floating]:
        """`(n, c)`, in [0, 1]."""
        ...

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """`(n, c)`, the decisions."""
        ...


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
        for name in ("face_ids", "timestamps", "confidence", "success"):
            if getattr(self, name).shape != (rows,):
                raise ValueError(
                    f"`{name}` must have shape ({rows},), as `frames`; got "
                    f"{getattr(self, name).shape}."
                )
        for name in ("prob", "intensity", "labels"):
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
            face_ids=(
                np.zeros(rows, dtype=np.int64)
                if table.face_id is None
                else np.asarray(table.face_id, dtype=np.int64)
            ),
            timestamps=np.asarray(table.timestamps, dtype=np.float64),
            confidence=np.asarray(table.confidence, dtype=np.float64),
            success=np.asarray(table.valid, dtype=np.bool_),
            prob=np.asarray(table.probability, dtype=np.float64),
            labels=np.asarray(table.active, dtype=np.int8),
        )

    def face(self, face_id: int) -> ForeignAUTable:
        """Keep the rows of one face.

        Args:
            face_id: Which, as in `face_ids`.

        Returns:
            A table with those rows.

        Raises:
            LookupError: If there is no such face.
        """
        rows = self.face_ids == face_id
        if not rows.any():
            known = ", ".join(str(i) for i in np.unique(self.face_ids)) or "none"
            raise LookupError(f"no face {face_id} in the table; it has {known}.")
        kept = {
            name: getattr(self, name)[rows]
            for name in (*_ROW_COLUMNS, "prob", "intensity", "labels")
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
        array = getattr(self, name) if name in ("prob", "intensity", "labels") else None
        if array is None:
            raise LookupError(f"the table has no {name!r}.")
        fill = -1 if name == "labels" else math.nan
        wanted = np.full((len(self), len(au_names)), fill, dtype=array.dtype)
        for column, unit in enumerate(au_names):
            if unit in self.au_names:
                wanted[:, column] = array[:, self.au_names.index(unit)]
        return wanted


_OPENFACE_FIRST = ("frame", "face_id", "timestamp", "confidence", "success")


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
        AnnotationError: If a column is missing or a value is no number; says which line.

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
    columns, rows = _read_csv(Path(path))
    needed = ("frame", "timestamp", "confidence", "success")
    _need(path, columns, needed, "FeatureExtraction")
    names, measured = _openface_units(columns)
    if not names:
        raise AnnotationError(f"{path}, line 1: no column of an Action Unit, such as AU01_r.")
    success = _column(path, columns, rows, "success") == 1
    arrays: dict[str, npt.NDArray[np.float64]] = {}
    for kind in ("r", "c"):
        values = np.full((len(rows), len(names)), math.nan)
        for place, name in enumerate(names):
            if (name, kind) in measured:
                values[:, place] = _column(path, columns, rows, measured[name, kind])
        values[~success] = math.nan
        arrays[kind] = values
    if ((arrays["c"] != 0) & (arrays["c"] != 1) & ~np.isnan(arrays["c"])).any():
        raise AnnotationError(f"{path}: decisions (columns AUxx_c) must be 0 or 1.")
    has = {kind: any(key[1] == kind for key in measured) for kind in ("r", "c")}
    face = "face_id" in columns
    return ForeignAUTable(
        names,
        frames=_whole(path, columns, rows, "frame"),
        face_ids=(
            _whole(path, columns, rows, "face_id") if face else np.zeros(len(rows), dtype=np.int64)
        ),
        timestamps=_column(path, columns, rows, "timestamp"),
        confidence=_column(path, columns, rows, "confidence"),
        success=success,
        intensity=arrays["r"] if has["r"] else None,
        labels=np.nan_to_num(arrays["c"], nan=-1).astype(np.int8) if has["c"] else None,
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
    heading = list(_OPENFACE_FIRST)
    known = np.zeros(len(table), dtype=np.bool_)
    parts: list[tuple[npt.NDArray[Any], Callable[[float], str]]] = []
    if intensity is not None:
        heading += [f"{_two_digits(name)}_r" for name in table.au_names]
        known |= (~np.isnan(intensity)).any(axis=1)
        parts.append((np.nan_to_num(intensity, nan=0.0), lambda value: f"{value:.2f}"))
    if table.labels is not None:
        heading += [f"{_two_digits(name)}_c" for name in table.au_names]
        known |= (table.labels >= 0).any(axis=1)
        parts.append((np.maximum(table.labels, 0), lambda value: f"{value:.2f}"))
    lines = [", ".join(heading)]
    for row in range(len(table)):
        first = (
            f"{table.frames[row]}",
            f"{table.face_ids[row]}",
            f"{_number(table.timestamps[row]):.3f}",
            f"{_number(table.confidence[row]):.2f}",
            f"{int(table.success[row] and known[row])}",
        )
        rest = [show(value) for values, show in parts for value in values[row]]
        lines.append(", ".join((*first, *rest)))
    return _write_lines(Path(path), lines)


def _openface_units(
    columns: Sequence[str],
) -> tuple[tuple[str, ...], dict[tuple[str, str], str]]:
    """Names in numeric order, and the column of each (name, r or c)."""
    measured = {}
    for column in columns:
        match = re.fullmatch(r"AU(\d+)_([rc])", column)
        if match:
            measured[f"AU{int(match[1])}", match[2]] = column
    names = sorted({name for name, _ in measured}, key=lambda name: int(name[2:]))
    return tuple(names), measured


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
        AnnotationError: If a column is missing, or a value is no number or outside [0, 1].

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "talk.csv"
        >>> _ = path.write_text("FaceScore,AU01,AU12,frame\n0.99,0.25,0.75,0\n,,,1\n")
        >>> table = read_pyfeat(path)
        >>> table.frames.tolist(), table.success.tolist(), table.prob.tolist()
        ([1, 2], [True, False], [[0.25, 0.75], [nan, nan]])
    """
    columns, rows = _read_csv(Path(path))
    _need(path, columns, ("frame",), "py-feat's Fex.to_csv")
    units = {f"AU{int(c[2:])}": c for c in columns if re.fullmatch(r"AU\d+", c)}
    if not units:
        raise AnnotationError(f"{path}, line 1: no column of an Action Unit, such as AU01.")
    names = tuple(sorted(units, key=lambda name: int(name[2:])))
    prob = np.stack([_column(path, columns, rows, units[name]) for name in names], axis=1)
    if ((prob < 0) | (prob > 1)).any():
        raise AnnotationError(f"{path}: the columns of Action Units must be within 0 and 1.")
    frames = _whole(path, columns, rows, "frame") + 1
    face_ids = np.zeros(len(rows), dtype=np.int64)
    seen: dict[int, int] = {}
    for row, frame in enumerate(frames.tolist()):
        face_ids[row] = seen.get(frame, 0)
        seen[frame] = seen.get(frame, 0) + 1
    nothing = np.full(len(rows), math.nan)
    scored = "FaceScore" in columns
    return ForeignAUTable(
        names,
        frames=frames,
        face_ids=face_ids,
        timestamps=nothing,
        confidence=_column(path, columns, rows, "FaceScore") if scored else nothing,
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
    return _write_lines(Path(path), lines)


# ------------------------------------------------------------------------------------- internals
def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Stripped header and rows of equal length."""
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{kind}: {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file: {error.reason}.") from error
    if not table:
        raise AnnotationError(f"{path} is empty; expected a header.")
    columns = [name.strip() for name in table[0]]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise AnnotationError(f"{path}, line 1: column {twice[0]!r} occurs twice.")
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(columns):
            raise AnnotationError(
                f"{path}, line {number}: expected {len(columns)} values, as the header has; got "
                f"{len(row)}. The table may have been cut."
            )
    return columns, table[1:]


def _need(path: str | Path, columns: Sequence[str], names: Sequence[str], writer: str) -> None:
    lacking = [name for name in names if name not in columns]
    if lacking:
        raise AnnotationError(
            f"{path}, line 1: no column {', '.join(lacking)}; expected a table of {writer}."
        )


def _column(
    path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[str]], name: str
) -> npt.NDArray[np.float64]:
    place = columns.index(name)
    values = np.empty(len(rows))
    for number, row in enumerate(rows):
        text = row[place].strip()
        try:
            values[number] = float(text) if text else math.nan
        except ValueError as error:
            raise AnnotationError(
                f"{path}, line {number + 2}: {name} must be a number; got {text!r}."
            ) from error
    return values


def _whole(
    path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[str]], name: str
) -> npt.NDArray[np.int64]:
    values = _column(path, columns, rows, name)
    bad = np.flatnonzero(~(values == np.round(values)))
    if len(bad):
        raise AnnotationError(
            f"{path}, line {bad[0] + 2}: {name} must be a whole number; got "
            f"{rows[bad[0]][columns.index(name)].strip()!r}."
        )
    return values.astype(np.int64)


def _two_digits(name: str) -> str:
    return f"AU{int(name[2:]):02d}"


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else float(value)


def _write_lines(path: Path, lines: Sequence[str]) -> Path:
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path
