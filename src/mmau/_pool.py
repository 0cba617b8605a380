"""Jobs in spawned processes that load their models once; a job that kills its process fails alone.

A job is a name and what is picklable; `start(options)` runs once per process and returns the work,
which is called as `work(job, progress)`. Forking a process with live models hangs, so the start
method is not left to the platform.
"""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from mmau._checks import check_range

J = TypeVar("J")
R = TypeVar("R")

Work = Callable[[J, Callable[[int, int], None]], R]
"""Does one job, and tells how far it is."""

_REPORT_EVERY = 0.5  # seconds


def share_longest_first(sizes: Mapping[str, float], num_ranks: int) -> list[list[str]]:
    """Assign jobs of known size to processes so that all finish at about the same time.

    The longest job goes first, each to the process that has least to do. The result depends on the
    arguments alone, so processes agree without talking.

    Args:
        sizes: Name to size (bytes of a video, number of frames), not negative.
        num_ranks: Number of processes.

    Returns:
        For each process its names, longest first; some may be empty.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> share_longest_first({"a": 5, "b": 3, "c": 3, "d": 1}, 2)
        [['a', 'd'], ['b', 'c']]
    """
    check_range("num_ranks", num_ranks, 1)
    for name, size in sizes.items():
        check_range(f"sizes[{name!r}]", size, 0)
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


class ProcessDiedError(RuntimeError):
    """The process of one job was killed, by a fault in a library or for lack of memory."""


def run_in_processes(
    jobs: Mapping[str, J],
    start: Callable[..., Work[J, R]],
    options: Any,
    processes: int,
    on_progress: Callable[[str, float], None] | None = None,
) -> Iterator[tuple[str, Future[R]]]:
    """Yield name and finished future of each job; `on_progress` is given name and share done."""
    waiting = dict(jobs)
    while waiting:
        try:
            for name, future in _in_pool(waiting, start, options, processes, on_progress):
                del waiting[name]
                yield name, future
        except BrokenProcessPool:
            # One of those that were under way brought its process down: try these one by one.
            for name in list(waiting)[: 2 * processes + 1]:
                yield name, _alone(name, waiting.pop(name), start, options)


def _in_pool(
    jobs: Mapping[str, J],
    start: Callable[..., Work[J, R]],
    options: Any,
    processes: int,
    on_progress: Callable[[str, float], None] | None,
) -> Iterator[tuple[str, Future[R]]]:
    context = get_context("spawn")
    shares: Any = None if on_progress is None else context.Queue()
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(start, options, shares),
    )
    try:
        names = {pool.submit(_work_on, name, job): name for name, job in jobs.items()}
        unfinished = set(names)
        while unfinished:
            finished, unfinished = wait(
                unfinished, timeout=_REPORT_EVERY, return_when=FIRST_COMPLETED
            )
            while on_progress is not None:
                try:
                    on_progress(*shares.get_nowait())
                except queue.Empty:
                    break
            for future in finished:
                if isinstance(future.exception(), BrokenProcessPool):
                    future.result()
                yield names[future], future
    finally:
        pool.shutdown(cancel_futures=True)
        if shares is not None:
            shares.close()


def _alone(name: str, job: J, start: Callable[..., Work[J, R]], options: Any) -> Future[R]:
    """Do one job in a process of its own, whose death is its own."""
    pool = ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(start, options, None),
    )
    try:
        try:
            pool.submit(_is_ready).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "worker processes cannot start. (A script that asks for several `jobs` must do so "
                'under `if __name__ == "__main__":`.) Finished files are kept, so the same call '
                "resumes from here."
            ) from error
        future = pool.submit(_work_on, name, job)
        if isinstance(future.exception(), BrokenProcessPool):
            future = Future()
            future.set_exception(
                ProcessDiedError(
                    "its process was killed, by a fault in a library or for lack of memory"
                )
            )
        return future
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------- in a worker
_work: Any = None
_shares: Any = None


def _start_worker(start: Callable[..., Any], options: Any, shares: Any) -> None:
    """Load the models once per process."""
    global _work, _shares  # an executor offers no other place
    # Control-C ends a worker without a word; the main process is the one that speaks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _shares = shares
    try:
        _work = start(options)
    except Exception as error:  # noqa: BLE001  an executor does not say why a worker cannot start
        _work = partial(_refuse, str(error) or type(error).__name__)


def _refuse(reason: str, *_: Any) -> None:
    raise RuntimeError(reason)


def _is_ready() -> bool:
    return _work is not None


def _work_on(name: str, job: Any) -> Any:
    reported_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal reported_at
        if _shares is not None and time.monotonic() - reported_at > _REPORT_EVERY:
            reported_at = time.monotonic()
            _shares.put((name, done / max(total, 1)))

    return _work(job, progress)
