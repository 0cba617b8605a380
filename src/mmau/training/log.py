"""One line of JSON per step, which a resumed run continues without a gap or a repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmau._files import atomic_write
from mmau._optional import require


class MetricsLog:
    """Append records to `metrics.jsonl`, and to TensorBoard if asked for.

    Args:
        path: The file.
        step: Step to resume from: records of later steps, which will be taken again, are dropped.
        active: False writes nothing: for all processes but the first.
        tensorboard: Whether the numbers also go into an event file in the same folder.

    Raises:
        MissingDependencyError: If TensorBoard is asked for and not installed.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsLog(path) as log:
        ...     for step in (1, 2, 3):
        ...         log.write({"step": step, "loss": 1 / step})
        >>> with MetricsLog(path, step=2) as log:
        ...     log.write({"step": 3, "loss": 0.25})
        >>> [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        [1.0, 0.5, 0.25]
    """

    def __init__(
        self,
        path: str | Path,
        *,
        step: int = 0,
        active: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(path)
        self._open = ExitStack()
        self._stream = self._events = None
        if not active:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._stream = self._open.enter_context(self.path.open("a", encoding="utf-8"))
        if tensorboard:
            require("tensorboard", purpose="`tensorboard`", extra="train")
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.path.parent)
            self._events = self._open.enter_context(SummaryWriter(folder, purge_step=step + 1))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record and hand it to the system at once.

        Args:
            record: JSON values; must hold `step`, the steps taken so far. TensorBoard gets the
                numbers, those of a nested mapping under `outer/inner`.

        Raises:
            ValueError: If it holds no step.
        """
        if "step" not in record:
            raise ValueError(f"a record must hold 'step'; got {', '.join(record) or 'nothing'}.")
        if self._stream is not None:
            self._stream.write(_line(record))
            self._stream.flush()
        if self._events is not None:
            for name, value in _numbers(record):
                if name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; a line that a kill cut off in the middle is left out."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record)) + "\n"


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Name every number of a nested record."""
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + name, value))
    return found
