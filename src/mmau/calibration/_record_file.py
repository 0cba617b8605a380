"""The JSON file of a calibration: what is in it, and refusing everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmau._checks import did_you_mean
from mmau._files import whole_file

__all__ = ["read_record", "write_record"]

FAMILY = "mmau.calibration/"
FORMAT = FAMILY + "2"
KEYS_OF_FORMAT = {
    FAMILY + "1": ("au_names", "thresholds", "smoothing", "note"),
    FORMAT: (
        "au_names",
        "thresholds",
        "smoothing",
        "note",
        "smoothing_kind",
        "smoothing_unit",
        "max_gap",
        "probability",
        "posterior_options",
    ),
}
"""Every format that can be read. What an older one lacks has the meaning of the default."""


def _is_number(value: object) -> bool:
    # bool is an int to Python, but `true` is not a threshold.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(_is_number(item) for item in value)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, bool) or _is_number(v) or _are_numbers(v) for v in value.values()
    )


KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "au_names": ("a list of names", _are_names),
    "thresholds": ("a list of numbers", _are_numbers),
    "smoothing": ("a list of numbers", _are_numbers),
    "note": ("text", lambda value: isinstance(value, str)),
    "smoothing_kind": ("text", lambda value: isinstance(value, str)),
    "smoothing_unit": ("text", lambda value: isinstance(value, str)),
    "max_gap": ("a number", _is_number),
    "probability": ("text", lambda value: isinstance(value, str)),
    "posterior_options": ("names with numbers", _are_options),
}


def write_record(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write as JSON; the file is complete or absent.

    Args:
        path: File to write; an older one is replaced.
        content: A value for each key of the newest format.
    """
    text = json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read and check a file of any format that was ever written.

    Args:
        path: File to read.

    Returns:
        Its keys and values without the format, of the right types.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a calibration, has an unknown or missing key, or a wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such calibration file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    written = content.pop("format", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not str(written).startswith(FAMILY):
        raise ValueError(f'{path} is not a calibration: it has no "format": "{FORMAT}".')
    if written not in KEYS_OF_FORMAT:
        raise ValueError(
            f"{path} has the format {written!r}; this version of mmau reads "
            f"{' and '.join(KEYS_OF_FORMAT)}. Upgrade mmau to read a newer file."
        )
    keys = KEYS_OF_FORMAT[written]
    for key in content:
        if key not in keys:
            raise ValueError(f"{path} has an unknown key {key!r}{did_you_mean(key, keys)}")
    for key in keys:
        if key not in content:
            raise ValueError(f"{path} lacks the key {key!r}.")
        expected, fits = KINDS[key]
        if not fits(content[key]):
            raise ValueError(f"{path}: {key!r} must be {expected}; got {content[key]!r}.")
    return content
