"""Tables of the documentation that are computed when the site is built."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from mmau.action_units import AU_DESCRIPTIONS
from mmau.cli import all_registries

__all__ = [
    "action_units_table",
    "api_directives",
    "benchmark_tables",
    "registry_tables",
]

PURPOSES = {
    "mmau.face_detectors": "From a frame to the faces in it.",
    "mmau.landmark_schemes": "Which points there are, and the regions that they form.",
    "mmau.visual_encoders": "From the face in each frame to patch tokens.",
    "mmau.audio_encoders": "From a waveform to features with their times.",
    "mmau.temporal_models": "From one vector per frame to one vector per frame.",
    "mmau.scan_backends": "Ways to compute the same selective scan.",
    "mmau.losses": "From logits and labels to a number.",
}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [_row(*header), _row(*("---" for _ in header)), *(_row(*row) for row in rows)]
    return "\n".join(lines)


def registry_tables(level: int = 2) -> str:
    """Return one table per registry: name, what it is, what it needs, the entry-point group.

    Args:
        level: Level of the headings.

    Returns:
        Markdown.
    """
    parts = []
    for registry in all_registries():
        rows: list[tuple[object, ...]] = [
            (
                f"`{info.name}`",
                info.summary,
                f'`pip install "mmau[{info.extra}]"`' if info.extra else "nothing more",
            )
            for info in registry.describe()
        ]
        heading = registry.kind.capitalize() + ("es" if registry.kind.endswith("s") else "s")
        parts += [
            f"{'#' * level} {heading}",
            f"{PURPOSES[registry.group]} Entry-point group `{registry.group}`.",
            _table(("Name", "What it is", "Needs"), rows),
        ]
    return "\n\n".join(parts)


def action_units_table() -> str:
    """Return the twelve Action Units in label order.

    Returns:
        A Markdown table.
    """
    rows: list[tuple[object, ...]] = [
        (column, f"`{name}`", description)
        for column, (name, description) in enumerate(AU_DESCRIPTIONS.items())
    ]
    return _table(("Column", "Name", "FACS description"), rows)


def api_directives(module: str) -> str:
    """Return one mkdocstrings directive for every public name of a module.

    Args:
        module: Import path; its `__all__` is the list.

    Returns:
        Markdown.

    Raises:
        ValueError: If the module has no `__all__`, or an empty one.
    """
    names = getattr(importlib.import_module(module), "__all__", ())
    if not names:
        raise ValueError(f"`{module}.__all__` lists no public name.")
    return "\n\n".join(f"::: {module}.{name}" for name in names if not name.startswith("__"))


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """Give every number a column of its own, and every size one cell."""
    flat: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, dict) and all(isinstance(part, int) for part in value.values()):
            flat[key] = ", ".join(f"{name} {part}" for name, part in value.items())
        elif isinstance(value, dict):
            flat |= {f"{name}, {key}": _number(part) for name, part in value.items()}
        else:
            flat[key] = _number(value)
    return flat


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def benchmark_tables(folder: Path) -> str:
    """Return the recorded benchmark results.

    Args:
        folder: Where the JSON files are. Each has `stamp`, an object that says where and on what it
            was measured, and `rows`, a list of objects with the same keys; `title` and `note` may
            be there.

    Returns:
        Markdown; a sentence if nothing has been recorded.

    Raises:
        ValueError: If a file has no stamp or no rows.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result.get("stamp") or not result.get("rows"):
            raise ValueError(f"{path.name}: a benchmark result needs `stamp` and `rows`.")
        rows = [_flat(row) for row in result["rows"]]
        stamp = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in result["stamp"].items()
        )
        parts += [
            f"### {result.get('title', path.stem.replace('_', ' ').capitalize())}",
            _table(tuple(rows[0]), [tuple(row[key] for key in rows[0]) for row in rows]),
            f"Measured on: {stamp}.",
            result.get("note", ""),
        ]
    if not parts:
        return "No result has been recorded for this version."
    return "\n\n".join(part for part in parts if part)
