"""Tables on the screen, and as JSON for the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmau._files import atomic_write

__all__ = ["RESULTS", "Row", "show", "write"]

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table."""

    def word(value: object) -> str:
        if isinstance(value, dict):
            return str(tuple(value.values()))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), *([word(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def write(path: Path, title: str, note: str, where: Row, rows: list[Row]) -> None:
    """Write one table of the documentation."""
    contents = {"title": title, "note": note.strip(), "stamp": where, "rows": rows}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
