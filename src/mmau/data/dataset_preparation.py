"""Many videos, prepared once each: what is done is recognised, what is broken is listed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmau._checks import check_range
from mmau.data._face_finding import ALL_FACES, FaceFinder, FaceOptions
from mmau.data._preparation_workers import PreparationJob, run_jobs
from mmau.data._trial_target import TrialTarget
from mmau.data._trial_writer import TRIAL_FORMAT
from mmau.data.prepared_trial import read_about
from mmau.media.errors import MediaError, check_file
from mmau.progress import ProgressCallback

__all__ = ["PreparationError", "PreparationReport", "prepare_dataset", "source_fingerprint"]


class PreparationReport(dict[str, Path]):
    """Name of a trial to its file, for those that are ready, and what is to be said about them.

    Args:
        files: Name to file, in the order of the videos.
        failures: Name to reason, of the videos that could not be prepared.
        warnings: Name to sentences, of ready trials whose video was odd: cut, damaged.
        reused: Names of trials that were ready before.

    Examples:
        >>> report = PreparationReport({"a": Path("a.safetensors")}, warnings={"a": ["It is cut."]})
        >>> list(report), report.failures, report.warnings["a"]
        (['a'], {}, ('It is cut.',))
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        failures: Mapping[str, str] | None = None,
        warnings: Mapping[str, Sequence[str]] | None = None,
        reused: Sequence[str] = (),
    ) -> None:
        super().__init__(files)
        self.failures = dict(failures or {})
        self.warnings = {name: tuple(texts) for name, texts in (warnings or {}).items()}
        self.reused = tuple(reused)


class PreparationError(MediaError):
    """Some videos of a batch could not be prepared; the others were.

    `report` lists both; `failures` and `prepared` are its parts.

    Args:
        report: What was done and what was not.
        total: Number of videos.
    """

    def __init__(self, report: PreparationReport, total: int) -> None:
        self.report = report
        self.failures = report.failures
        self.prepared = dict(report)
        listed = "; ".join(f"{name}: {reason}" for name, reason in report.failures.items())
        super().__init__(
            f"{len(report.failures)} of {total} videos could not be prepared: {listed}"
        )


