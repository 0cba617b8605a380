"""Many files, one after the other or in several processes; one that fails stops no other."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from mmau.cli._console import Share, UserError
from mmau.progress import ProgressCallback

__all__ = ["FAILURES_OF_A_FILE", "Outcome", "Work", "run_batch"]

J = TypeVar("J")
R = TypeVar("R")

# What a broken file, a full disk or a model that meets odd data raises. Anything else is a bug of
# ours: it stops the batch and shows its traceback.
FAILURES_OF_A_FILE = (OSError, ValueError, RuntimeError, ArithmeticError)

Work = Callable[[J, ProgressCallback | None], R]
"""Does one job."""

_REPORT_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Outcome(Generic[J, R]):
    """What became of one job."""

    job: J
    """The job."""
    result: R | None
    """What the work returned, or `None` if it failed."""
    reason: str | None
    """Why it failed, in a sentence."""


def run_batch(
    jobs: Sequence[J],
    start: Callable[..., Work[J, R]],
    options: Any,
    *,
    processes: int,
    progress: Share,
) -> Iterator[Outcome[J, R]]:
    """Do every job, and yield what became of it as it is finished.

    Args:
        jobs: What to do; picklable.
        start: Called with `options` once per process; returns the function that does a job.
        options: What `start` needs; picklable.
        processes: Number of processes, started by spawn; 1 works in this one.
        progress: Told how many jobs are done, with parts of those that are running.

    Yields:
        One outcome per job.
    """
    progress(0, len(jobs))
    if processes == 1 or len(jobs) == 1:
        work = start(options)
        for number, job in enumerate(jobs):

            def part(done: int, total: int, before: int = number) -> None:
                progress(before + done / max(total, 1), len(jobs))

            yield _outcome(job, lambda job=job, part=part: work(job, part))  # type: ignore[misc]
            progress(number + 1, len(jobs))
        return
    context = get_context("spawn")
    shares: Any = context.Queue()
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(start, options, shares),
    )
    waiting: dict[Future[R], J] = {
        pool.submit(_work_in_worker, number, job): job for number, job in enumerate(jobs)
    }
    parts = dict.fromkeys(range(len(jobs)), 0.0)
    try:
        while waiting:
            finished, _ = wait(waiting, timeout=_REPORT_EVERY, return_when=FIRST_COMPLETED)
            _drain(shares, parts)
            progress(sum(parts.values()), len(jobs))
            for future in finished:
                yield _outcome(waiting.pop(future), future.result)
    finally:
        pool.shutdown(cancel_futures=True)
        shares.close()
    progress(len(jobs), len(jobs))


def _drain(shares: Any, parts: dict[int, float]) -> None:
    while True:
        try:
            number, share = shares.get_nowait()
        except queue.Empty:
            return
        parts[number] = share


def _outcome(job: J, do: Callable[[], R]) -> Outcome[J, R]:
    try:
        return Outcome(job, do(), None)
    except BrokenProcessPool:
        return Outcome(job, None, "its process died, perhaps for lack of memory; try fewer --jobs")
    except FAILURES_OF_A_FILE as error:
        return Outcome(job, None, str(error) or type(error).__name__)


# ---------------------------------------------------------------------- in a worker
_work: Any = None
_shares: Any = None


def _start_worker(start: Callable[..., Any], options: Any, shares: Any) -> None:
    """Load the models once per process, which uses one core."""
    global _work, _shares  # an executor offers no other place
    import torch

    # Control-C ends a worker without a word; the main process is the one that speaks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    _shares = shares
    try:
        _work = start(options)
    except (*FAILURES_OF_A_FILE, ImportError, LookupError) as error:
        # An executor whose workers cannot start says nothing about why.
        _work = partial(_refuse, str(error))


def _refuse(reason: str, *_: Any) -> None:
    raise UserError(reason)


def _work_in_worker(number: int, job: Any) -> Any:
    said_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > _REPORT_EVERY:
            said_at = time.monotonic()
            _shares.put((number, done / max(total, 1)))

    try:
        return _work(job, progress)
    finally:
        _shares.put((number, 1.0))
