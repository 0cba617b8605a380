"""The command line of a benchmark; tables on the screen, and as JSON for the documentation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import stamp

from mmau._files import atomic_write

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ONE_PROCESS = "CPU time of one thread, the smallest of several runs taken in turns in one process."


def start(
    doc: str, memory_here: Callable[[Row], int] | None = None
) -> tuple[bool, Path | None, Row]:
    """Read the command line: whether to be quick, the folder of the results or `None`, the stamp.

    With `--memory-case`, which `peak_alone` passes on, only that case is measured and printed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns, no files")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory_case and memory_here:
        print(memory_here(json.loads(given.memory_case)))
        raise SystemExit
    where = stamp()
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()))
    return given.quick, given.output or (None if given.quick else RESULTS), where


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table; a row need not have every column."""

    def word(value: object) -> str:
        if isinstance(value, dict):
            return str(tuple(value.values()))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([word(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def write(
    folder: Path | None, name: str, title: str, note: str, where: Row, rows: list[Row]
) -> None:
    """Print one table, and write it for the documentation if there is a folder."""
    show(title, rows)
    if folder is None:
        return
    path = folder / f"{name}.json"
    contents = {"title": title, "note": note.strip(), "stamp": where, "rows": rows}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