# ---------------------------------------------------------------------- fingerprint
def source_fingerprint(
    path: str | os.PathLike[str],
    *,
    crop_size: int,
    detector: str,
    landmarks: str = "mediapipe",
    face: str | int = "largest",
    detector_options: Mapping[str, Any] | None = None,
    landmark_options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """Describe everything that a prepared file depends on.

    Args:
        path: Source video.
        crop_size: Side of the crops, in pixels.
        detector: Name of the detector.
        landmarks: Name of the landmark extractor.
        face: Which face is followed.
        detector_options: Options of the detector; of files and folders also size and time count.
        landmark_options: Options of the landmark extractor, likewise.
        name: Name of the trial, by which folders of precomputed faces are searched.

    Returns:
        JSON: format, size and modification time of the source, options, versions of the libraries.

    Raises:
        MediaError: If there is no such file.
    """
    options = FaceOptions(
        crop_size, detector, landmarks, face, detector_options or {}, landmark_options or {}
    )
    return _fingerprint(path, options, name or Path(path).stem)


def _fingerprint(path: str | os.PathLike[str], options: FaceOptions, name: str) -> str:
    status = check_file(path).stat()
    return json.dumps(
        {
            "format": TRIAL_FORMAT,
            "source_bytes": status.st_size,
            "source_modified_ns": status.st_mtime_ns,
            **options.record(name),
            "av": _version("av"),
            "mediapipe": _version("mediapipe"),
        },
        sort_keys=True,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# ---------------------------------------------------------------------- many videos
def prepare_dataset(
    videos: Mapping[str, str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    detector: str = "mediapipe",
    landmarks: str = "mediapipe",
    face: str | int = "largest",
    detector_options: Mapping[str, Any] | None = None,
    landmark_options: Mapping[str, Any] | None = None,
    strict: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> PreparationReport:
    """Prepare many videos, each into one file; do only what is not done yet.

    Stop it at any time and start it again: finished files are recognised by their fingerprint. One
    video that cannot be read, or that makes a decoder crash, does not stop the others.

    With `face="all"` every person becomes a trial of its own with a row for every frame of the
    video: `<name>_face0`, `<name>_face1`, ... by the numbers of `PeopleTracker`. A video without a
    face gives `<name>_face0` in which no row is valid. `<name>.faces.json` says how many there are.

    Args:
        videos: Name of the trial to video file. A name may contain `/`, for sub-folders.
        folder: Where `<name>.safetensors` are written.
        crop_size: Side of the crops, in pixels.
        detector: Name in `FACE_DETECTORS`.
        landmarks: Name in `LANDMARK_EXTRACTORS`.
        face: Which of several faces to follow: `"largest"`, `"left"` or `"right"` when one has to
            be chosen, the number that `PeopleTracker` gives to a person, or `"all"`.
        detector_options: Options of the detector, such as `{"path": "boxes/"}`.
        landmark_options: Options of the landmark extractor.
        strict: Whether a cut or damaged video counts as unreadable.
        jobs: Processes, started by spawn: a script that uses more than one must do its work under
            `if __name__ == "__main__":`.
        overwrite: Whether to replace stale or corrupt files, instead of refusing them.
        progress: Called as `progress(done, total)` after each video.

    Returns:
        Name to file, in the order of `videos`, with the `warnings` about them.

    Raises:
        CacheError: If a file of that name is stale or corrupt, before anything is done.
        PreparationError: After all the others, if videos could not be read; its `report` names
            them and what is ready.
        DiskFullError: If there is no room; finished files are kept.
        ValueError: If an option is out of range, or a name leads out of `folder`.
        RuntimeError: If worker processes cannot start.

    Examples:
        ```python
        files = prepare_dataset({"1-30": "videos/1-30.mp4"}, "prepared", jobs=2)
        trial = load_trial(files["1-30"])
        ```
    """
    check_range("jobs", jobs, 1)
    options = FaceOptions(
        crop_size=crop_size,
        detector=detector,
        landmarks=landmarks,
        face=face,
        detector_options=detector_options or {},
        landmark_options=landmark_options or {},
    ).check(several=True)
    everybody = options.face == ALL_FACES
    targets = {name: TrialTarget.of(Path(folder), name, everybody=everybody) for name in videos}
    todo: dict[str, PreparationJob] = {}
    failures: dict[str, str] = {}
    reused: list[str] = []
    for name, video in videos.items():
        try:
            fingerprint = _fingerprint(video, options, name)
        except MediaError as error:
            failures[name] = str(error)
            continue
        if targets[name].is_done(fingerprint, overwrite=overwrite):
            reused.append(name)
        else:
            todo[name] = PreparationJob(str(video), targets[name], fingerprint, strict)
    if todo:
        FaceFinder(options).close()  # absent weights are said once, here, and not by every worker
    done = len(videos) - len(todo)
    if progress is not None:
        progress(done, len(videos))
    for name, reason in run_jobs(todo, options, jobs):
        if reason is not None:
            failures[name] = reason
        done += 1
        if progress is not None:
            progress(done, len(videos))
    report = _report(targets, failures, reused, strict)
    if report.failures:
        raise PreparationError(report, len(videos))
    return report


def _report(
    targets: Mapping[str, TrialTarget],
    failures: dict[str, str],
    reused: Sequence[str],
    strict: bool,
) -> PreparationReport:
    files: dict[str, Path] = {}
    warnings: dict[str, list[str]] = {}
    known: list[str] = []
    for name, target in targets.items():
        if name in failures:
            continue
        trials = target.trials()
        about = read_about(next(iter(trials.values())))
        # What was prepared without `strict` is judged by what was noted then.
        if strict and about.get("incomplete"):
            failures[name] = "; ".join(about["warnings"])
            continue
        files |= trials
        if about["warnings"]:
            warnings |= dict.fromkeys(trials, about["warnings"])
        if name in reused:
            known += trials
    return PreparationReport(files, failures=failures, warnings=warnings, reused=known)
