"""Aff-Wild2 as it is on disk: annotations, official splits, frames by number, submissions.

Row i of an annotation (1-based, header excluded) is frame i of the video in decoding order, image
`%05d.jpg` of the cropped set. Labels are joined to frames by that number and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmau._checks import check_choice
from mmau.action_units import AU_NAMES
from mmau.data._affwild2_submission import write_submission
from mmau.data._affwild2_text import AnnotationError, header, read_lines

__all__ = [
    "Annotation",
    "AnnotationError",
    "JoinedLabels",
    "Trial",
    "find_trials",
    "frame_numbers",
    "join_labels",
    "read_annotation",
    "video_of_trial",
    "write_submission",
]

Split = Literal["train", "validation"]

SPLIT_FOLDERS: dict[str, str] = {"train": "Train_Set", "validation": "Validation_Set"}
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm"})
TRIAL_SUFFIXES = ("_left", "_right", "_main")

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


# ------------------------------------------------------------------------------------------ trials
@dataclass(frozen=True)
class Trial:
    """One annotated person in one video."""

    name: str
    """Name of the annotation, without suffix: `<video>`, or `<video>_left`, `_right` or `_main`."""
    video: Path
    """The video file."""
    annotation: Path
    """The annotation file."""
    split: Split
    """Official split."""

    @property
    def video_name(self) -> str:
        """Name of the video without suffix: what keeps `_left` and `_right` together."""
        return self.video.stem


def video_of_trial(name: str) -> str:
    """Strip the one suffix that says which person of the video a trial is.

    Args:
        name: Trial name.

    Returns:
        Video name.

    Examples:
        >>> video_of_trial("video10_1_left"), video_of_trial("30-30-1920x1080")
        ('video10_1', '30-30-1920x1080')
    """
    for suffix in TRIAL_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name[: -len(suffix)]
    return name


def find_trials(
    root: str | Path,
    split: Split = "train",
    *,
    missing_videos: Literal["error", "skip"] = "error",
) -> list[Trial]:
    """List the trials of an official split, each with its video.

    Videos are looked for anywhere below `<root>/videos`. Hidden files (`.DS_Store`,
    `._video1.txt`), folders and files of other kinds are ignored.

    Args:
        root: Folder with `videos` and `AU_Detection_Challenge/{Train_Set,Validation_Set}`.
        split: `"train"` or `"validation"`.
        missing_videos: Whether a trial without its video is an `"error"` or is left out (`"skip"`).

    Returns:
        Trials, sorted by name.

    Raises:
        FileNotFoundError: If a folder or a video is missing, or the split holds no annotation.
        ValueError: If an option is unknown, two videos share a name, or a trial is in both splits.
    """
    check_choice("split", split, SPLIT_FOLDERS)
    check_choice("missing_videos", missing_videos, ("error", "skip"))
    challenge = Path(root) / "AU_Detection_Challenge"
    annotations = _annotations(challenge / SPLIT_FOLDERS[split])
    if not annotations:
        raise FileNotFoundError(
            f"no annotation of the {split} split: expected *.txt files in "
            f"{challenge / SPLIT_FOLDERS[split]}"
        )
    for other, folder in SPLIT_FOLDERS.items():
        if other == split or not (challenge / folder).is_dir():
            continue
        shared = annotations.keys() & _annotations(challenge / folder)
        if shared:
            raise ValueError(
                f"{len(shared)} trials are in both splits below {challenge}, such as "
                f"{min(shared)!r}; scores on them would be worthless."
            )
    videos = _videos(Path(root) / "videos")
    trials, missing = [], []
    for name, annotation in sorted(annotations.items()):
        # A video may itself be called something_left: its own name goes first.
        video = videos.get(name) or videos.get(video_of_trial(name))
        if video is None:
            missing.append(name)
        else:
            trials.append(Trial(name, video, annotation, split))
    if missing and missing_videos == "error":
        raise FileNotFoundError(
            f"no video below {Path(root) / 'videos'} for {len(missing)} of {len(annotations)} "
            f"{split} trials: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return trials


def frame_numbers(folder: str | Path) -> npt.NDArray[np.int64]:
    """List the frame numbers of a folder of cropped images, `00001.jpg` and so on.

    Args:
        folder: Folder of one trial; hidden files, sub-folders and other files are ignored.

    Returns:
        `(n)`, 1-based and increasing, with gaps where there is no image; empty without any image.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    names = (path.name for path in folder.iterdir() if path.is_file())
    found = [re.fullmatch(r"(\d+)\.(?:jpg|jpeg|png)", name) for name in names]
    numbers = sorted(int(match[1]) for match in found if match)
    return np.array(numbers, dtype=np.int64)


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


# --------------------------------------------------------------------------------------- internals
def _annotations(folder: Path) -> dict[str, Path]:
    """Trial name to file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return {
        path.stem: path
        for path in folder.iterdir()
        if path.is_file() and path.suffix == ".txt" and not path.name.startswith(".")
    }


def _videos(folder: Path) -> dict[str, Path]:
    """Video name to file, from anywhere below the folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        if not path.is_file():
            continue
        if path.stem in found:
            raise ValueError(f"two videos share a name: {found[path.stem]} and {path}.")
        found[path.stem] = path
    return found
