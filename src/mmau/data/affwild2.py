"""Aff-Wild2 as it is on disk: where things are, annotations, labels by frame number, submissions.

Row i of an annotation (1-based, header excluded) is frame i of the video in decoding order, image
`%05d.jpg` of the cropped set. Labels are joined to frames by that number and nothing else.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mmau._checks import check_choice, check_range
from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.tables.label_conventions import AnnotationError, arrange_columns, read_lines

Split = Literal["train", "validation"]

SPLIT_FOLDERS: dict[str, str] = {"train": "Train_Set", "validation": "Validation_Set"}
_CHALLENGE = "AU_Detection_Challenge"
_VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm"})
_TRIAL_SUFFIXES = ("_left", "_right", "_main")
_CROPS_PREFIX = "cropped_aligned"


# ------------------------------------------------------------------------------ where things are
def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return folder


def challenge_folder(root: str | Path) -> Path:
    """Find the folder of the annotations of the AU track, in the root or one level below."""
    root = Path(root)
    found = sorted(path for path in root.glob(f"*/{_CHALLENGE}") if path.is_dir())
    if (root / _CHALLENGE).is_dir() or not found:
        return root / _CHALLENGE
    if len(found) > 1:
        raise ValueError(
            f"several folders hold annotations, {found[0]} and {found[1]}; move all but one out "
            f"of {root}."
        )
    return found[0]


def annotations_in(folder: Path) -> dict[str, Path]:
    """Trial name to file, sorted; hidden files and files of other kinds are ignored."""
    return {
        path.stem: path
        for path in sorted(_existing(folder).iterdir())
        if path.is_file() and path.suffix == ".txt" and not path.name.startswith(".")
    }


def find_annotations(root: str | Path, split: Split = "train") -> dict[str, Path]:
    """List the annotations of an official split, whether or not there are videos or images."""
    check_choice("split", split, SPLIT_FOLDERS)
    challenge = challenge_folder(root)
    annotations = annotations_in(challenge / SPLIT_FOLDERS[split])
    if not annotations:
        raise FileNotFoundError(
            f"no annotation of the {split} split: expected *.txt files in "
            f"{challenge / SPLIT_FOLDERS[split]}"
        )
    for other, folder in SPLIT_FOLDERS.items():
        if other == split or not (challenge / folder).is_dir():
            continue
        shared = annotations.keys() & annotations_in(challenge / folder)
        if shared:
            raise ValueError(
                f"{len(shared)} trials are in both splits below {challenge}, such as "
                f"{min(shared)!r}; scores on them would be worthless."
            )
    return annotations


def find_videos(root: str | Path) -> dict[str, Path]:
    """List the videos of a data root, from anywhere below its folder `videos`."""
    found: dict[str, Path] = {}
    for path in sorted(_existing(Path(root) / "videos").rglob("*")):
        if path.suffix.lower() not in _VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        if not path.is_file():
            continue
        if path.stem in found:
            raise ValueError(f"two videos share a name: {found[path.stem]} and {path}.")
        found[path.stem] = path
    return found


def find_frame_folders(root: str | Path) -> dict[str, Path]:
    """List the folders of cropped images of a data root, from all its parts.

    The images come in several archives, `cropped_aligned` and `cropped_aligned_new_50_vids`, that
    people unpack beside or inside each other: every folder whose name starts with
    `cropped_aligned`, in the root or one level below, is searched.
    """
    root = _existing(root)
    parts = [
        part
        for pattern in (f"{_CROPS_PREFIX}*", f"*/{_CROPS_PREFIX}*")
        for part in root.glob(pattern)
        if part.is_dir() and not part.parent.name.startswith((".", "__MACOSX"))
    ]
    found: dict[str, Path] = {}
    for folder in (folder for part in sorted(parts) for folder in sorted(part.iterdir())):
        if not folder.is_dir() or folder.name.startswith((".", _CROPS_PREFIX)):
            continue
        if folder.name in found:
            raise ValueError(
                f"two folders hold the images of one trial: {found[folder.name]} and {folder}."
            )
        found[folder.name] = folder
    return dict(sorted(found.items()))


def frame_files(folder: str | Path) -> dict[int, Path]:
    """Frame number to image, of a folder of cropped images `00001.jpg` and so on."""
    found: dict[int, Path] = {}
    for path in _existing(folder).iterdir():
        match = re.fullmatch(r"(\d+)\.(?:jpg|jpeg|png)", path.name)
        if match is None or not path.is_file():
            continue
        number = int(match[1])
        if number < 1:
            raise ValueError(f"frame numbers start at 1, so this is not one: {path}")
        if number in found:
            raise ValueError(f"two images of frame {number}: {found[number]} and {path}.")
        found[number] = path
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------- trials
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
    frames: Path | None = None
    """Folder of cropped images, or `None` if there is none."""

    @property
    def video_name(self) -> str:
        """Name of the video without suffix: what keeps `_left` and `_right` together."""
        return self.video.stem

    @property
    def face(self) -> str:
        """Whom to follow in the video, as `prepare_video` takes it; the names say the side only."""
        sides = {"_left": "left", "_right": "right"}
        # Not the end of the name alone: `video10_1_left` is a video.
        return sides.get(self.name.removeprefix(self.video_name), "largest")


@dataclass(frozen=True)
class ListedTrial:
    """A trial of the test set: known only by the frames that a submission must hold."""

    name: str
    """Name of the trial."""
    numbers: npt.NDArray[np.int64]
    """`(n)`, the frame numbers that are listed, 1-based, in their order."""
    video: Path
    """The video file."""
    frames: Path | None = None
    """Folder of cropped images, or `None` if there is none."""


def video_of_trial(name: str) -> str:
    """Strip the one suffix that says which person of the video a trial is.

    Examples:
        >>> video_of_trial("video10_1_left"), video_of_trial("30-30-1920x1080")
        ('video10_1', '30-30-1920x1080')
    """
    for suffix in _TRIAL_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


def video_of(trial: str, videos: Mapping[str, Path]) -> Path | None:
    """The video of a trial; one that is itself called something_left goes first."""
    return videos.get(trial) or videos.get(video_of_trial(trial))


def _videos_of(
    trials: Collection[str], root: str | Path, what: str, *, skip_missing: bool = False
) -> dict[str, Path]:
    videos = find_videos(root)
    found = {trial: video for trial in trials if (video := video_of(trial, videos)) is not None}
    missing = [trial for trial in trials if trial not in found]
    if missing and not skip_missing:
        raise FileNotFoundError(
            f"no video below {Path(root) / 'videos'} for {len(missing)} of {len(trials)} {what}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return found


def find_trials(
    root: str | Path,
    split: Split = "train",
    *,
    missing_videos: Literal["error", "skip"] = "error",
) -> list[Trial]:
    """List the trials of an official split, each with its video and its images if there are any.

    Videos are looked for anywhere below `<root>/videos`. Hidden files (`.DS_Store`,
    `._video1.txt`), folders and files of other kinds are ignored.

    Args:
        root: Folder with `videos` and `AU_Detection_Challenge/{Train_Set,Validation_Set}`, the
            latter possibly one level deeper.
        split: `"train"` or `"validation"`.
        missing_videos: Whether a trial without its video is an `"error"` or is left out (`"skip"`).

    Returns:
        Trials, sorted by name.

    Raises:
        FileNotFoundError: If a folder or a video is missing, or the split holds no annotation.
        ValueError: If an option is unknown, two videos or two folders of images share a name, or a
            trial is in both splits.
    """
    check_choice("missing_videos", missing_videos, ("error", "skip"))
    annotations = find_annotations(root, split)
    skip = missing_videos == "skip"
    videos = _videos_of(annotations, root, f"{split} trials", skip_missing=skip)
    folders = find_frame_folders(root)
    return [
        Trial(name, video, annotations[name], split, folders.get(name))
        for name, video in videos.items()
    ]


def find_listed_trials(root: str | Path, example: str | Path) -> list[ListedTrial]:
    """List the trials of the test set, which the official example file defines.

    Args:
        root: Folder with `videos`, and the folders of cropped images if there are any.
        example: Official example of a submission.

    Returns:
        Trials in the order of their first listed frame, with all their listed frames.

    Raises:
        FileNotFoundError: If the example, the folder of videos or a video is missing.
        AnnotationError: If a line of the example is not of its form.
        ValueError: If two videos or two folders of images share a name.
    """
    numbers: dict[str, list[int]] = {}
    for frame in listed_frames(example)[1]:
        numbers.setdefault(frame.trial, []).append(frame.number)
    videos = _videos_of(numbers, root, "listed trials")
    folders = find_frame_folders(root)
    return [
        ListedTrial(name, np.array(numbers[name], dtype=np.int64), video, folders.get(name))
        for name, video in videos.items()
    ]


# ----------------------------------------------------------------------------------- annotations
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
        """Arrange the columns by name: `(t, c)`, -1 in columns that the file does not have."""
        return arrange_columns(self.labels, self.au_names, au_names, -1)


_LABELS = {"0": 0, "1": 1, "-1": -1}


def _read_header(line: str, where: str) -> tuple[str, ...]:
    """Names of the Action Units; empty fields at the end come from trailing commas."""
    names = [name.strip() for name in line.split(",")]
    while names and not names[-1]:
        names.pop()
    if not names or not all(re.fullmatch(r"AU\d+", name) for name in names):
        raise AnnotationError(f"{where}: expected names such as AU1,AU2,AU4; got {line.strip()!r}.")
    if len(set(names)) != len(names):
        raise AnnotationError(f"{where}: an Action Unit occurs twice; got {line.strip()!r}.")
    return tuple(names)


def read_annotation(path: str | Path, *, whole_rows: bool = True) -> Annotation:
    r"""Read one annotation file, with the Action Units that its header names.

    Carriage returns, blanks around values, a byte order mark and blank lines at the end are
    accepted; a blank line elsewhere would shift the frames, so it is an error.

    Args:
        path: Text file: a header `AU1,AU2,...`, then one row of 0, 1 or -1 per frame.
        whole_rows: Whether a -1 anywhere makes its whole row unknown, which is what it means in
            Aff-Wild2. If not, each entry is taken as written.

    Returns:
        `labels` `(t, c)` with their `au_names`; `select(au_names)` arranges the columns.

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
    au_names = _read_header(lines[0], f"{path}, line 1")
    parsed: dict[str, list[int]] = {}  # few distinct rows make up a file of many
    rows: list[list[int]] = []
    for number, line in enumerate(lines[1:], start=2):
        if line not in parsed:
            values = [_LABELS.get(token.strip()) for token in line.split(",")]
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


