"""From video files to aligned faces, landmarks and sound: computed once, kept in one file each.

A prepared trial has one row per decoded frame, whether or not a face was found: `valid` tells.
Files are written under a temporary name and renamed, and carry a fingerprint of their source and
options, so that an interrupted `prepare_dataset` goes on where it stopped and never serves stale
rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mmau._checks import check_range
from mmau._optional import require
from mmau.data.prepared_trial import (
    TRIAL_FORMAT,
    CacheError,
    PreparedTrial,
    is_prepared,
    load_trial,
    save_trial,
)
from mmau.media.audio import read_audio
from mmau.media.errors import MediaError, check_file
from mmau.media.face_alignment import align_faces
from mmau.media.faces import FACE_DETECTORS, FaceTracker
from mmau.media.video import VideoReader
from mmau.progress import ProgressCallback

__all__ = [
    "CacheError",
    "PreparationError",
    "PreparedTrial",
    "load_trial",
    "prepare_dataset",
    "prepare_video",
    "save_trial",
    "source_fingerprint",
]

_SUFFIX = ".safetensors"
_SAMPLE_RATE = 16000


class PreparationError(MediaError):
    """Some videos of a batch could not be prepared; the others were.

    Args:
        failures: Name to reason.
        prepared: Name to file, of those that worked.
    """

    def __init__(self, failures: Mapping[str, str], prepared: Mapping[str, Path]) -> None:
        self.failures = dict(failures)
        self.prepared = dict(prepared)
        listed = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
        total = len(self.failures) + len(self.prepared)
        super().__init__(f"{len(self.failures)} of {total} videos could not be prepared: {listed}")


# ---------------------------------------------------------------------- one video
def prepare_video(
    path: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    detector: str = "mediapipe",
    select: str = "largest",
    strict: bool = False,
    name: str | None = None,
    progress: ProgressCallback | None = None,
    num_threads: int = 0,
) -> PreparedTrial:
    """Decode a video, follow one face through it, align it, and read the sound.

    Args:
        path: Video file.
        crop_size: Side of the crops, in pixels.
        detector: Name in `FACE_DETECTORS`.
        select: Which of several faces to follow: `"largest"`, `"left"` or `"right"`.
        strict: Raise if frames are missing, instead of noting it in `warnings`.
        name: Name of the trial; the file's without its extension if left out.
        progress: Called as `progress(done, total)` after each frame; `total` is what the container
            announces, at least `done`.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.

    Returns:
        One row per decoded frame, also of those without a face.

    Raises:
        MediaError: If the file is missing, a folder, empty, or no video; if cut and `strict`.
        UnknownComponentError: If there is no such detector.
        MissingDependencyError: If PyAV, OpenCV or MediaPipe is not installed.

    Examples:
        ```python
        trial = prepare_video("talk.mp4")
        print(trial.num_frames, trial.valid.mean(), trial.warnings)
        ```
    """
    check_range("crop_size", crop_size, 8)
    check_file(path)  # before any model is loaded
    faces = _face_tracker(detector, select)
    try:
        return _prepare(path, faces, crop_size, strict, name, progress, num_threads)
    finally:
        _close(faces)


def _face_tracker(detector: str, select: str) -> FaceTracker:
    finder = FACE_DETECTORS.create(detector)
    require("mediapipe", purpose="finding landmarks", extra="landmarks")
    # The registry's rule for detectors holds here too: MediaPipe loads when it is needed.
    from mmau.media.mediapipe_faces import MediaPipeLandmarks

    return FaceTracker(finder, MediaPipeLandmarks(), select=select)


def _close(faces: FaceTracker) -> None:
    """Stop the graphs now: a process that forks later must not inherit their threads."""
    for part in (faces.detector, faces.extractor):
        if hasattr(part, "close"):
            part.close()


def _prepare(
    path: str | os.PathLike[str],
    faces: FaceTracker,
    crop_size: int,
    strict: bool,
    name: str | None,
    progress: ProgressCallback | None,
    num_threads: int,
) -> PreparedTrial:
    faces.reset()
    crops, landmarks, confidence, timestamps = [], [], [], []
    nothing = np.full((68, 2), np.nan, dtype=np.float32)
    with VideoReader(path, strict=strict, num_threads=num_threads) as reader:
        announced = reader.info.num_frames_announced
        for frame in reader:
            face = faces.update(frame.image)
            # One frame at a time: full pictures are never kept.
            points = nothing if face is None else face.landmarks
            crop, moved = align_faces([frame.image], points[None], crop_size)
            crops.append(crop[0])
            landmarks.append(moved[0])
            confidence.append(0.0 if face is None else face.confidence)
            timestamps.append(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(announced or 0, frame.index + 1))
    sound = read_audio(path, sample_rate=_SAMPLE_RATE)
    moved_points = np.stack(landmarks)
    return PreparedTrial(
        name=name or Path(path).stem,
        crops=np.stack(crops),
        landmarks=moved_points,
        valid=np.isfinite(moved_points).all(axis=(1, 2)),
        confidence=np.asarray(confidence, dtype=np.float32),
        timestamps=np.asarray(timestamps, dtype=np.float64),
        waveform=None if sound is None else sound.waveform,
        audio_start=0.0 if sound is None else sound.start_time,
        num_frames_announced=announced,
        warnings=tuple(reader.warnings),
    )


# ---------------------------------------------------------------------- one file
def source_fingerprint(
    path: str | os.PathLike[str], *, crop_size: int, detector: str, select: str = "largest"
) -> str:
    """Describe everything that a prepared file depends on.

    Args:
        path: Source video.
        crop_size: Side of the crops, in pixels.
        detector: Name of the detector.
        select: Which face is followed.

    Returns:
        JSON: format, size and modification time of the source, options, versions of the libraries.

    Raises:
        MediaError: If there is no such file.
    """
    status = check_file(path).stat()
    return json.dumps(
        {
            "format": TRIAL_FORMAT,
            "source_bytes": status.st_size,
            "source_modified_ns": status.st_mtime_ns,
            "crop_size": crop_size,
            "detector": detector,
            "select": select,
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
    select: str = "largest",
    strict: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Path]:
    """Prepare many videos, each into one file; do only what is not done yet.

    Stop it at any time and start it again: finished files are recognised by their fingerprint. One
    video that cannot be read does not stop the others.

    Args:
        videos: Name of the trial to video file. A name may contain `/`, for sub-folders.
        folder: Where `<name>.safetensors` are written.
        crop_size: Side of the crops, in pixels.
        detector: Name in `FACE_DETECTORS`.
        select: Which of several faces to follow: `"largest"`, `"left"` or `"right"`.
        strict: Whether a cut video counts as unreadable.
        jobs: Processes, started by spawn: a script that uses more than one must do its work under
            `if __name__ == "__main__":`.
        overwrite: Whether to replace stale or corrupt files, instead of refusing them.
        progress: Called as `progress(done, total)` after each video.

    Returns:
        Name to file, in the order of `videos`.

    Raises:
        CacheError: If a file of that name is stale or corrupt, before anything is done.
        PreparationError: After all the others, if videos could not be read; names them.
        ValueError: If an option is out of range, or a name leads out of `folder`.
        RuntimeError: If a worker process was killed.

    Examples:
        ```python
        files = prepare_dataset({"1-30": "videos/1-30.mp4"}, "prepared", jobs=2)
        trial = load_trial(files["1-30"])
        ```
    """
    check_range("crop_size", crop_size, 8)
    check_range("jobs", jobs, 1)
    options = {"crop_size": crop_size, "detector": detector, "select": select}
    files = {name: _file_of(Path(folder), name) for name in videos}
    todo: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, video in videos.items():
        try:
            fingerprint = source_fingerprint(video, **options)  # type: ignore[arg-type]
        except MediaError as error:
            failures[name] = str(error)
            continue
        if not _is_done(files[name], fingerprint, overwrite):
            todo[name] = fingerprint
    FACE_DETECTORS.get(detector)  # an unknown name fails once, here, not in every worker
    done = len(videos) - len(todo)
    if progress is not None:
        progress(done, len(videos))
    work = partial(_prepare_one, options=options, strict=strict)
    jobs_of = {name: (str(videos[name]), str(files[name]), name, todo[name]) for name in todo}
    for name, reason in _run(work, jobs_of, jobs, detector, select):
        if reason is not None:
            failures[name] = reason
        done += 1
        if progress is not None:
            progress(done, len(videos))
    if failures:
        raise PreparationError(failures, {n: f for n, f in files.items() if n not in failures})
    return files


def _file_of(folder: Path, name: str) -> Path:
    file = folder / f"{name}{_SUFFIX}"
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a trial name must stay inside the folder; got {name!r}.")
    return file


def _is_done(file: Path, fingerprint: str, overwrite: bool) -> bool:
    try:
        return is_prepared(file, fingerprint)
    except CacheError as error:
        if overwrite:
            return False
        raise CacheError(f"{error}; `overwrite=True` replaces it") from error


def _prepare_one(
    job: tuple[str, str, str, str],
    faces: FaceTracker | None = None,
    *,
    options: Mapping[str, Any],
    strict: bool,
) -> str | None:
    """Prepare and write one video; returns why not, or `None`."""
    video, target, name, fingerprint = job
    faces = faces or _worker_faces
    if faces is None:
        raise RuntimeError("a worker has no face tracker; this is a bug of mmau.")
    try:
        trial = _prepare(video, faces, options["crop_size"], strict, name, None, 1)
        save_trial(trial, target, fingerprint=fingerprint)
    except MediaError as error:
        return str(error)
    return None


_worker_faces: FaceTracker | None = None


def _start_worker(detector: str, select: str) -> None:
    """Make the models once per spawned process, which uses one core."""
    global _worker_faces  # an executor offers no other place
    require("cv2", purpose="aligning faces", extra="landmarks").setNumThreads(1)
    _worker_faces = _face_tracker(detector, select)


def _run(
    work: Callable[..., str | None],
    jobs_of: Mapping[str, tuple[str, str, str, str]],
    jobs: int,
    detector: str,
    select: str,
) -> Any:
    """Yield `(name, reason or None)` as videos are finished."""
    if not jobs_of:
        return
    if jobs == 1 or len(jobs_of) == 1:
        faces = _face_tracker(detector, select)
        try:
            for name, job in jobs_of.items():
                yield name, work(job, faces)
        finally:
            _close(faces)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(jobs_of)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(detector, select),
    )
    try:
        waiting: dict[Future[str | None], str] = {
            pool.submit(work, job): name for name, job in jobs_of.items()
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for lack of memory; finished files are kept, so the "
            "same call goes on from here. (A script that asks for several `jobs` must do so under "
            '`if __name__ == "__main__":`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
