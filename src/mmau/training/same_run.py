"""Whether a folder holds the run that a command asks for, before anything in it is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["differing_settings"]


def differing_settings(
    record: str | Path, settings: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> list[str]:
    """Compare the settings that a run was started with to those of now.

    Args:
        record: JSON file that the run left; absent means a new run.
        settings: Nested settings of now; JSON values, paths as text.
        ignore: Dotted names that may differ, such as `"data.jobs"`, with all that lies below.

    Returns:
        One phrase per difference, such as `"optim.lr: 0.001 there, 0.002 here"`; empty if none.

    Raises:
        ValueError: If the file is not a JSON object.

    Examples:
        >>> import tempfile
        >>> record = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = record.write_text('{"optim": {"lr": 0.001}, "out": "a"}')
        >>> differing_settings(record, {"optim": {"lr": 0.002}, "out": "b"}, ignore=["out"])
        ['optim.lr: 0.001 there, 0.002 here']
    """
    record = Path(record)
    if not record.is_file():
        return []
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is not valid JSON: {error}.") from error
    if not isinstance(there, dict):
        raise ValueError(f"{record} does not hold the settings of a run.")
    # Through JSON and back, so that a tuple here equals the list there.
    before, now = _flat(there), _flat(json.loads(json.dumps(settings, default=str)))
    skipped = tuple(ignore)
    return [
        f"{name}: {_shown(before, name)} there, {_shown(now, name)} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
        and not any(name == one or name.startswith(f"{one}.") for one in skipped)
    ]


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "nothing"
