"""One line of JSON per step or epoch, which a resumed run continues without a gap or a repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmau._files import whole_file

__all__ = ["MetricsLog", "read_metrics"]


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
        with whole_file(self.path) as partial:
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
