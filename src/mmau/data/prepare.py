"""Faces and sound of videos, found once: what is done is recognised, what is broken is listed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmau._checks import check_range
from mmau._optional import require
from mmau._pool import ProcessDiedError, run_in_processes
from mmau.data.prepared import (
    COLUMNS,
    TRIAL_FORMAT,
    PreparedChunk,
    PreparedTrial,
    TrialTarget,
    TrialWriter,
    load_trial,
    open_trial,
    read_about,
)
from mmau.data.store import DiskFullError, installed_versions, source_stamp
from mmau.media.audio import iterate_audio, read_audio
from mmau.media.errors import MediaError, check_file
from mmau.media.faces import FaceFinder, FaceOptions
from mmau.media.video import VideoFrame, VideoInfo, VideoReader
from mmau.progress import ProgressCallback

_SAMPLE_RATE = 16000
_FRAMES_AT_ONCE = 64


def find_face_chunks(
    frames: Iterable[VideoFrame],
    finder: FaceFinder,
    *,
    frames_per_chunk: int,
    total: int | None = None,
    progress: ProgressCallback | None = None,
    seconds: dict[str, float] | None = None,
) -> Generator[dict[int, PreparedChunk], None, None]:
    """Follow the faces of a video and yield the next rows of every face that has come so far.

    With one face its number is 0, and a video without a face has rows of number 0, too. `seconds`
    gets the wall time of `"decode"` and of `"detect"`, which is finding, following and aligning.
    """
    seconds = {} if seconds is None else seconds
    seconds.update({stage: seconds.get(stage, 0.0) for stage in ("decode", "detect")})
    source = iter(frames)
    known = {0}
    first = 0
    ended = False
    while not ended:
        times: list[float] = []
        blank = np.zeros(frames_per_chunk)
        chunks = {
            number: PreparedChunk.without_face(blank, finder.crop_size, first) for number in known
        }
        while len(times) < frames_per_chunk:
            start = time.perf_counter()
            frame = next(source, None)
            decoded = time.perf_counter()
            seconds["decode"] += decoded - start
            if frame is None:
                ended = True
                break
            for face in finder.find(frame):
                number = face.face_id if finder.options.all_faces else 0
                if number not in known:
                    known.add(number)
                    chunks[number] = PreparedChunk.without_face(blank, finder.crop_size, first)
                chunks[number].set_face(len(times), face)
            seconds["detect"] += time.perf_counter() - decoded
            times.append(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(total or 0, frame.index + 1))
        for chunk in chunks.values():
            chunk.timestamps[: len(times)] = times
        if times:
            yield {number: chunk.rows(0, len(times)) for number, chunk in chunks.items()}
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
    ) -> None:
        self.seconds: dict[str, float] = {}
        """Wall time so far by stage: `"decode"` and `"detect"` (find, follow, align)."""
        self._finder = finder
        self._ended = False
        with ExitStack() as stack:
            stack.callback(finder.close)
            finder.start(name)
            self._reader = stack.enter_context(VideoReader(path, strict=strict))
            self._stack = stack.pop_all()
        self._chunks = find_face_chunks(
            self._reader,
            finder,
            frames_per_chunk=frames_per_chunk,
            total=self._reader.info.num_frames_announced,
            progress=progress,
            seconds=self.seconds,
        )

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

    def __exit__(self, *error: object) -> None:
        self.close()


def iterate_prepared(
    path: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    faces: FaceOptions | None = None,
    frames_per_chunk: int = 256,
    strict: bool = False,
    name: str | None = None,
    progress: ProgressCallback | None = None,
) -> PreparedStream:
    """Decode a video, follow one face through it and align it, a chunk of frames at a time.

    Memory does not grow with the length of the file. The sound is read apart, by `iterate_audio`.

    Args:
        path: Video file.
        crop_size: Side of the crops, in pixels.
        faces: Which face is followed, and by what it is found; the largest, by MediaPipe, if left
            out.
        frames_per_chunk: Frames at a time; only the last chunk is shorter.
        strict: Raise if frames are missing, instead of noting it in `warnings`.
        name: Name of the trial, by which precomputed faces are looked up; the file's without its
            extension if left out.
        progress: Called as `progress(done, total)` after each frame; `total` is what the container
            announces, at least `done`.

    Returns:
        An iterator of chunks with one row per decoded frame, also of those without a face. Its
        `info`, `warnings`, `num_frames`, `shortfall` and `seconds` (per stage) tell the rest.

    Raises:
        MediaError: If the file is missing, a folder, empty, or not a video; while iterating, if cut
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
    return PreparedStream(
        path,
        FaceFinder((faces or FaceOptions()).check(one_face=True), crop_size),
        name=name or Path(path).stem,
        frames_per_chunk=frames_per_chunk,
        strict=strict,
        progress=progress,
    )


