"""Which trials there are, in which official split, with which video and images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mmau._checks import check_choice
from mmau.data._affwild2_frames import find_frame_folders
from mmau.data._affwild2_submission import listed_frames

__all__ = [
    "SPLIT_FOLDERS",
    "ListedTrial",
    "Split",
    "Trial",
    "challenge_folder",
    "find_annotations",
    "find_listed_trials",
    "find_trials",
    "find_videos",
    "video_of_trial",
]

Split = Literal["train", "validation"]

SPLIT_FOLDERS: dict[str, str] = {"train": "Train_Set", "validation": "Validation_Set"}
CHALLENGE = "AU_Detection_Challenge"
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm"})
TRIAL_SUFFIXES = ("_left", "_right", "_main")


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
    videos, folders = find_videos(root), find_frame_folders(root)
    trials, missing = [], []
    for name, annotation in annotations.items():
        video = _video_of(name, videos)
        if video is None:
            missing.append(name)
        else:
            trials.append(Trial(name, video, annotation, split, folders.get(name)))
    if missing_videos == "error":
        _refuse_missing(missing, len(annotations), f"{split} trials", root)
    return trials


def find_annotations(root: str | Path, split: Split = "train") -> dict[str, Path]:
    """List the annotations of an official split, whether or not there are videos or images.

    Args:
        root: Folder with `AU_Detection_Challenge/{Train_Set,Validation_Set}`.
        split: `"train"` or `"validation"`.

    Returns:
        Trial name to annotation file, sorted by name.

    Raises:
        FileNotFoundError: If a folder is missing, or the split holds no annotation.
        ValueError: If the split is unknown, or a trial is in both splits.
    """
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
    return dict(sorted(annotations.items()))


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
    for frame in listed_frames(example).frames:
        numbers.setdefault(frame.trial, []).append(frame.number)
    videos, folders = find_videos(root), find_frame_folders(root)
    _refuse_missing(
        [name for name in numbers if _video_of(name, videos) is None],
        len(numbers),
        "listed trials",
        root,
    )
    return [
        ListedTrial(name, np.array(listed, dtype=np.int64), video, folders.get(name))
        for name, listed in numbers.items()
        if (video := _video_of(name, videos)) is not None
    ]


def challenge_folder(root: str | Path) -> Path:
    """Find the folder of the annotations of the AU track.

    Args:
        root: The data root, which holds it or holds one folder that does.

    Returns:
        The folder; `<root>/AU_Detection_Challenge` if there is none, for a message.

    Raises:
        ValueError: If several folders of the root hold one.
    """
    root = Path(root)
    found = sorted(path for path in root.glob(f"*/{CHALLENGE}") if path.is_dir())
    if (root / CHALLENGE).is_dir() or not found:
        return root / CHALLENGE
    if len(found) > 1:
        raise ValueError(
            f"several folders hold annotations, {found[0]} and {found[1]}; move all but one out "
            f"of {root}."
        )
    return found[0]


def annotations_in(folder: Path) -> dict[str, Path]:
    """Trial name to file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return {
        path.stem: path
        for path in folder.iterdir()
        if path.is_file() and path.suffix == ".txt" and not path.name.startswith(".")
    }


def find_videos(root: str | Path) -> dict[str, Path]:
    """List the videos of a data root, from anywhere below its folder `videos`.

    Args:
        root: The data root.

    Returns:
        Video name without suffix to file.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If two videos share a name.
    """
    folder = Path(root) / "videos"
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


def _video_of(trial: str, videos: dict[str, Path]) -> Path | None:
    # A video may itself be called something_left: its own name goes first.
    return videos.get(trial) or videos.get(video_of_trial(trial))


def _refuse_missing(missing: list[str], total: int, what: str, root: str | Path) -> None:
    if missing:
        raise FileNotFoundError(
            f"no video below {Path(root) / 'videos'} for {len(missing)} of {total} {what}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
