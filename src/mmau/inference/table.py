"""The result of a prediction: a table with one row per frame and person."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._files import atomic_write
from mmau._optional import require

_COLUMNS = ("valid", "confidence", "probability", "active", "frames", "landmarks", "boxes")
_FIXED = ("frame", "timestamp", "valid", "confidence")


class TableError(ValueError):
    """A CSV file is not a table of predictions."""


@dataclass(frozen=True)
class AUTable:
    """Action Units of one video, a row per decoded frame; nothing is left out.

    With several people there is a row per frame and person, people one after the other, and a
    column `face_id`.

    Raises:
        ValueError: If the columns are not equally long.

    Examples:
        >>> table = AUTable(
        ...     au_names=("AU1", "AU2"),
        ...     timestamps=np.array([0.0, 0.04]),
        ...     valid=np.array([True, False]),
        ...     confidence=np.array([0.9, 0.0]),
        ...     probability=np.array([[0.8, 0.1], [0.6, 0.2]]),
        ...     active=np.array([[True, False], [True, False]]),
        ... )
        >>> table.columns[:4], len(table)
        (('frame', 'timestamp', 'valid', 'confidence'), 2)
    """

    au_names: tuple[str, ...]
    """Names of the columns of `probability` and `active`."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds, by the clock of the container."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found; elsewhere the model had the sound and its memory only."""
    confidence: NDArray[np.floating]
    """`(t,)`, the face detector's score in [0, 1]; 0 without a face."""
    probability: NDArray[np.floating]
    """`(t, c)`, in [0, 1], what the thresholds of the checkpoint are for, and smoothed as it says;
    see `Calibration`."""
    active: NDArray[np.bool_]
    """`(t, c)`, probability at or above the threshold of its Action Unit."""
    notes: tuple[str, ...] = ()
    """What a reader should know about this video: no sound track, missing frames, no face."""
    frames: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """`(t,)`, number of the frame in decoding order, from 1; 1 to `t` if left out."""
    face_id: NDArray[np.int64] | None = None
    """`(t,)`, which person, from 0; `None` if one person was followed."""
    landmarks: NDArray[np.float32] | None = None
    """`(t, 68, 2)`, pixels of the upright frame, NaN without a face; not in the CSV file."""
    boxes: NDArray[np.float32] | None = None
    """`(t, 4)`, left, top, right, bottom, in the same pixels; not in the CSV file."""

    def __post_init__(self) -> None:
        count = len(self.timestamps)
        if not len(self.frames) and count:
            object.__setattr__(self, "frames", np.arange(1, count + 1))
        columns = {name: getattr(self, name) for name in (*_COLUMNS, "face_id")}
        for name, column in columns.items():
            if column is not None and len(column) != count:
                raise ValueError(
                    f"`{name}` must have one row for each of the {count} timestamps; "
                    f"got {len(column)}."
                )

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def columns(self) -> tuple[str, ...]:
        """Header of the CSV file: `frame, timestamp, valid, confidence, AU1, ..., AU1_c, ...`.

        With several people `face_id` follows `frame`.
        """
        fixed = _FIXED if self.face_id is None else (_FIXED[0], "face_id", *_FIXED[1:])
        return (*fixed, *self.au_names, *(f"{name}_c" for name in self.au_names))

    def rows_of(self, face_id: int) -> AUTable:
        """Take the rows of one person.

        Args:
            face_id: Which one.

        Returns:
            A table of one person, without the column.

        Raises:
            ValueError: If there is no such person.
        """
        people = [0] if self.face_id is None else sorted(set(self.face_id.tolist()))
        if face_id not in people:
            raise ValueError(f"no person {face_id} in this table; it has {people}.")
        if self.face_id is None:
            return self
        rows = self.face_id == face_id
        taken: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("timestamps", *_COLUMNS)
        }
        return replace(self, face_id=None, **taken)

    # ------------------------------------------------------------------ ways out
    def as_columns(self) -> dict[str, NDArray[Any]]:
        """Return every column by name, in the order of `columns`.

        Returns:
            Column name to `(t,)` array; decisions as 0 and 1.
        """
        named: dict[str, NDArray[Any]] = {"frame": self.frames}
        if self.face_id is not None:
            named["face_id"] = self.face_id
        named |= {
            "timestamp": self.timestamps,
            "valid": self.valid.astype(np.int8),
            "confidence": self.confidence,
        }
        named |= {name: self.probability[:, c] for c, name in enumerate(self.au_names)}
        decided = self.active.astype(np.int8)
        return named | {f"{name}_c": decided[:, c] for c, name in enumerate(self.au_names)}

    def to_pandas(self) -> Any:
        """Return a pandas data frame with the columns of the CSV file.

        Returns:
            A `pandas.DataFrame`.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        pandas = require("pandas", purpose="a table as a data frame", extra="tables")
        return pandas.DataFrame(self.as_columns())

    def to_arrow(self) -> Any:
        """Return an Arrow table with the columns of the CSV file.

        Returns:
            A `pyarrow.Table`.

        Raises:
            MissingDependencyError: If pyarrow is not installed.
        """
        arrow = require("pyarrow", purpose="a table for Arrow", extra="tables")
        return arrow.table({k: np.ascontiguousarray(v) for k, v in self.as_columns().items()})

    def write_csv(self, path: str | Path) -> Path:
        """Write the table; the file is complete or absent.

        Args:
            path: Where to write.

        Returns:
            The path.
        """
        path = Path(path)
        # In one string per column and not per cell: an hour of video is three million cells.
        names = self.au_names
        kinds = {"timestamp": "%.6f", "confidence": "%.4f"} | dict.fromkeys(names, "%.5f")
        columns = self.as_columns()
        template = ",".join(kinds.get(name, "%d") for name in columns) + "\n"
        with (
            atomic_write(path) as partial,
            partial.open("w", newline="", encoding="utf-8") as stream,
        ):
            stream.write(",".join(self.columns) + "\n")
            lists = [column.tolist() for column in columns.values()]
            stream.writelines(template % row for row in zip(*lists, strict=True))
        return path


def join_faces(tables: Sequence[AUTable], face_ids: Sequence[int]) -> AUTable:
    """Put the tables of several people under one another."""
    notes: list[str] = []
    for person, table in zip(face_ids, tables, strict=True):
        for note in table.notes:
            in_all = all(note in other.notes for other in tables)
            text = note if in_all else f"person {person}: {note}"
            if text not in notes:
                notes.append(text)
    joined: dict[str, Any] = {
        name: None
        if getattr(tables[0], name) is None
        else np.concatenate([getattr(table, name) for table in tables])
        for name in ("timestamps", *_COLUMNS)
    }
    ids = np.repeat(np.asarray(face_ids, dtype=np.int64), [len(table) for table in tables])
    return replace(tables[0], notes=tuple(notes), face_id=ids, **joined)


def read_table(path: str | Path) -> AUTable:
    """Read what `AUTable.write_csv` wrote, or a table of the same columns from elsewhere.

    Args:
        path: CSV file with `frame`, `timestamp`, `valid` and `confidence`, one column of
            probabilities per Action Unit, and a column `<name>_c` of decisions for each.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no such file.
        TableError: If a column is missing, or a value is not a number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such table of predictions: {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            header, *rows = csv.reader(stream)
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise TableError(f"not a CSV table of predictions: {path} ({error})") from error
    header = [name.strip() for name in header]
    names = tuple(name[:-2] for name in header if name.endswith("_c") and name[:-2] in header)
    missing = [name for name in _FIXED if name not in header]
    if missing or not names:
        lacks = ", ".join(missing) or "a pair of columns such as AU12, AU12_c"
        raise TableError(f"not a table of predictions, it lacks {lacks}: {path}")
    try:
        values = np.array([[float(cell) for cell in row] for row in rows], dtype=np.float64)
        values = values.reshape(len(rows), len(header))
    except ValueError as error:
        raise TableError(f"a row holds something other than numbers: {path} ({error})") from error

    def column(name: str) -> NDArray[np.float64]:
        return values[:, header.index(name)]

    return AUTable(
        au_names=names,
        timestamps=column("timestamp"),
        valid=column("valid") == 1,
        confidence=column("confidence"),
        probability=np.stack([column(name) for name in names], axis=1),
        active=np.stack([column(f"{name}_c") == 1 for name in names], axis=1),
        frames=column("frame").astype(np.int64),
        face_id=column("face_id").astype(np.int64) if "face_id" in header else None,
    )
