"""One line of JSON per step or epoch, which a resumed run continues without a gap or a repeat."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mmau._files import atomic_write
from mmau._optional import require


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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a log; a line that a kill cut off in the middle is left out.

    Args:
        path: The file; may be absent.

    Returns:
        Records in order.
    """
    path = Path(path)
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


class MetricsLog:
    """Append records to `metrics.jsonl`.

    Args:
        path: The file.
        step: Step to go on from: records of later steps, which will be taken again, are dropped.
        active: False writes nothing: for all processes but the first.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsLog(path) as log:
        ...     for step in (1, 2, 3):
        ...         log.write({"step": step, "loss": 1 / step})
        >>> with MetricsLog(path, step=2) as log:
        ...     log.write({"step": 3, "loss": 0.25})
        >>> [record["loss"] for record in read_metrics(path)]
        [1.0, 0.5, 0.25]
    """

    def __init__(self, path: str | Path, *, step: int = 0, active: bool = True) -> None:
        self.path = Path(path)
        self._stream = None
        if not active:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record and hand it to the system at once.

        Args:
            record: JSON values; must hold `step`, the steps taken so far.

        Raises:
            ValueError: If it holds no step.
        """
        if "step" not in record:
            raise ValueError(f"a record must hold 'step'; got {', '.join(record) or 'nothing'}.")
        if self._stream is not None:
            self._stream.write(_line(record))
            self._stream.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record)) + "\n"


@contextmanager
def tensorboard_writer(
    folder: str | Path, *, step: int = 0, active: bool = True
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Open an event file that goes on after a step; what an earlier process wrote later is hidden.

    Args:
        folder: Folder of the event files.
        step: Step to go on from.
        active: False needs no TensorBoard and writes nothing.

    Yields:
        A function of the step and of named numbers; values that are no numbers are left out, those
        of a nested mapping are named `outer/inner`.

    Raises:
        MissingDependencyError: If TensorBoard is not installed.

    Examples:
        >>> with tensorboard_writer("unused", active=False) as write:
        ...     write(1, {"loss": 0.5})
    """
    if not active:
        yield lambda step, numbers: None
        return
    require("tensorboard", purpose="`tensorboard`", extra="train")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(step: int, numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            if isinstance(value, Mapping):
                write(step, {f"{name}/{inner}": one for inner, one in value.items()})
            elif isinstance(value, (int, float)) and name not in ("step", "epoch"):
                writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()
