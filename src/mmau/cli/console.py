"""What the commands say: results on stdout, progress and notes on stderr, or JSON lines there."""

from __future__ import annotations

import glob
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mmau._pool import ProcessDiedError, run_in_processes
from mmau.progress import ProgressBar, ProgressCallback, progress_bar

J = TypeVar("J")
R = TypeVar("R")

# What a broken file, a full disk or a model that meets odd data raises. Anything else is a bug of
# ours: it stops the batch and shows its traceback.
FAILURES_OF_A_FILE = (OSError, ValueError, RuntimeError, ArithmeticError)

Work = Callable[[J, ProgressCallback | None], R]
"""Does one job."""


# ---------------------------------------------------------------------- many files
@dataclass(frozen=True)
class Outcome(Generic[J, R]):
    """What became of one job."""

    job: J
    """The job."""
    result: R | None
    """What the work returned, or `None` if it failed."""
    reason: str | None
    """The error message if it failed."""


def run_batch(
    jobs: Sequence[J],
    start: Callable[..., Work[J, R]],
    options: Any,
    *,
    processes: int,
    progress: ProgressBar,
) -> Iterator[Outcome[J, R]]:
    """Do every job, and yield what became of it as it is finished."""
    done = [0.0] * len(jobs)

    def report(number: int, share: float) -> None:
        done[number] = share
        progress(sum(done), len(jobs))

    progress(0, len(jobs))
    if processes == 1 or len(jobs) == 1:
        work = start(options)
        for number, job in enumerate(jobs):

            def part(count: int, total: int, number: int = number) -> None:
                report(number, count / max(total, 1))

            yield _outcome(job, lambda job=job, part=part: work(job, part))  # type: ignore[misc]
            report(number, 1.0)
        return
    by_number = {str(number): job for number, job in enumerate(jobs)}
    finished = run_in_processes(
        by_number,
        _start_on_one_core,
        (start, options),
        processes,
        lambda name, share: report(int(name), share),
    )
    for name, future in finished:
        report(int(name), 1.0)
        yield _outcome(by_number[name], future.result)


def _start_on_one_core(start_and_options: tuple[Callable[..., Any], Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    start, options = start_and_options
    return start(options)


def _outcome(job: J, do: Callable[[], R]) -> Outcome[J, R]:
    try:
        return Outcome(job, do(), None)
    except ProcessDiedError as error:
        return Outcome(job, None, f"{error}; try fewer --jobs")
    except FAILURES_OF_A_FILE as error:
        return Outcome(job, None, str(error) or type(error).__name__)


# ---------------------------------------------------------------------- which videos
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


# ---------------------------------------------------------------------- what is said
SOME_FAILED = 3  # exit code
_SECONDS_BETWEEN_EVENTS = 1.0


class UserError(Exception):
    """Something the user can put right; printed as one line."""


@dataclass(frozen=True)
class Console:
    """Speak to a person, or with `json_lines` to a program."""

    quiet: bool = False
    json_lines: bool = False

    def result(self, text: str) -> None:
        """Write what the command was asked for, such as a table."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def summary(self, text: str, **fields: Any) -> None:
        """Say what was done; nothing if quiet."""
        if self.json_lines:
            self._event("done", text, fields)
        elif not self.quiet:
            self.result(text)

    def note(self, text: str, **fields: Any) -> None:
        """Say what the user should know about the result."""
        self._say("note", f"note: {text}", text, fields)

    def error(self, text: str, **fields: Any) -> None:
        """Say what went wrong."""
        self._say("error", f"mmau: {text}", text, fields)

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
    def progress(self, label: str, *, unit: str = "frames") -> Iterator[ProgressBar]:
        """Show a bar, or an event every second, for what takes longer than a second."""
        if self.json_lines:
            yield self._progress_events(label, unit)
        else:
            with progress_bar(label, unit=unit, quiet=self.quiet) as progress:
                yield progress

    # ------------------------------------------------------------------ inside
    def _progress_events(self, label: str, unit: str) -> ProgressBar:
        first: float | None = None
        started = shown = time.monotonic()

        def progress(done: float, total: float, **numbers: float | None) -> None:
            nonlocal first, started, shown
            now = time.monotonic()
            if first is None:  # neither loading nor what a cache held says how fast it goes
                first, started = done, now
            if now - shown < _SECONDS_BETWEEN_EVENTS:
                return
            shown = now
            rate = (done - first) / max(now - started, 1e-9)
            remaining = round((total - done) / rate, 1) if rate > 0 else None
            counts = {"done": round(done, 2), "total": total, "unit": unit}
            speed = {"rate": round(rate, 3), "eta_seconds": remaining}
            self._event("progress", label, {**counts, **speed, **numbers})

        return progress

    def _say(self, event: str, line: str, message: str, fields: dict[str, Any]) -> None:
        if self.json_lines:
            self._event(event, message, fields)
        else:
            self._write(line)

    def _event(self, event: str, message: str, fields: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 3), "event": event, "message": message, **fields}
        self._write(json.dumps(record))

    def _write(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
