"""Preparing one video into files, here or in processes of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmau._optional import require
from mmau.data._face_finding import FaceFinder, FaceOptions
from mmau.data._prepared_stream import chunks_by_person
from mmau.data._trial_target import TrialTarget
from mmau.data._trial_writer import DiskFullError, TrialWriter, open_trial
from mmau.media.audio import iterate_audio
from mmau.media.video import VideoReader
from mmau.progress import ProgressCallback

__all__ = ["PreparationJob", "prepare_file", "run_jobs"]

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
    """Prepare one video; each row is written as it comes, so memory does not grow.

    Args:
        path: Video file.
        finder: Finds the faces.
        target: Where the trials go; they take their names when all of them are complete.
        fingerprint: What they are made from.
        strict: Whether missing frames are an error.
        progress: Called as `progress(done, total)` after each frame.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.
        name: Name of the trial, if it is not that of the target.
    """
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
    """Prepare videos, in this process or in several.

    Args:
        todo: Name to job.
        options: What to look for.
        jobs: Processes.

    Yields:
        Name and why it failed, or `None`, as they are finished.
    """
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