def prepare_video(
    path: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    faces: FaceOptions | None = None,
    strict: bool = False,
    name: str | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> PreparedTrial:
    """Decode a video, follow one face through it, align it, and read the sound.

    Args:
        path: Video file.
        crop_size: Side of the crops, in pixels.
        faces: As in `iterate_prepared`.
        strict: Raise if frames are missing, instead of noting it in `warnings`.
        name: Name of the trial; the file's without its extension if left out.
        file: Where to write the trial, `*.safetensors`, row by row; the result is then mapped from
            there, so that a video of any length can be prepared in little memory. Left out,
            everything is kept in memory: 0.54 GB per minute of 60 frames a second at 224 pixels.
        progress: As in `iterate_prepared`.

    Returns:
        One row per decoded frame, also of those without a face.

    Raises:
        MediaError: As `iterate_prepared`.
        UnknownComponentError: If there is no such detector or extractor.
        MissingDependencyError: If PyAV, OpenCV or MediaPipe is not installed.
        DiskFullError: If there is no room for `file`.
        ValueError: If an option is out of range.

    Examples:
        ```python
        trial = prepare_video("talk.mp4", faces=FaceOptions(face="left"))
        print(trial.num_frames, trial.valid.mean(), trial.warnings)
        ```
    """
    name = name or Path(path).stem
    if file is not None:
        target = Path(file)
        check_file(path)
        if target.suffix != ".safetensors":
            raise ValueError(f"`file` must end in .safetensors; got {str(target)!r}.")
        faces = (faces or FaceOptions()).check(one_face=True)
        with closing(FaceFinder(faces, crop_size)) as finder:
            prepare_file(
                path,
                finder,
                TrialTarget(target.parent, target.stem, all_faces=False),
                name=name,
                strict=strict,
                progress=progress,
            )
        return load_trial(target, memory_map=True, verify=False)
    with iterate_prepared(
        path, crop_size=crop_size, faces=faces, strict=strict, name=name, progress=progress
    ) as stream:
        chunks = list(stream)
    sound = read_audio(path, sample_rate=_SAMPLE_RATE)

    columns: dict[str, Any] = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in COLUMNS
    }
    return PreparedTrial(
        **columns,
        name=name,
        waveform=None if sound is None else sound.waveform,
        audio_start=0.0 if sound is None else sound.start_time,
        num_frames_announced=stream.num_frames_expected,
        warnings=stream.warnings,
    )