@dataclass(frozen=True)
class JoinedLabels:
    """Labels in the order of the frames that are there."""

    labels: npt.NDArray[np.int8]
    """`(n, c)`, 1, 0 or -1, one row per frame that was asked for."""
    has_row: npt.NDArray[np.bool_]
    """`(n)`, whether the annotation has a row of this number."""
    num_rows: int
    """Rows of the annotation."""

    @property
    def num_rows_without_frame(self) -> int:
        """Rows that no frame was there for."""
        return self.num_rows - int(self.has_row.sum())

    @property
    def report(self) -> str:
        """What does not agree, in words; empty if everything does."""
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
        `labels` `(n, c)`, -1 where the annotation has no row (`has_row`), and a `report` of what
        does not agree, empty if everything does.

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
    return JoinedLabels(joined, has_row, len(labels))


# ------------------------------------------------------------------------------------ submission
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


def listed_frames(example: str | Path) -> tuple[tuple[str, ...], list[ListedFrame]]:
    """Read what a submission must hold: the names of its columns, and its frames in order."""
    lines = read_lines(Path(example))
    if not lines or lines[0].split(",")[0].strip() != "image_location":
        raise AnnotationError(f"{example}, line 1: expected image_location,AU1,AU2,...")
    au_names = _read_header(lines[0].partition(",")[2], f"{example}, line 1")
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
    return au_names, frames


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
            a frame raises.

    Returns:
        Number of rows written.

    Raises:
        FileNotFoundError: If there is no example file.
        AnnotationError: If a line of the example is not of that form.
        ValueError: If a prediction is missing for a listed frame, or is not 0 or 1.
    """
    check_range("repeat_last", repeat_last, 0)
    wanted, frames = listed_frames(example)
    lacking = [name for name in wanted if name not in au_names]
    if lacking:
        raise ValueError(f"{example} wants {', '.join(lacking)}, which `au_names` does not have.")
    order = [list(au_names).index(name) for name in wanted]
    rows = []
    for frame in frames:
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
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_location", *wanted])
        writer.writerows(rows)
    return len(rows)
