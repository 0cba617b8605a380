"""What is missing, odd or inconsistent in a data root.

Nothing is decoded and nothing is changed: annotations are read, folders are listed, and containers
are asked what they announce.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Literal, TypeVar

from mmau._checks import check_range
from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import (
    SPLIT_FOLDERS,
    Annotation,
    annotations_in,
    challenge_folder,
    find_frame_folders,
    find_videos,
    frame_files,
    read_annotation,
    video_of,
)
from mmau.media.errors import MediaError
from mmau.media.video import open_container
from mmau.progress import ProgressCallback

Severity = Literal["error", "warning", "note"]

Result = TypeVar("Result")

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
    """What about it."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}"


@dataclass
class _Report:
    """Findings by kind, so that a hundred of one kind do not hide the one of another."""

    kinds: dict[str, list[Finding]] = field(default_factory=dict)

    def _add(self, severity: Severity, kind: str, where: object, message: str) -> None:
        self.kinds.setdefault(kind, []).append(Finding(severity, str(where), message))

    error = partialmethod(_add, "error")
    warning = partialmethod(_add, "warning")
    note = partialmethod(_add, "note")

    def attempt(
        self, kind: str, where: object, read: Callable[[Path], Result], path: Path
    ) -> Result | None:
        """Read something; what is raised becomes an error of the report."""
        try:
            return read(path)
        except (ValueError, OSError) as error:
            self.error(kind, where, str(error))
            return None

    def findings(self, max_per_kind: int) -> list[Finding]:
        """All findings, errors first; of one kind only so many, and how many more there are."""
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
        report.error("root", root, what)
        return report.findings(max_per_kind)
    annotations = _annotations(root, report)
    videos = report.attempt("layout", root / "videos", find_videos, root) or {}
    folders = report.attempt("layout", root, find_frame_folders, root) or {}
    for path in videos.values():
        if path.stat().st_size == 0:
            report.error("empty video", path, "the file is empty (0 bytes).")
    splits_of: dict[Path, set[str]] = {}
    num_frames: dict[Path, int | None] = {}
    trials = [(split, *item) for split, found in annotations.items() for item in found.items()]
    totals: dict[str, Counter[str]] = {split: Counter() for split in annotations}
    for done, (split, name, path) in enumerate(trials, start=1):
        annotation = _annotation(path, report)
        totals[split].update(trials=1)
        if annotation is not None:
            labelled = int((annotation.labels != -1).any(axis=1).sum())
            totals[split].update(rows=len(annotation.labels), labelled=labelled)
        video = video_of(name, videos)
        if video is None:
            report.error("no video", name, f"there is no video of it below {root}/videos.")
        else:
            splits_of.setdefault(video, set()).add(split)
            if open_videos and video not in num_frames:
                num_frames[video] = _video(video, report)
            _counts(name, num_frames.get(video), annotation, report)
        if folders:
            _images(name, folders.get(name), annotation, report)
        if progress is not None:
            progress(done, len(trials))
    for video, splits in sorted(splits_of.items()):
        if len(splits) > 1:
            what = "people of this video are in both official splits."
            report.note("two splits", video.stem, what)
    unused = sorted(name for name, video in videos.items() if video not in splits_of)
    if unused and trials:
        what = f"{_some(len(unused), 'video')} without annotation (test set or other tracks): "
        listed = f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
        report.note("videos without annotation", root / "videos", what + listed)
    _junk(root, report)
    for split, total in totals.items():
        sizes = f"{_some(total['trials'], 'trial')}, {_some(total['rows'], 'row')}"
        report.note(f"{split} size", split, f"{sizes}, of which {total['labelled']} labelled.")
    return report.findings(max_per_kind)


def _some(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _annotations(root: Path, report: _Report) -> dict[str, dict[str, Path]]:
    challenge = report.attempt("layout", root, challenge_folder, root)
    if challenge is None:
        return {}
    if not challenge.is_dir():
        report.error("layout", challenge, "there is no such folder, so no annotation.")
        return {}
    found = {}
    for split, name in SPLIT_FOLDERS.items():
        folder = challenge / name
        if not folder.is_dir():
            report.error("layout", folder, "there is no such folder.")
            continue
        found[split] = annotations_in(folder)
        if not found[split]:
            report.error("layout", folder, "there is not one annotation in it.")
    for name in sorted(set.intersection(*map(set, found.values()))) if len(found) > 1 else ():
        what = "this trial is in both official splits; scores on it would be worthless."
        report.error("both splits", name, what)
    return found


def _junk(root: Path, report: _Report) -> None:
    """Count what a careless loader would trip over; ours ignores it."""
    names = Counter(
        "._*" if path.name.startswith("._") else path.name
        for path in root.rglob("*")
        if path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "desktop.ini")
    )
    if names:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        report.note("junk", root, f"files of other systems, ignored: {listed}.")


