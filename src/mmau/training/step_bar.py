"""A progress bar over the steps of a run, with loss, score and remaining time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mmau._optional import require

__all__ = ["StepBar", "step_bar"]


class StepBar(Protocol):
    """What `step_bar` yields."""

    def __call__(self, step: int, **numbers: float | None) -> None:
        """Move to a step and show numbers by name; a number that is `None` is not shown."""


@contextmanager
def step_bar(
    label: str, total: int, *, first: int = 0, unit: str = "steps", quiet: bool = False
) -> Iterator[StepBar]:
    """Show how far training is; the remaining time counts the steps of this process only.

    Args:
        label: What is being trained.
        total: Steps of the whole run.
        first: Steps that an earlier process took.
        unit: What is counted.
        quiet: Show nothing.

    Yields:
        A function to call after each step, such as `bar(12, loss=0.31, f1=0.4)`.

    Raises:
        MissingDependencyError: If tqdm is not installed.

    Examples:
        >>> with step_bar("train", 2, quiet=True) as bar:
        ...     bar(1, loss=0.5)
    """
    if quiet:
        yield lambda step, **numbers: None
        return
    tqdm = require("tqdm", purpose="a progress bar", extra="recipes").tqdm
    # A log file gets a line every ten seconds, a terminal a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        desc=label,
        total=total,
        initial=first,
        unit=f" {unit}",
        mininterval=interval,
        maxinterval=interval,
        ncols=100,
    )

    def show(step: int, **numbers: float | None) -> None:
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if value is not None}
        bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    try:
        yield show
    finally:
        bar.close()
