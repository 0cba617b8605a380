"""Labels of other data sets, in our convention: 1 active, 0 not active, -1 unknown.

BP4D writes one table per recording, with the frame number in front and 9 for what could not be
seen; others write 999. DISFA writes one file of intensities, 0 to 5, per Action Unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mmau._checks import check_range
from mmau.action_units import AU_NAMES


class AnnotationError(ValueError):
    """An annotation or submission file does not say what it should; names the file and the line."""


def read_lines(path: Path) -> list[str]:
    """Lines without their ends; blank lines at the end are dropped, so line numbers stay true."""
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{kind}: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file: {error.reason}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


Number = TypeVar("Number", bound=np.generic)


def arrange_columns(
    array: npt.NDArray[Number], au_names: Sequence[str], wanted: Sequence[str], fill: float
) -> npt.NDArray[Number]:
    """The columns of `(n, c)` by name; `fill` in those that there are not."""
    arranged = np.full((len(array), len(wanted)), fill, dtype=array.dtype)
    for column, name in enumerate(wanted):
        if name in au_names:
            arranged[:, column] = array[:, au_names.index(name)]
    return arranged


BP4D_UNKNOWN: tuple[int, ...] = (9, 999)
"""Codes for "unknown": 9 in BP4D, 999 in tables derived from it and from others; -1 always is."""

DISFA_PRESENT_FROM = 2
"""The intensity from which the literature counts an Action Unit of DISFA as present."""


@dataclass(frozen=True)
class NumberedLabels:
    """The labels of one recording, each row with the frame number of its file."""

    au_names: tuple[str, ...]
    """Names of the columns."""
    numbers: npt.NDArray[np.int64]
    """`(n)`, frame numbers as written, increasing; they need not start at 1 nor be gapless."""
    labels: npt.NDArray[np.int8]
    """`(n, c)`, 1, 0, or -1 where it is not known."""

    def select(self, au_names: Sequence[str] = AU_NAMES) -> npt.NDArray[np.int8]:
        """Arrange the columns by name: `(n, c)`, -1 in those that the recording does not have."""
        return arrange_columns(self.labels, self.au_names, au_names, -1)

    def at(self, numbers: Iterable[int]) -> npt.NDArray[np.int8]:
        """Give each frame the row of its own number.

        Args:
            numbers: `(m)`, frame numbers of the same counting, in any order.

        Returns:
            `(m, c)`, -1 where there is no row.

        Examples:
            >>> found = NumberedLabels(("AU1",), np.array([7, 8]), np.array([[1], [0]], np.int8))
            >>> found.at([6, 8, 7]).flatten().tolist()
            [-1, 0, 1]
        """
        row_of = {int(number): row for row, number in enumerate(self.numbers)}
        rows = np.array([row_of.get(int(number), -1) for number in numbers], dtype=np.int64)
        joined = np.full((len(rows), self.labels.shape[1]), -1, dtype=np.int8)
        joined[rows >= 0] = self.labels[rows[rows >= 0]]
        return joined


def labels_from_occurrence(
    values: npt.ArrayLike, *, unknown: Sequence[int] = BP4D_UNKNOWN
) -> npt.NDArray[np.int8]:
    """Turn occurrence codes into 1, 0 and -1."""
    return _labels(values, unknown, highest=1, present_from=1, expected="0, 1")


def labels_from_intensity(
    values: npt.ArrayLike,
    *,
    present_from: int = DISFA_PRESENT_FROM,
    unknown: Sequence[int] = BP4D_UNKNOWN,
) -> npt.NDArray[np.int8]:
    """Turn FACS intensities into 1, 0 and -1."""
    check_range("present_from", present_from, 1, 5)
    expected = "intensities 0 to 5"
    return _labels(values, unknown, highest=5, present_from=present_from, expected=expected)


def _labels(
    values: npt.ArrayLike, unknown: Sequence[int], *, highest: int, present_from: int, expected: str
) -> npt.NDArray[np.int8]:
    given = np.asarray(values)
    if given.dtype.kind not in "iub" and not (given.size == 0 or (given == np.round(given)).all()):
        raise ValueError(f"`values` must be whole numbers; got {given.dtype.name} with fractions.")
    codes = given.astype(np.int64)
    is_unknown = np.isin(codes, [-1, *unknown])
    bad = ~is_unknown & ((codes < 0) | (codes > highest))
    if bad.any():
        accepted = ", ".join(str(code) for code in (-1, *unknown))
        raise ValueError(
            f"`values` must be {expected} or a code for unknown ({accepted}); got "
            f"{codes[bad].flat[0]}."
        )
    return np.where(is_unknown, -1, codes >= present_from).astype(np.int8)


def read_bp4d(path: str | Path, *, unknown: Sequence[int] = BP4D_UNKNOWN) -> NumberedLabels:
    r"""Read one occurrence table of BP4D.

    Args:
        path: Text file: a header of numbers, first that of the frame column (0), then the Action
            Units, `0,1,2,4,...`; then one row per coded frame, its number first.
        unknown: Codes that mean "unknown", besides -1.

    Returns:
        Labels with their frame numbers.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If a line is not what it should be; says which.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "F001_T1.csv"
        >>> _ = path.write_text("0,1,2\n2440,0,9\n2441,1,0\n")
        >>> table = read_bp4d(path)
        >>> table.au_names, table.numbers.tolist(), table.labels.tolist()
        (('AU1', 'AU2'), [2440, 2441], [[0, -1], [1, 0]])
    """
    lines = read_lines(Path(path))
    if not lines:
        raise AnnotationError(f"{path} is empty; expected a header such as 0,1,2,4.")
    heading = [token.strip() for token in lines[0].split(",")]
    if len(heading) < 2 or not all(token.isdecimal() for token in heading):
        raise AnnotationError(
            f"{path}, line 1: expected the numbers of the columns, such as 0,1,2,4; got "
            f"{lines[0].strip()!r}."
        )
    au_names = tuple(f"AU{int(token)}" for token in heading[1:])
    if len(set(au_names)) != len(au_names):
        raise AnnotationError(f"{path}, line 1: an Action Unit occurs twice.")
    rows = _rows(path, lines[1:], len(heading), first_line=2)
    try:
        labels = labels_from_occurrence(rows[:, 1:], unknown=unknown)
    except ValueError as error:
        raise AnnotationError(f"{path}: {error}") from error
    return NumberedLabels(au_names, rows[:, 0], labels)


def read_disfa(
    folder: str | Path,
    *,
    present_from: int = DISFA_PRESENT_FROM,
    unknown: Sequence[int] = BP4D_UNKNOWN,
) -> NumberedLabels:
    r"""Read the intensities of one subject of DISFA, one file per Action Unit.

    Args:
        folder: Folder with `SN001_au1.txt` and so on; each line is `frame number,intensity`.
        present_from: Smallest intensity that counts as active, 1 to 5.
        unknown: Codes that mean "unknown", besides -1.

    Returns:
        Labels, with Action Units in numeric order; -1 where a file has no line for a frame that
        another file has.

    Raises:
        FileNotFoundError: If there is no such folder, or no such file in it.
        AnnotationError: If a line is not what it should be, or files are of several subjects.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "SN001_au12.txt").write_text("1,0\n2,3\n")
        >>> table = read_disfa(folder)
        >>> table.au_names, table.labels.tolist()
        (('AU12',), [[0], [1]])
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files: dict[int, Path] = {}
    subjects = set()
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"([^.].*)_au(\d+)\.txt", path.name, flags=re.IGNORECASE)
        if match is not None and path.is_file():
            subjects.add(match[1])
            files[int(match[2])] = path
    if not files:
        raise FileNotFoundError(f"no file such as SN001_au1.txt in {folder}")
    if len(subjects) > 1:
        raise AnnotationError(
            f"the files of one subject must be in a folder of their own; {folder} has those of "
            f"{', '.join(sorted(subjects)[:3])}."
        )
    columns: dict[int, dict[int, int]] = {}
    for unit, path in sorted(files.items()):
        rows = _rows(path, read_lines(path), 2, first_line=1)
        try:
            values = labels_from_intensity(rows[:, 1], present_from=present_from, unknown=unknown)
        except ValueError as error:
            raise AnnotationError(f"{path}: {error}") from error
        columns[unit] = dict(zip(rows[:, 0].tolist(), values.tolist(), strict=True))
    numbers = sorted({number for column in columns.values() for number in column})
    labels = [[column.get(number, -1) for column in columns.values()] for number in numbers]
    return NumberedLabels(
        tuple(f"AU{unit}" for unit in columns),
        np.array(numbers, dtype=np.int64),
        np.array(labels, dtype=np.int8).reshape(len(numbers), len(columns)),
    )


def _rows(
    path: str | Path, lines: Sequence[str], num_columns: int, *, first_line: int
) -> npt.NDArray[np.int64]:
    """Whole numbers of a table whose first column increases."""
    rows: list[list[int]] = []
    for number, line in enumerate(lines, start=first_line):
        tokens = [token.strip() for token in line.split(",")]
        if len(tokens) != num_columns or not all(re.fullmatch(r"-?\d+", t) for t in tokens):
            raise AnnotationError(
                f"{path}, line {number}: expected {num_columns} whole numbers; got "
                f"{line.strip()!r}."
            )
        values = [int(token) for token in tokens]
        if rows and values[0] <= rows[-1][0]:
            raise AnnotationError(
                f"{path}, line {number}: frame numbers must increase; {values[0]} follows "
                f"{rows[-1][0]}."
            )
        rows.append(values)
    return np.array(rows, dtype=np.int64).reshape(len(rows), num_columns)