# ------------------------------------------------------------------------------------- one trial
def _annotation(path: Path, report: _Report) -> Annotation | None:
    annotation = report.attempt("annotation", path.stem, read_annotation, path)
    if annotation is None:
        return None
    lacking = [name for name in AU_NAMES if name not in annotation.au_names]
    if lacking:
        what = f"the header has {len(annotation.au_names)} Action Units; unknown here: "
        report.note("header", path.stem, f"{what}{', '.join(lacking)}.")
    if annotation.num_partial_rows:
        rows = _some(annotation.num_partial_rows, "row")
        what = f"{rows} with -1 in some columns only; the whole row counts as unknown."
        report.warning("partial rows", path.stem, what)
    if not len(annotation.labels):
        report.warning("no rows", path.stem, "the annotation has a header and no row.")
    elif (annotation.labels == -1).all():
        report.warning("unlabelled", path.stem, "not one row is labelled, all are -1.")
    return annotation


def _video(path: Path, report: _Report) -> int | None:
    """Report what a container announces; returns its number of frames if it says so."""
    facts = report.attempt("unreadable video", path, _announced, path)
    if facts is None:
        return None
    named = re.match(r"\d+-(\d+)-\d+x\d+", path.stem)
    if named and facts.rate is not None and abs(int(named[1]) - facts.rate) > _NOTABLE_RATE:
        what = f"the name says {named[1]} frames per second, the file {facts.rate:.2f}"
        report.note("rate", path.stem, f"{what}; times are taken from the file.")
    if facts.sound is None:
        report.note("no sound", path.stem, "the video has no sound.")
        return facts.num_frames
    start, length = facts.sound
    if start - facts.start > _NOTABLE_SECONDS:
        what = f"the sound starts {start - facts.start:.2f} s after the video."
        report.note("late sound", path.stem, what)
    if length is not None and facts.duration is not None:
        early = facts.start + facts.duration - start - length
        if early > _NOTABLE_SECONDS:
            what = f"the sound ends {early:.2f} s before the video."
            report.note("short sound", path.stem, what)
    return facts.num_frames


def _announced(path: Path) -> _VideoFacts:
    with open_container(path) as container:
        if not container.streams.video:
            raise MediaError(f"the file has no video: {path}")
        video = container.streams.video[0]
        sound = None
        if container.streams.audio:
            track = container.streams.audio[0]
            start = _seconds(track.start_time, track.time_base) or 0.0
            sound = start, _seconds(track.duration, track.time_base)
        return _VideoFacts(
            num_frames=int(video.frames) or None,
            rate=None if video.average_rate is None else float(video.average_rate),
            start=_seconds(video.start_time, video.time_base) or 0.0,
            duration=_seconds(video.duration, video.time_base),
            sound=sound,
        )


def _seconds(ticks: int | None, time_base: float | None) -> float | None:
    return None if ticks is None or time_base is None else float(ticks * time_base)


def _counts(
    name: str, num_frames: int | None, annotation: Annotation | None, report: _Report
) -> None:
    if num_frames is None or annotation is None or num_frames == len(annotation.labels):
        return
    frames, rows = _some(num_frames, "frame"), _some(len(annotation.labels), "row")
    more = len(annotation.labels) - num_frames
    rest = f"{_some(more, 'row')} without frame"
    if more < 0:
        rest = f"{_some(-more, 'frame')} without row"
    report.warning(
        "counts",
        name,
        f"the video announces {frames}, the annotation has {rows}: {rest} at the end; nothing is "
        "shifted.",
    )


def _images(name: str, folder: Path | None, annotation: Annotation | None, report: _Report) -> None:
    if folder is None:
        report.note("no image folder", name, "there is no folder of cropped images of it.")
        return
    files = report.attempt("image numbers", folder, frame_files, folder)
    if files is None:
        return
    if not files:
        report.warning("no image", folder, "there is not one image in this folder.")
        return
    empty = sum(path.stat().st_size == 0 for path in files.values())
    if empty:
        report.warning("empty images", folder, f"{_some(empty, 'image')} with 0 bytes.")
    if annotation is None or not len(annotation.labels):
        return
    last, num_rows = max(files), len(annotation.labels)
    beyond = sum(number > num_rows for number in files)
    if beyond:
        what = f"numbered above {num_rows}, the last row of the annotation."
        report.warning("images beyond", name, f"{_some(beyond, 'image')} {what}")
    lacking = [number for number in range(1, num_rows + 1) if number not in files]
    if lacking:
        before, after = sum(n < min(files) for n in lacking), sum(n > last for n in lacking)
        report.note(
            "gaps",
            name,
            f"{len(lacking)} of {num_rows} annotated frames have no image: {before} at the start, "
            f"{len(lacking) - before - after} in between, {after} at the end.",
        )
