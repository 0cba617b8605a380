"""What the commands say: results on stdout, progress and notes on stderr, or JSON lines there."""

from __future__ import annotations

import glob
import json
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, NamedTuple, TextIO, TypeVar

from mmau.progress import ProgressCallback

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
    """Do every job, and yield what became of it as it is finished."""
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


VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


class FoundVideo(NamedTuple):
    """One video to work on."""

    path: Path
    """The file."""
    name: str
    """Its path without extension, relative to the folder that was given; what outputs are
    called."""


def is_single_file(sources: Sequence[str]) -> bool:
    """Tell whether the user named one file, rather than a folder, a pattern or several.

    Examples:
        >>> is_single_file(["a.mp4"]), is_single_file(["a.mp4", "b.mp4"]), is_single_file(["*.mp4"])
        (True, False, False)
    """
    (first, *more) = sources
    return not more and not Path(first).is_dir() and (Path(first).exists() or not _is_glob(first))


def find_videos(sources: Sequence[str]) -> list[FoundVideo]:
    """Find the videos; every one must get a name of its own."""
    found: dict[Path, str] = {}
    for source in sources:
        for path, name in _of_source(source):
            found.setdefault(path, name)
    owner: dict[str, Path] = {}
    for path, name in found.items():
        if name in owner:
            raise UserError(
                f"{owner[name]} and {path} share the name {name!r}, so one would overwrite what is "
                "written for the other; give their folders one by one."
            )
        owner[name] = path
    return [FoundVideo(path, name) for path, name in found.items()]


def _of_source(source: str) -> list[tuple[Path, str]]:
    path = Path(source)
    if path.is_dir():
        inside = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        if not inside:
            raise UserError(f"no video in the folder {path}; looked for {' '.join(VIDEO_SUFFIXES)}")
        return [(p, p.relative_to(path).with_suffix("").as_posix()) for p in inside]
    if path.exists() or not _is_glob(source):
        # A file that is not there is one failure among others in a batch, so it passes here.
        return [(path, path.stem)]
    matches = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
    if not matches:
        raise UserError(f"no file matches {source!r}.")
    return [(p, p.stem) for p in matches]


def _is_glob(source: str) -> bool:
    return any(letter in source for letter in "*?[")


SOME_FAILED = 3  # exit code

Share = Callable[[float, float], None]
"""Called as `progress(done, total)`; a `mmau.progress.ProgressCallback` that takes parts too."""

_QUIET_SECONDS = 1.0  # what is done sooner needs no bar
_BAR = 24


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


class Console:
    """Speak to a person, or with `json_lines` to a program.

    Examples:
        >>> console = Console(json_lines=True, err=sys.stdout)
        >>> console.note("no sound track", video="a.mp4")  # doctest: +ELLIPSIS
        {"time": ..., "event": "note", "message": "no sound track", "video": "a.mp4"}
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        json_lines: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.quiet = quiet
        self.json_lines = json_lines
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    def result(self, text: str) -> None:
        """Write what the command was asked for, such as a table."""
        self._out.write(text + "\n")
        self._out.flush()

    def summary(self, text: str, **fields: Any) -> None:
        """Say what was done; nothing if quiet."""
        if self.json_lines:
            self._event("done", text, fields)
        elif not self.quiet:
            self.result(text)

    def note(self, text: str, **fields: Any) -> None:
        """Say what the user should know about the result."""
        if self.json_lines:
            self._event("note", text, fields)
        else:
            self._line(f"note: {text}")

    def error(self, text: str, **fields: Any) -> None:
        """Say what went wrong."""
        if self.json_lines:
            self._event("error", text, fields)
        else:
            self._line(f"mmau: {text}")

    def failures(self, failed: Sequence[tuple[str, str]], total: int) -> int:
        """List the files of a batch that failed, last of all."""
        if not failed:
            return 0
        for file, reason in failed:
            text = reason if file in reason else f"{file}: {reason}"
            self.error(text, file=file)
        self.error(f"{len(failed)} of {total} files failed", failed=len(failed), total=total)
        return SOME_FAILED

    @contextmanager
    def progress(self, label: str, *, unit: str = "frames") -> Iterator[Share]:
        """Show a bar with rate and remaining time for what takes longer than a second."""
        if self.quiet and not self.json_lines:
            yield lambda done, total: None
            return
        bar = _Bar(self, label, unit)
        try:
            yield bar.update
        finally:
            bar.close()

    # ------------------------------------------------------------------ inside
    @property
    def is_terminal(self) -> bool:
        """Whether a line can be overwritten."""
        return not self.json_lines and self._err.isatty()

    def _event(self, event: str, message: str, fields: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 3), "event": event, "message": message, **fields}
        self._line(json.dumps(record))

    def _line(self, text: str) -> None:
        self._err.write(text + "\n")
        self._err.flush()

    def _overwrite(self, text: str) -> None:
        self._err.write(f"\r\x1b[K{text}")
        self._err.flush()


class _Bar:
    """One running task."""

    def __init__(self, console: Console, label: str, unit: str) -> None:
        self._console, self._label, self._unit = console, label, unit
        # A terminal gets a moving bar, a log file a line every ten seconds.
        self._interval = 0.1 if console.is_terminal else (1.0 if console.json_lines else 10.0)
        self._start = time.monotonic()
        self._shown_at = self._start + _QUIET_SECONDS - self._interval
        self._first_done: float | None = None
        self._on_screen = False

    def update(self, done: float, total: float) -> None:
        now = time.monotonic()
        if self._first_done is None or done <= self._first_done:
            # Neither what a cache had done already nor the loading of models says how fast it goes.
            self._first_done, self._start = done, now
        if now - self._shown_at < self._interval:
            return
        self._shown_at = now
        rate = (done - self._first_done) / max(now - self._start, 1e-9)
        remaining = (total - done) / rate if rate > 0 else (None if done < total else 0.0)
        self._show(done, total, rate, remaining)

    def _show(self, done: float, total: float, rate: float, remaining: float | None) -> None:
        if self._console.json_lines:
            seconds = None if remaining is None else round(remaining, 1)
            fields = {"done": round(done, 2), "total": total, "unit": self._unit}
            fields |= {"rate": round(rate, 3), "eta_seconds": seconds}
            self._console._event("progress", self._label, fields)
            return
        share = done / total if total else 1.0
        full = min(_BAR, int(share * _BAR))
        eta = "-:--" if remaining is None else clock(remaining)
        bar = "#" * full + "." * (_BAR - full)
        text = (
            f"{self._label} {share:4.0%} |{bar}| {_number(done)}/{total} {self._unit}, "
            f"{rate:.1f}/s, {eta} left"
        )
        if self._console.is_terminal:
            self._console._overwrite(text)
            self._on_screen = True
        else:
            self._console._line(text)

    def close(self) -> None:
        if self._on_screen:
            self._console._overwrite("")


def _number(done: float) -> str:
    return f"{done:.1f}" if isinstance(done, float) else str(done)


def clock(seconds: float) -> str:
    """Write a duration as `m:ss` or `h:mm:ss`.

    Examples:
        >>> clock(75.2), clock(3671)
        ('1:15', '1:01:11')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
