"""Many videos, prepared once each: what is done is recognised, what is broken is listed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mmau._checks import check_range
from mmau._optional import require
from mmau.data.prepared import (
    TRIAL_FORMAT,
    PreparedChunk,
    PreparedTrial,
    TrialTarget,
    TrialWriter,
    load_trial,
    open_trial,
    read_about,
)
from mmau.data.store import DiskFullError
from mmau.media.audio import iterate_audio, read_audio
from mmau.media.errors import MediaError, check_file
from mmau.media.faces import ALL_FACES, FaceFinder, FaceOptions, FaceRow
from mmau.media.video import VideoInfo, VideoReader
from mmau.progress import ProgressCallback


class _Rows:
    """Arrays of one person that are filled frame by frame."""

    def __init__(self, first_frame: int, length: int, size: int) -> None:
        self.first_frame = first_frame
        self.crops = np.zeros((length, size, size, 3), dtype=np.uint8)
        self.landmarks = np.full((length, 68, 2), np.nan, dtype=np.float32)
        self.confidence = np.zeros(length, dtype=np.float32)
        self.boxes = np.full((length, 4), np.nan, dtype=np.float32)
        self.face_ids = np.full(length, -1, dtype=np.int32)

    def put(self, index: int, row: FaceRow) -> None:
        self.crops[index] = row.crop
        self.landmarks[index] = row.landmarks
        self.confidence[index] = row.confidence
        self.boxes[index] = row.box
        self.face_ids[index] = row.face_id

    def chunk(self, times: list[float]) -> PreparedChunk:
        length = len(times)
        landmarks = self.landmarks[:length]
        return PreparedChunk(
            crops=self.crops[:length],
            landmarks=landmarks,
            valid=np.asarray(np.isfinite(landmarks).all(axis=(1, 2))),
            confidence=self.confidence[:length],
            timestamps=np.asarray(times, dtype=np.float64),
            boxes=self.boxes[:length],
            face_ids=self.face_ids[:length],
            first_frame=self.first_frame,
        )


def chunks_by_person(
    reader: VideoReader,
    finder: FaceFinder,
    frames_per_chunk: int,
    progress: ProgressCallback | None = None,
    seconds: dict[str, float] | None = None,
) -> Generator[dict[int, PreparedChunk], None, None]:
    """Read a video and yield the rows of every face that has been seen so far."""
    seconds = {} if seconds is None else seconds
    seconds.update({stage: seconds.get(stage, 0.0) for stage in ("decode", "faces")})
    announced = reader.info.num_frames_announced or 0
    size = finder.options.crop_size
    known = {0}  # also a video without a face has a row for every frame
    first = 0
    frames = iter(reader)
    ended = False
    while not ended:
        rows = {key: _Rows(first, frames_per_chunk, size) for key in known}
        times: list[float] = []
        while len(times) < frames_per_chunk:
            start = time.perf_counter()
            frame = next(frames, None)
            decoded = time.perf_counter()
            seconds["decode"] += decoded - start
            if frame is None:
                ended = True
                break
            for row in finder.find(frame):
                key = row.face_id if finder.keeps_all_faces else 0
                if key not in known:
                    known.add(key)
                    rows[key] = _Rows(first, frames_per_chunk, size)
                rows[key].put(len(times), row)
            seconds["faces"] += time.perf_counter() - decoded
            times.append(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(announced, frame.index + 1))
        if times:
            yield {key: part.chunk(times) for key, part in rows.items()}
        first += len(times)


class PreparedStream(Iterator[PreparedChunk]):
    """The chunks of one video, and what is known about it meanwhile.

    Made by `iterate_prepared`. It stops its models and closes the file after the last chunk, on
    `close()`, and at the end of a `with` block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        finder: FaceFinder,
        *,
        name: str,
        frames_per_chunk: int,
        strict: bool,
        progress: ProgressCallback | None,
        num_threads: int,
    ) -> None:
        self.seconds: dict[str, float] = {}
        """Wall time so far by stage: `"decode"` and `"faces"` (find, follow, align)."""
        self._stack = ExitStack()
        self._stack.callback(finder.close)
        self._finder = finder
        try:
            finder.start(name)
            self._reader = self._stack.enter_context(
                VideoReader(path, strict=strict, num_threads=num_threads)
            )
        except BaseException:
            self._stack.close()
            raise
        self._chunks = chunks_by_person(
            self._reader, finder, frames_per_chunk, progress, self.seconds
        )
        self._ended = False

    @property
    def info(self) -> VideoInfo:
        """What the container says."""
        return self._reader.info

    @property
    def num_frames(self) -> int:
        """Frames decoded so far."""
        return self._reader.num_frames

    @property
    def num_frames_expected(self) -> int | None:
        """Frames that the container announces to be shown, or `None` if it does not say."""
        return self._reader.num_frames_expected

    @property
    def shortfall(self) -> int:
        """Announced frames that did not come, known after the last chunk; 0 before."""
        return self._reader.shortfall

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the video, complete after the last chunk."""
        return (*self._reader.warnings, *(self._finder.warnings() if self._ended else ()))

    def __next__(self) -> PreparedChunk:
        try:
            return next(self._chunks)[0]
        except StopIteration:
            self._ended = True
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the models and close the file; there are no more chunks."""
        self._chunks.close()
        self._stack.close()

    def __enter__(self) -> PreparedStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_SAMPLE_RATE = 16000
_FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class PreparationJob:
    """One video of a batch."""

    video: str
    """The file."""
    target: TrialTarget
    """Where its trials go."""
    fingerprint: str
    """What they are made from."""
    strict: bool
    """Whether missing frames are an error."""


def prepare_file(
    path: str | Path,
    finder: FaceFinder,
    target: TrialTarget,
    *,
    fingerprint: str,
    strict: bool,
    progress: ProgressCallback | None = None,
    num_threads: int = 0,
    name: str | None = None,
) -> None:
    """Prepare one video; each row is written as it comes, so memory does not grow."""
    with ExitStack() as files:
        writers: dict[int, TrialWriter] = {}
        times: list[float] = []
        finder.start(name or target.name)
        with VideoReader(path, strict=strict, num_threads=num_threads) as reader:
            for people in chunks_by_person(reader, finder, _FRAMES_AT_ONCE, progress):
                for number, chunk in people.items():
                    if number not in writers:
                        writers[number] = files.enter_context(
                            open_trial(target.file(number), finder.options.crop_size)
                        )
                        writers[number].add_absence(times)
                    writers[number].add(chunk)
                times += chunk.timestamps.tolist()
        sound_start = None
        for segment in iterate_audio(path, sample_rate=_SAMPLE_RATE, margin_seconds=0):
            if sound_start is None:
                sound_start = segment.start_time
            for writer in writers.values():
                writer.add_sound(segment.waveform)
        for number, writer in writers.items():
            writer.finish(
                fingerprint=fingerprint,
                has_sound=sound_start is not None,
                about={
                    "name": name or target.trial(number),
                    "audio_start": sound_start or 0.0,
                    "num_frames_announced": reader.num_frames_expected,
                    "warnings": [*reader.warnings, *finder.warnings()],
                    "incomplete": reader.incomplete,
                },
            )
    target.finish(list(writers))


def _attempt(job: PreparationJob, finder: FaceFinder | None = None) -> str | None:
    """Prepare one video of a batch; returns why not, or `None`."""
    finder = finder or _worker_finder
    if finder is None:
        raise RuntimeError("a worker has no face finder; this is a bug of mmau.")
    try:
        prepare_file(
            job.video,
            finder,
            job.target,
            fingerprint=job.fingerprint,
            strict=job.strict,
            num_threads=1,
        )
    except DiskFullError:
        raise  # the next video would fare no better
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        # MediaError is a sentence of ours; what a library says needs its kind to be understood.
        own = type(error).__module__.startswith("mmau.")
        return str(error) if own else f"{type(error).__name__}: {error}"
    return None


_worker_finder: FaceFinder | None = None


def _start_worker(options: FaceOptions) -> None:
    """Make the models once per spawned process, which uses one core."""
    global _worker_finder  # an executor offers no other place
    require("cv2", purpose="aligning faces", extra="landmarks").setNumThreads(1)
    _worker_finder = FaceFinder(options)


def _is_ready() -> bool:
    return _worker_finder is not None


def _pool(options: FaceOptions, jobs: int) -> ProcessPoolExecutor:
    # Forking a process with live models hangs, so the start method is not left to the platform.
    return ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(options,)
    )


def run_jobs(
    todo: Mapping[str, PreparationJob], options: FaceOptions, jobs: int
) -> Iterator[tuple[str, str | None]]:
    """Prepare videos, in this process or in several."""
    if not todo:
        return
    if jobs == 1 or len(todo) == 1:
        finder = FaceFinder(options)
        try:
            for name, job in todo.items():
                yield name, _attempt(job, finder)
        finally:
            finder.close()
        return
    left = dict(todo)
    while left:
        try:
            for name, reason in _in_pool(left, options, min(jobs, len(left))):
                del left[name]
                yield name, reason
        except BrokenProcessPool:
            # One of those that were under way brought its process down: try these one by one.
            for name in list(left)[: 2 * jobs + 1]:
                yield name, _in_its_own_process(left.pop(name), options)


def _in_pool(
    todo: Mapping[str, PreparationJob], options: FaceOptions, jobs: int
) -> Iterator[tuple[str, str | None]]:
    pool = _pool(options, jobs)
    try:
        waiting: dict[Future[Any], str] = {
            pool.submit(_attempt, job): name for name, job in todo.items()
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_its_own_process(job: PreparationJob, options: FaceOptions) -> str | None:
    pool = _pool(options, 1)
    try:
        try:
            pool.submit(_is_ready).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "worker processes cannot start. (A script that asks for several `jobs` must do so "
                'under `if __name__ == "__main__":`.) Finished files are kept, so the same call '
                "goes on from here."
            ) from error
        return pool.submit(_attempt, job).result()
    except BrokenProcessPool:
        return (
            "the process that read it was killed, by a fault in a decoder or for lack of memory: "
            f"{job.video}"
        )
    finally:
        pool.shutdown(cancel_futures=True)


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
            TrialTarget(file.parent, file.stem, all_faces=False),
            fingerprint=source_fingerprint(path, name=name, **vars(options)),
            strict=strict,
            progress=progress,
            num_threads=num_threads,
            name=name,
        )
    finally:
        finder.close()
    return load_trial(file, memory_map=True, verify=False)


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
    """Describe everything that a prepared file depends on."""
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
    all_faces = options.face == ALL_FACES
    targets = {name: TrialTarget.of(Path(folder), name, all_faces=all_faces) for name in videos}
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
