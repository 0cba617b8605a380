"""From video files to aligned faces, landmarks and sound: computed once, kept in one file each.

A prepared trial has one row per decoded frame, whether or not a face was found: `valid` tells.
Files are written under a temporary name, row by row, and renamed, and carry a fingerprint of their
source and options, so that an interrupted `prepare_dataset` goes on where it stopped and never
serves stale rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmau._checks import check_range
from mmau.data._face_finding import FaceFinder, FaceOptions
from mmau.data._preparation_workers import prepare_file
from mmau.data._prepared_stream import PreparedChunk, PreparedStream
from mmau.data._trial_target import TrialTarget
from mmau.data.dataset_preparation import (
    PreparationError,
    PreparationReport,
    prepare_dataset,
    source_fingerprint,
)
from mmau.data.prepared_trial import (
    CacheError,
    DiskFullError,
    PreparedTrial,
    load_trial,
    save_trial,
)
from mmau.media.audio import read_audio
from mmau.media.errors import check_file
from mmau.progress import ProgressCallback

__all__ = [
    "CacheError",
    "DiskFullError",
    "PreparationError",
    "PreparationReport",
    "PreparedChunk",
    "PreparedStream",
    "PreparedTrial",
    "iterate_prepared",
    "load_trial",
    "prepare_dataset",
    "prepare_video",
    "save_trial",
    "source_fingerprint",
]

_SAMPLE_RATE = 16000


def iterate_prepared(
    path: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    detector: str = "mediapipe",
    landmarks: str = "mediapipe",
    face: str | int = "largest",
    detector_options: Mapping[str, Any] | None = None,
    landmark_options: Mapping[str, Any] | None = None,
    frames_per_chunk: int = 256,
    strict: bool = False,
    name: str | None = None,
    progress: ProgressCallback | None = None,
    num_threads: int = 0,
) -> PreparedStream:
    """Decode a video, follow one face through it and align it, a chunk of frames at a time.

    Memory does not grow with the length of the file. The sound is read apart, by `iterate_audio`.

    Args:
        path: Video file.
        crop_size: Side of the crops, in pixels.
        detector: Name in `FACE_DETECTORS`.
        landmarks: Name in `LANDMARK_EXTRACTORS`.
        face: Which of several faces to follow: `"largest"`, `"left"` or `"right"` when one has to
            be chosen, or the number that `PeopleTracker` gives to a person.
        detector_options: Options of the detector, such as `{"path": "boxes.csv"}`.
        landmark_options: Options of the landmark extractor.
        frames_per_chunk: Frames at a time; only the last chunk is shorter.
        strict: Raise if frames are missing, instead of noting it in `warnings`.
        name: Name of the trial, by which precomputed faces are looked up; the file's without its
            extension if left out.
        progress: Called as `progress(done, total)` after each frame; `total` is what the container
            announces, at least `done`.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.

    Returns:
        An iterator of chunks with one row per decoded frame, also of those without a face. Its
        `info`, `warnings`, `num_frames`, `shortfall` and `seconds` (per stage) tell the rest.

    Raises:
        MediaError: If the file is missing, a folder, empty, or no video; while iterating, if cut
            and `strict`.
        UnknownComponentError: If there is no such detector or extractor.
        MissingDependencyError: If PyAV, OpenCV or MediaPipe is not installed.
        ValueError: If an option is out of range.

    Examples:
        ```python
        with iterate_prepared("talk.mp4") as chunks:
            for chunk in chunks:
                print(chunk.first_frame, chunk.valid.mean(), chunk.timestamps[0])
        print(chunks.warnings, chunks.seconds)
        ```
    """
    check_range("frames_per_chunk", frames_per_chunk, 1)
    check_file(path)  # before any model is loaded
    options = FaceOptions(
        crop_size=crop_size,
        detector=detector,
        landmarks=landmarks,
        face=face,
        detector_options=detector_options or {},
        landmark_options=landmark_options or {},
    ).check(several=False)
    return PreparedStream(
        path,
        FaceFinder(options),
        name=name or Path(path).stem,
        frames_per_chunk=frames_per_chunk,
        strict=strict,
        progress=progress,
        num_threads=num_threads,
    )


def prepare_video(
    path: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    detector: str = "mediapipe",
    landmarks: str = "mediapipe",
    face: str | int = "largest",
    detector_options: Mapping[str, Any] | None = None,
    landmark_options: Mapping[str, Any] | None = None,
    strict: bool = False,
    name: str | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
    num_threads: int = 0,
) -> PreparedTrial:
    """Decode a video, follow one face through it, align it, and read the sound.

    Args:
        path: Video file.
        crop_size: Side of the crops, in pixels.
        detector: Name in `FACE_DETECTORS`.
        landmarks: Name in `LANDMARK_EXTRACTORS`.
        face: Which of several faces to follow: `"largest"`, `"left"` or `"right"` when one has to
            be chosen, or the number that `PeopleTracker` gives to a person.
        detector_options: Options of the detector, such as `{"path": "boxes.csv"}`.
        landmark_options: Options of the landmark extractor.
        strict: Raise if frames are missing, instead of noting it in `warnings`.
        name: Name of the trial; the file's without its extension if left out.
        file: Where to write the trial, `*.safetensors`, row by row; the result is then mapped from
            there, so that a video of any length can be prepared in little memory. Left out,
            everything is kept in memory: 0.54 GB per minute of 60 frames a second at 224 pixels.
        progress: Called as `progress(done, total)` after each frame; `total` is what the container
            announces, at least `done`.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.

    Returns:
        One row per decoded frame, also of those without a face.

    Raises:
        MediaError: If the file is missing, a folder, empty, or no video; if cut and `strict`.
        UnknownComponentError: If there is no such detector or extractor.
        MissingDependencyError: If PyAV, OpenCV or MediaPipe is not installed.
        DiskFullError: If there is no room for `file`.
        ValueError: If an option is out of range.

    Examples:
        ```python
        trial = prepare_video("talk.mp4")
        print(trial.num_frames, trial.valid.mean(), trial.warnings)
        ```
    """
    choices: dict[str, Any] = {
        "crop_size": crop_size,
        "detector": detector,
        "landmarks": landmarks,
        "face": face,
        "detector_options": detector_options or {},
        "landmark_options": landmark_options or {},
    }
    name = name or Path(path).stem
    if file is not None:
        return _prepare_into(
            path, Path(file), FaceOptions(**choices), name, strict, progress, num_threads
        )
    with iterate_prepared(
        path,
        **choices,
        strict=strict,
        name=name,
        progress=progress,
        num_threads=num_threads,
    ) as stream:
        chunks = list(stream)
    sound = read_audio(path, sample_rate=_SAMPLE_RATE)

    def joined(column: str) -> Any:
        return np.concatenate([getattr(chunk, column) for chunk in chunks])

    return PreparedTrial(
        name=name,
        crops=joined("crops"),
        landmarks=joined("landmarks"),
        valid=joined("valid"),
        confidence=joined("confidence"),
        timestamps=joined("timestamps"),
        waveform=None if sound is None else sound.waveform,
        audio_start=0.0 if sound is None else sound.start_time,
        num_frames_announced=stream.num_frames_expected,
        warnings=stream.warnings,
        boxes=joined("boxes"),
        face_ids=joined("face_ids"),
    )


def _prepare_into(
    path: str | os.PathLike[str],
    file: Path,
    options: FaceOptions,
    name: str,
    strict: bool,
    progress: ProgressCallback | None,
    num_threads: int,
) -> PreparedTrial:
    check_file(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"`file` must end in .safetensors; got {str(file)!r}.")
    finder = FaceFinder(options.check(several=False))
    try:
        prepare_file(
            Path(path),
            finder,
            TrialTarget(file.parent, file.stem, everybody=False),
            fingerprint=source_fingerprint(path, name=name, **vars(options)),
            strict=strict,
            progress=progress,
            num_threads=num_threads,
            name=name,
        )
    finally:
        finder.close()
    return load_trial(file, memory_map=True, verify=False)