def prepare_file(
    path: str | os.PathLike[str],
    finder: FaceFinder,
    target: TrialTarget,
    *,
    name: str | None = None,
    strict: bool,
    progress: ProgressCallback | None = None,
    num_threads: int = 0,
) -> None:
    """Prepare one video; each row is written as it comes, so memory does not grow."""
    fingerprint = source_fingerprint(
        path, crop_size=finder.crop_size, faces=finder.options, name=name or target.name
    )
    with ExitStack() as files:
        writers: dict[int, TrialWriter] = {}
        times: list[float] = []
        finder.start(name or target.name)
        with VideoReader(path, strict=strict, num_threads=num_threads) as reader:
            for chunks in find_face_chunks(
                reader,
                finder,
                frames_per_chunk=_FRAMES_AT_ONCE,
                total=reader.info.num_frames_announced,
                progress=progress,
            ):
                for number, chunk in chunks.items():
                    if number not in writers:
                        writers[number] = files.enter_context(
                            open_trial(target.file(number), finder.crop_size)
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


def source_fingerprint(
    path: str | os.PathLike[str],
    *,
    crop_size: int,
    faces: FaceOptions | None = None,
    name: str | None = None,
) -> str:
    """Describe everything that a prepared file depends on."""
    return json.dumps(
        {
            "format": TRIAL_FORMAT,
            **source_stamp(path),
            "crop_size": crop_size,
            **(faces or FaceOptions()).record(name or Path(path).stem),
            **installed_versions("av", "mediapipe"),
        },
        sort_keys=True,
    )


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


def prepare_dataset(
    videos: Mapping[str, str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    crop_size: int = 224,
    faces: FaceOptions | None = None,
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
        faces: As in `iterate_prepared`, or with `face="all"`.
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
    faces = (faces or FaceOptions()).check()
    check_range("crop_size", crop_size, 8)
    targets = {
        name: TrialTarget.of(Path(folder), name, all_faces=faces.all_faces) for name in videos
    }
    todo: dict[str, PreparationJob] = {}
    failures: dict[str, str] = {}
    reused: list[str] = []
    for name, video in videos.items():
        try:
            fingerprint = source_fingerprint(video, crop_size=crop_size, faces=faces, name=name)
        except MediaError as error:
            failures[name] = str(error)
            continue
        if targets[name].is_done(fingerprint, overwrite=overwrite):
            reused.append(name)
        else:
            todo[name] = PreparationJob(str(video), targets[name], strict)
    done = len(videos) - len(todo)
    if progress is not None:
        progress(done, len(videos))
    for name, reason in run_jobs(todo, faces, crop_size, jobs):
        if reason is not None:
            failures[name] = reason
        done += 1
        if progress is not None:
            progress(done, len(videos))
    report = _report(targets, failures, reused, strict)
    if report.failures:
        raise PreparationError(report, len(videos))
    return report


@dataclass(frozen=True)
class PreparationJob:
    """One video of a batch."""

    video: str
    """The file."""
    target: TrialTarget
    """Where its trials go."""
    strict: bool
    """Whether missing frames are an error."""


def run_jobs(
    todo: Mapping[str, PreparationJob], faces: FaceOptions, crop_size: int, processes: int
) -> Iterator[tuple[str, str | None]]:
    """Prepare videos, in this process or in several; yields name and why not, or `None`."""
    if not todo:
        return
    if processes > 1 and len(todo) > 1:
        FaceFinder(faces, crop_size).close()  # absent weights are said once, not by every worker
        for name, future in run_in_processes(todo, _start_worker, (faces, crop_size), processes):
            try:
                reason = future.result()
            except ProcessDiedError:
                reason = (
                    "the process that read it was killed, by a fault in a decoder or for lack of "
                    f"memory: {todo[name].video}"
                )
            yield name, reason
        return
    with closing(FaceFinder(faces, crop_size)) as finder:
        for name, job in todo.items():
            yield name, _attempt(job, finder)


def _start_worker(
    options: tuple[FaceOptions, int],
) -> Callable[[PreparationJob, ProgressCallback], str | None]:
    """Make the models once per process, which uses one core."""
    require("cv2", purpose="aligning faces", extra="landmarks").setNumThreads(1)
    finder = FaceFinder(*options)
    return lambda job, progress: _attempt(job, finder)


def _attempt(job: PreparationJob, finder: FaceFinder) -> str | None:
    """Prepare one video of a batch; returns why not, or `None`."""
    try:
        prepare_file(job.video, finder, job.target, strict=job.strict, num_threads=1)
    except DiskFullError:
        raise  # the next video would fare no better
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        # MediaError is a message of mmau; what a library says needs its kind to be understood.
        own = type(error).__module__.startswith("mmau.")
        return str(error) if own else f"{type(error).__name__}: {error}"
    return None


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
