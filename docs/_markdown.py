"""Markdown tables, as the computed parts of the pages write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["number", "plain", "table"]


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    Args:
        header: Words of the first line.
        rows: Cells; a bar in one is escaped, unless it is in code.

    Returns:
        Markdown.
    """

    def escaped(cell: object) -> str:
        # In code a bar does not end a cell, and a backslash would be shown.
        return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", str(cell))

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(escaped, cells)) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def plain(text: str) -> str:
    """Return a text whose marks do not mean anything in Markdown or HTML.

    Args:
        text: As an argument parser prints it.

    Returns:
        The text, escaped.
    """
    for mark in ("\\", "*", "_", "<", ">"):
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, "\\" + mark))
    return text


def number(value: object) -> str:
    """Return a measured value in three digits, anything else as it is.

    Args:
        value: What a result file holds.

    Returns:
        The word for a cell.
    """
    if not isinstance(value, float):
        return str(value)
    if 1000 <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.3g}"
