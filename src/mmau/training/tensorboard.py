"""TensorBoard as an option: the same numbers as in `metrics.jsonl`, to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmau._optional import require

__all__ = ["tensorboard_writer"]


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
