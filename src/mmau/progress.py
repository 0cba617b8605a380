"""Progress on stderr for everything that takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmau._optional import require

__all__ = ["ProgressCallback", "progress_bar"]

ProgressCallback = Callable[[int, int], None]
"""Called as `progress(done, total)` by long-running functions."""


@contextmanager
def progress_bar(
    label: str, *, unit: str = "frames", quiet: bool = False
) -> Iterator[ProgressCallback]:
    """Show a bar with rate and remaining time, driven by a `progress(done, total)` callback.

    Args:
        label: What is being done.
        unit: What is counted.
        quiet: Show nothing.

    Yields:
        The callback.

    Raises:
        MissingDependencyError: If tqdm is not installed (any of the extras brings it).

    Examples:
        >>> with progress_bar("rendering", unit="clips", quiet=True) as progress:
        ...     progress(1, 2)
    """
    if quiet:
        yield lambda done, total: None
        return
    tqdm = require("tqdm", purpose="a progress bar", extra="recipes").tqdm
    # A log file gets a line every ten seconds, a terminal a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(desc=label, unit=f" {unit}", mininterval=interval, maxinterval=interval, ncols=88)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        bar.close()
