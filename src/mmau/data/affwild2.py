"""Aff-Wild2 as it is on disk: annotations, official splits, frames by number, submissions.

Row i of an annotation (1-based, header excluded) is frame i of the video in decoding order, image
`%05d.jpg` of the cropped set. Labels are joined to frames by that number and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmau.action_units import AU_NAMES
from mmau.data._affwild2_frames import (
    FilledFrames,
    FrameFolder,
    find_frame_folders,
    frame_numbers,
)
from mmau.data._affwild2_submission import (
    ListedFrame,
    ListedFrames,
    listed_frames,
    write_submission,
)
from mmau.data._affwild2_text import AnnotationError, header, read_lines
from mmau.data._affwild2_trials import (
    ListedTrial,
    Split,
    Trial,
    find_annotations,
    find_listed_trials,
    find_trials,
    find_videos,
    video_of_trial,
)

__all__ = [
    "Annotation",
    "AnnotationError",
    "FilledFrames",
    "FrameFolder",
    "JoinedLabels",
    "ListedFrame",
    "ListedFrames",
    "ListedTrial",
    "Split",
    "Trial",
    "find_annotations",
    "find_frame_folders",
    "find_listed_trials",
    "find_trials",
    "find_videos",
    "frame_numbers",
    "join_labels",
    "listed_frames",
    "read_annotation",
    "video_of_trial",
    "write_submission",
]

VALUES = {"0": 0, "1": 1, "-1": -1}


@dataclass(frozen=True)
class Annotation:
    """The labels of one trial."""

    au_names: tuple[str, ...]
    """Names of the columns, from the header: twelve, or eight in the legacy files."""
    labels: npt.NDArray[np.int8]
    """`(t, c)`, 1, 0, or -1 where it is not known; row i is frame number i + 1."""
    num_partial_rows: int = 0
    """Rows of which only a part was -1."""

    def select(self, au_names: Sequence[str] = AU_NAMES) -> npt.NDArray[np.int8]:
        """Arrange the columns by name.

        Args:
            au_names: Wanted columns, in order.

        Returns:
            `(t, c)`, int8; -1 in columns that the file does not have.
        """
        wanted = np.full((len(self.labels), len(au_names)), -1, dtype=np.int8)
        for column, name in enumerate(au_names):
            if name in self.au_names:
                wanted[:, column] = self.labels[:, self.au_names.index(name)]
        return wanted


def read_annotation(path: str | Path, *, whole_rows: bool = True) -> Annotation:
    r"""Read one annotation file, with the Action Units that its header names.

    Carriage returns, blanks around values, a byte order mark and blank lines at the end are
    accepted; a blank line elsewhere would shift the frames, so it is an error.

    Args:
        path: Text file: a header `AU1,AU2,...`, then one row of 0, 1 or -1 per frame.
        whole_rows: Whether a -1 anywhere makes its whole row unknown, which is what it means in
            Aff-Wild2. If not, each entry is taken as written.

    Returns:
        Names and labels.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If a line is not what it should be; says which.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "video1.txt"
        >>> _ = path.write_text("AU1,AU2 \r\n0,1\r\n-1,-1\r\n")
        >>> annotation = read_annotation(path)
        >>> annotation.au_names, annotation.labels.tolist()
        (('AU1', 'AU2'), [[0, 1], [-1, -1]])
    """
    lines = read_lines(Path(path))
    if not lines:
        raise AnnotationError(f"{path} is empty; expected a header such as AU1,AU2,AU4.")
    au_names = header(lines[0], f"{path}, line 1")
    parsed: dict[str, list[int]] = {}  # few distinct rows make up a file of many
    rows: list[list[int]] = []
    for number, line in enumerate(lines[1:], start=2):
        if line not in parsed:
            values = [VALUES.get(token.strip()) for token in line.split(",")]
            if len(values) != len(au_names) or None in values:
                raise AnnotationError(
                    f"{path}, line {number}: expected {len(au_names)} values of 0, 1 or -1, as the "
                    f"header has {len(au_names)} Action Units; got {line.strip()!r}."
                )
            parsed[line] = [value for value in values if value is not None]
        rows.append(parsed[line])
    labels = np.array(rows, dtype=np.int8).reshape(-1, len(au_names))
    unknown = labels == -1
    partial = unknown.any(axis=1) & ~unknown.all(axis=1)
    if whole_rows:
        labels[partial] = -1
    return Annotation(au_names, labels, int(partial.sum()))


# -------------------------------------------------------------------------------------------- join
@dataclass(frozen=True)
class JoinedLabels:
    """Labels in the order of the frames that are there."""

    labels: npt.NDArray[np.int8]
    """`(n, c)`, 1, 0 or -1, one row per frame that was asked for."""
    has_row: npt.NDArray[np.bool_]
    """`(n)`, whether the annotation has a row of this number."""
    num_rows: int
    """Rows of the annotation."""
    num_rows_without_frame: int
    """Rows that no frame was there for."""

    @property
    def report(self) -> str:
        """What does not agree, in a sentence; empty if everything does."""
        without_row = int((~self.has_row).sum())
        if not without_row and not self.num_rows_without_frame:
            return ""
        return (
            f"{len(self.has_row)} frames and {self.num_rows} annotation rows: {without_row} frames "
            f"have no row, {self.num_rows_without_frame} rows have no frame."
        )


def join_labels(
    labels: npt.NDArray[np.int8], numbers: Sequence[int] | npt.NDArray[Any]
) -> JoinedLabels:
    """Give each frame the row of its own number; nothing is ever shifted to make lengths agree.

    Args:
        labels: `(t, c)`, labels of one trial, row i for frame number i + 1.
        numbers: `(n)`, 1-based frame numbers, each once; for a video, decoding index + 1.

    Returns:
        Labels per frame, -1 where the annotation has no row, and what did not agree.

    Raises:
        ValueError: If a number is below 1 or occurs twice.

    Examples:
        >>> labels = np.array([[0], [1], [0]], dtype=np.int8)
        >>> joined = join_labels(labels, [2, 3, 4])
        >>> joined.labels.flatten().tolist()
        [1, 0, -1]
        >>> joined.report
        '3 frames and 3 annotation rows: 1 frames have no row, 1 rows have no frame.'
    """
    wanted = np.asarray(numbers, dtype=np.int64).reshape(-1)
    if len(wanted) and int(wanted.min()) < 1:
        raise ValueError(f"`numbers` are 1-based frame numbers; got {int(wanted.min())}.")
    if len(np.unique(wanted)) != len(wanted):
        raise ValueError("`numbers` must hold each frame number once.")
    has_row = wanted <= len(labels)
    joined = np.full((len(wanted), labels.shape[1]), -1, dtype=np.int8)
    joined[has_row] = labels[wanted[has_row] - 1]
    return JoinedLabels(joined, has_row, len(labels), len(labels) - int(has_row.sum()))
