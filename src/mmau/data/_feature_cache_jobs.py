"""Dealing out trials, and computing the features of those that are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmau._checks import check_range
from mmau.data._feature_cache_file import FeatureLayout, open_feature_file
from mmau.data._feature_cache_source import FeatureSource
from mmau.media.errors import MediaError

__all__ = ["FillJob", "run_fill_jobs", "shard_by_length"]


@dataclass(frozen=True)
class FillJob:
    """One file to write; crosses the border to a worker process."""

    source: FeatureSource
    file: Path
    fingerprint: str
    layout: FeatureLayout


Encode = Callable[[FeatureSource], Iterable[Mapping[str, Any]]]


def shard_by_length(lengths: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Deal out trials so that every rank gets about the same number of frames.

    The longest goes first, to the rank that has least; the same input gives the same shares on
    every machine.

    Args:
        lengths: Name to number of frames.
        world_size: Number of shares.

    Returns:
        Names of each share, longest first; every name once.

    Raises:
        ValueError: If `world_size` is below 1.

    Examples:
        >>> shard_by_length({"a": 1, "b": 5, "c": 3, "d": 3}, 2)
        [['b', 'a'], ['c', 'd']]
    """
    check_range("world_size", world_size, 1)
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name, length in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += length
    return shares


def run_fill_jobs(
    todo: Sequence[FillJob], encode: Encode, jobs: int
) -> Iterator[tuple[str, int, str | None]]:
    """Write the files.

    Args:
        todo: What to write, in this order.
        encode: Yields the rows of a source.
        jobs: Processes.

    Yields:
        Name, frames that were done since the last time, and why the trial failed if it did.

    Raises:
        RuntimeError: If a worker process was killed.
    """
    if jobs == 1 or len(todo) <= 1:
        for job in todo:
            done = 0
            try:
                for frames in _write(job, encode):
                    done += frames
                    yield job.source.name, frames, None
            except MediaError as error:
                # The rest of its frames, so that the sum is that of all trials.
                yield job.source.name, job.source.num_frames - done, str(error)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(todo)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(encode,),
    )
    try:
        waiting: dict[Future[str | None], FillJob] = {pool.submit(_work, job): job for job in todo}
        for future in as_completed(waiting):
            source = waiting[future].source
            yield source.name, source.num_frames, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for lack of memory; finished files are kept, so the "
            "same call goes on from here. (A script that asks for several `jobs` must do so under "
            '`if __name__ == "__main__":`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(job: FillJob, encode: Encode) -> Iterator[int]:
    """Write one file; yields the number of frames after each chunk."""
    size = job.source.num_frames
    with open_feature_file(job.file, job.layout, size, job.fingerprint) as writer:
        for rows in encode(job.source):
            before = writer.rows
            writer.add(rows)
            yield writer.rows - before


_encode: Encode | None = None


def _start_worker(encode: Encode) -> None:
    """Receive the encoder once per process, which uses one core."""
    global _encode  # an executor offers no other place
    torch.set_num_threads(1)
    _encode = encode


def _work(job: FillJob) -> str | None:
    if _encode is None:
        raise RuntimeError("a worker has no encoder; this is a bug of mmau.")
    try:
        for _ in _write(job, _encode):
            pass
    except MediaError as error:
        return str(error)
    return None
