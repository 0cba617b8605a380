"""What the commands say: results on stdout, progress and notes on stderr, or JSON lines there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["SOME_FAILED", "Console", "Share", "UserError"]

SOME_FAILED = 3  # exit code

Share = Callable[[float, float], None]
"""Called as `progress(done, total)`; a `mmau.progress.ProgressCallback` that takes parts too."""

_QUIET_SECONDS = 1.0  # what is done sooner needs no bar
_BAR = 24


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


class Console:
    """Speak to a person, or with `json_lines` to a program.

    Args:
        quiet: Say nothing but notes and errors.
        json_lines: Write one JSON object per line to stderr instead of sentences and bars.
        out: Where results go; stdout if left out.
        err: Where everything else goes; stderr if left out.

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
        """Write what the command was asked for, such as a table.

        Args:
            text: Lines.
        """
        self._out.write(text + "\n")
        self._out.flush()

    def summary(self, text: str, **fields: Any) -> None:
        """Say what was done; nothing if quiet.

        Args:
            text: One sentence or table.
            **fields: The same as data, for JSON lines.
        """
        if self.json_lines:
            self._event("done", text, fields)
        elif not self.quiet:
            self.result(text)

    def note(self, text: str, **fields: Any) -> None:
        """Say what the user should know about the result.

        Args:
            text: One sentence.
            **fields: The same as data, for JSON lines.
        """
        if self.json_lines:
            self._event("note", text, fields)
        else:
            self._line(f"note: {text}")

    def error(self, text: str, **fields: Any) -> None:
        """Say what went wrong.

        Args:
            text: One sentence.
            **fields: The same as data, for JSON lines.
        """
        if self.json_lines:
            self._event("error", text, fields)
        else:
            self._line(f"mmau: {text}")

    def failures(self, failed: Sequence[tuple[str, str]], total: int) -> int:
        """List the files of a batch that failed, last of all.

        Args:
            failed: File and reason.
            total: Files of the batch.

        Returns:
            The exit code: 0 if nothing failed, else 3.
        """
        if not failed:
            return 0
        for file, reason in failed:
            text = reason if file in reason else f"{file}: {reason}"
            self.error(text, file=file)
        self.error(f"{len(failed)} of {total} files failed", failed=len(failed), total=total)
        return SOME_FAILED

    @contextmanager
    def progress(self, label: str, *, unit: str = "frames") -> Iterator[Share]:
        """Show a bar with rate and remaining time for what takes longer than a second.

        Args:
            label: What is being done.
            unit: What is counted.

        Yields:
            A callback, called as `progress(done, total)`, also with fractions.
        """
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

    Args:
        seconds: Duration.

    Returns:
        Text.

    Examples:
        >>> clock(75.2), clock(3671)
        ('1:15', '1:01:11')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
