"""What is missing, odd or inconsistent in a data root, in plain words.

Nothing is decoded and nothing is changed: annotations are read, folders are listed, and containers
are asked what they announce.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mmau._checks import check_range
from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import (
    SPLIT_FOLDERS,
    Annotation,
    annotations_in,
    challenge_folder,
    find_frame_folders,
    find_videos,
    frame_numbers,
    read_annotation,
    video_of_trial,
)
from mmau.media.errors import MediaError
from mmau.media.video import open_container
from mmau.progress import ProgressCallback

Severity = Literal["error", "warning", "note"]

_ORDER: tuple[Severity, ...] = ("error", "warning", "note")
_NOTABLE_SECONDS = 0.1  # of sound that starts late or ends early; codecs pad by less
_NOTABLE_RATE = 0.5  # frames per second between name and file


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know about a data root."""

    severity: Severity
    """`"error"`: this part cannot be used; `"warning"`: used, but look; `"note"`: handled."""
    where: str
    """Trial, file or folder."""
    message: str
    """What about it, in a sentence."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}"


@dataclass
class _Report:
    """Findings by kind, so that a hundred of one kind do not hide the one of another."""

    kinds: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, kind: str, severity: Severity, where: object, message: str) -> None:
        self.kinds.setdefault(kind, []).append(Finding(severity, str(where), message))

    def findings(self, max_per_kind: int) -> list[Finding]:
        kept = []
        for kind, found in self.kinds.items():
            kept += found[:max_per_kind]
            if len(found) > max_per_kind:
                rest = len(found) - max_per_kind
                kept.append(Finding(found[0].severity, "...", f"{rest} more of this kind ({kind})"))
        return sorted(kept, key=lambda finding: _ORDER.index(finding.severity))


@dataclass(frozen=True)
class _VideoFacts:
    """What a container announces."""

    num_frames: int | None
    rate: float | None
    start: float
    duration: float | None
    sound: tuple[float, float | None] | None
    """Start and length in seconds."""


def check_data_root(
    root: str | Path,
    *,
    open_videos: bool = True,
    max_per_kind: int = 5,
    progress: ProgressCallback | None = None,
) -> list[Finding]:
    """Look at everything that can be wrong with a data root before hours are spent on it.

    Args:
        root: Folder in the layout of Aff-Wild2: `videos`, `AU_Detection_Challenge` and, if there
            are, folders `cropped_aligned*`.
        open_videos: Whether to ask each video for its frames, rate and sound. Needs PyAV.
        max_per_kind: Findings of one kind that are listed; the rest is counted.
        progress: Called as `progress(done, total)` after each trial.

    Returns:
        Findings, errors first. Without an error, every trial can be used. The last notes say how
        much there is of each split.

    Raises:
        ValueError: If `max_per_kind` is below 1.
        MissingDependencyError: If `open_videos` and PyAV is not installed.

    Examples:
        >>> for finding in check_data_root("no/such/folder"):
        ...     print(finding)
        error: no/such/folder: there is no such folder.
    """
    check_range("max_per_kind", max_per_kind, 1)
    root, report = Path(root), _Report()
    if not root.is_dir():
        what = "this is a file, not a folder." if root.exists() else "there is no such folder."
        report.add("root", "error", root, what)
        return report.findings(max_per_kind)
    annotations = _annotations(root, report)
    videos = _videos(root, report)
    folders = _image_folders(root, report)
    used: dict[str, set[str]] = {}
    totals: dict[str, Counter[str]] = {split: Counter() for split in annotations}
    trials = [(split, *item) for split, found in annotations.items() for item in found.items()]
    facts: dict[Path, _VideoFacts | None] = {}
    for done, (split, name, path) in enumerate(trials, start=1):
        annotation = _annotation(path, report)
        totals[split]["trials"] += 1
        if annotation is not None:
            labelled = int((annotation.labels != -1).any(axis=1).sum())
            totals[split]["rows"] += len(annotation.labels)
            totals[split]["labelled"] += labelled
        video = videos.get(name) or videos.get(video_of_trial(name))
        if video is None:
            report.add("no video", "error", name, f"there is no video of it below {root}/videos.")
        else:
            used.setdefault(video.stem, set()).add(split)
            if open_videos:
                if video not in facts:
                    facts[video] = _video(video, report)
                if annotation is not None:
                    _compare_counts(name, facts[video], annotation, report)
        if folders:
            _images(name, folders.get(name), annotation, report)
        if progress is not None:
            progress(done, len(trials))
    for stem, splits in sorted(used.items()):
        if len(splits) > 1:
            report.add(
                "two splits", "note", stem, "people of this video are in both official splits."
            )
    spare = sorted(videos.keys() - used.keys())
    if spare and trials:
        report.add(
            "spare videos", "note", root / "videos",
            f"{_some(len(spare), 'video')} without annotation (test set or other tracks): "
            f"{', '.join(spare[:3])}{', ...' if len(spare) > 3 else ''}",
        )  # fmt: skip
    _junk(root, report)
    for split, total in totals.items():
        report.add(
            f"{split} size", "note", split,
            f"{_some(total['trials'], 'trial')}, {_some(total['rows'], 'row')}, of which "
            f"{total['labelled']} labelled.",
        )  # fmt: skip
    return report.findings(max_per_kind)


# --------------------------------------------------------------------------------- what there is
def _annotations(root: Path, report: _Report) -> dict[str, dict[str, Path]]:
    try:
        challenge = challenge_folder(root)
    except ValueError as error:
        report.add("layout", "error", root, str(error))
        return {}
    if not challenge.is_dir():
        report.add("layout", "error", challenge, "there is no such folder, so no annotation.")
        return {}
    found = {}
    for split, folder in SPLIT_FOLDERS.items():
        if not (challenge / folder).is_dir():
            report.add("layout", "error", challenge / folder, "there is no such folder.")
            continue
        found[split] = dict(sorted(annotations_in(challenge / folder).items()))
        if not found[split]:
            report.add("layout", "error", challenge / folder, "there is not one annotation in it.")
    for name in sorted(set.intersection(*map(set, found.values()))) if len(found) > 1 else ():
        report.add(
            "both splits", "error", name,
            "this trial is in both official splits; scores on it would be worthless.",
        )  # fmt: skip
    return found


def _videos(root: Path, report: _Report) -> dict[str, Path]:
    try:
        found = find_videos(root)
    except (FileNotFoundError, ValueError) as error:
        report.add("layout", "error", root / "videos", str(error))
        return {}
    for path in found.values():
        if path.stat().st_size == 0:
            report.add("empty video", "error", path, "the file is empty (0 bytes).")
    return found


def _image_folders(root: Path, report: _Report) -> dict[str, Path]:
    try:
        return find_frame_folders(root)
    except ValueError as error:
        report.add("layout", "error", root, str(error))
        return {}


def _junk(root: Path, report: _Report) -> None:
    """Count what a careless loader would trip over; ours ignores it."""
    names = Counter(
        "._*" if path.name.startswith("._") else path.name
        for path in root.rglob("*")
        if path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "desktop.ini")
    )
    if names:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        report.add("junk", "note", root, f"files of other systems, ignored: {listed}.")


# ----------------------------------------------------------------------------------- one trial
def _annotation(path: Path, report: _Report) -> Annotation | None:
    try:
        annotation = read_annotation(path)
    except (ValueError, OSError) as error:
        report.add("annotation", "error", path.stem, str(error))
        return None
    lacking = [name for name in AU_NAMES if name not in annotation.au_names]
    if lacking:
        report.add(
            "header", "note", path.stem,
            f"the header has {len(annotation.au_names)} Action Units; unknown here: "
            f"{', '.join(lacking)}.",
        )  # fmt: skip
    if annotation.num_partial_rows:
        report.add(
            "partial rows", "warning", path.stem,
            f"{_some(annotation.num_partial_rows, 'row')} with -1 in some columns only; the whole "
            "row counts as unknown.",
        )  # fmt: skip
    if not len(annotation.labels):
        report.add("no rows", "warning", path.stem, "the annotation has a header and no row.")
    elif (annotation.labels == -1).all():
        report.add("unlabelled", "warning", path.stem, "not one row is labelled, all are -1.")
    return annotation


def _video(path: Path, report: _Report) -> _VideoFacts | None:
    try:
        facts = _ask(path)
    except MediaError as error:
        report.add("unreadable video", "error", path, str(error))
        return None
    named = re.match(r"\d+-(\d+)-\d+x\d+", path.stem)
    if named and facts.rate is not None and abs(int(named[1]) - facts.rate) > _NOTABLE_RATE:
        report.add(
            "rate", "note", path.stem,
            f"the name says {named[1]} frames per second, the file {facts.rate:.2f}; times are "
            "taken from the file.",
        )  # fmt: skip
    if facts.sound is None:
        report.add("no sound", "note", path.stem, "the video has no sound.")
        return facts
    start, length = facts.sound
    if start - facts.start > _NOTABLE_SECONDS:
        report.add(
            "late sound", "note", path.stem,
            f"the sound starts {start - facts.start:.2f} s after the picture.",
        )  # fmt: skip
    if length is not None and facts.duration is not None:
        early = facts.start + facts.duration - start - length
        if early > _NOTABLE_SECONDS:
            report.add(
                "short sound", "note", path.stem,
                f"the sound ends {early:.2f} s before the picture.",
            )  # fmt: skip
    return facts


def _ask(path: Path) -> _VideoFacts:
    with open_container(path) as container:
        if not container.streams.video:
            raise MediaError(f"the file has no picture: {path}")
        video = container.streams.video[0]
        sound = None
        if container.streams.audio:
            track = container.streams.audio[0]
            sound = (_seconds(track.start_time, track.time_base) or 0.0,
                     _seconds(track.duration, track.time_base))  # fmt: skip
        return _VideoFacts(
            num_frames=int(video.frames) or None,
            rate=None if video.average_rate is None else float(video.average_rate),
            start=_seconds(video.start_time, video.time_base) or 0.0,
            duration=_seconds(video.duration, video.time_base),
            sound=sound,
        )


def _seconds(ticks: int | None, time_base: float | None) -> float | None:
    return None if ticks is None or time_base is None else float(ticks * time_base)


def _some(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _compare_counts(
    name: str, facts: _VideoFacts | None, annotation: Annotation, report: _Report
) -> None:
    if facts is None or facts.num_frames is None or facts.num_frames == len(annotation.labels):
        return
    more = len(annotation.labels) - facts.num_frames
    rest = (
        f"{_some(more, 'row')} without frame"
        if more > 0
        else f"{_some(-more, 'frame')} without row"
    )
    report.add(
        "counts", "warning", name,
        f"the video announces {_some(facts.num_frames, 'frame')}, the annotation has "
        f"{_some(len(annotation.labels), 'row')}: {rest} at the end; nothing is shifted.",
    )  # fmt: skip


def _images(name: str, folder: Path | None, annotation: Annotation | None, report: _Report) -> None:
    if folder is None:
        report.add("no image folder", "note", name, "there is no folder of cropped images of it.")
        return
    try:
        numbers = frame_numbers(folder)
    except ValueError as error:
        report.add("image numbers", "error", folder, str(error))
        return
    if not len(numbers):
        report.add("no image", "warning", folder, "there is not one image in this folder.")
        return
    empty = sum(
        path.stat().st_size == 0
        for path in folder.iterdir()
        if path.suffix in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    )
    if empty:
        report.add("empty images", "warning", folder, f"{_some(empty, 'image')} with 0 bytes.")
    if annotation is None or not len(annotation.labels):
        return
    num_rows = len(annotation.labels)
    beyond = int((numbers > num_rows).sum())
    if beyond:
        report.add(
            "images beyond", "warning", name,
            f"{_some(beyond, 'image')} numbered above {num_rows}, the last row of the annotation.",
        )  # fmt: skip
    lacking = np.setdiff1d(np.arange(1, num_rows + 1), numbers)
    if len(lacking):
        before, after = int((lacking < numbers[0]).sum()), int((lacking > numbers[-1]).sum())
        report.add(
            "gaps", "note", name,
            f"{len(lacking)} of {num_rows} annotated frames have no image: {before} at the start, "
            f"{len(lacking) - before - after} in between, {after} at the end.",
        )  # fmt: skip
