"""One progress bar, on stderr, for everything that takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mmau._optional import require

__all__ = ["ProgressCallback", "progress_bar"]

ProgressCallback = Callable[[int, int], None]
"""Called as `progress(done, total)` by long-running functions."""


class ProgressBar(Protocol):
    """What `progress_bar` yields: a `ProgressCallback` that also shows numbers by name."""

    def __call__(self, done: float, total: float, **numbers: float | None) -> None:
        """Move the bar; a number that is `None` is not shown."""


@contextmanager
def progress_bar(label: str, *, unit: str = "frames", quiet: bool = False) -> Iterator[ProgressBar]:
    """Show a bar with rate and remaining time, driven by a `progress(done, total)` callback.

    The first call starts the clock: what was done before it does not count for the rate.

    Args:
        label: What is being done.
        unit: What is counted.
        quiet: Show nothing.

    Yields:
        The callback; numbers given by name, such as `loss=0.31`, stand behind the bar.

    Raises:
        MissingDependencyError: If tqdm is not installed.

    Examples:
        >>> with progress_bar("train", unit="steps", quiet=True) as progress:
        ...     progress(1, 2, loss=0.31)
    """
    if quiet:
        yield lambda done, total, **numbers: None
        return
    tqdm = require("tqdm", purpose="a progress bar", extra="cli").tqdm
    # A log file gets a line every ten seconds, a terminal a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar: Any = None

    def progress(done: float, total: float, **numbers: float | None) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                desc=label,
                initial=done,
                unit=f" {unit}",
                delay=1.0,
                miniters=0,
                mininterval=interval,
                maxinterval=interval,
                ncols=100,
            )
        bar.total = total
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if value is not None}
        bar.set_postfix(shown, refresh=False)
        bar.n = round(done, 1)
        bar.update(0)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
