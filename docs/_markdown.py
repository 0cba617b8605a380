"""Markdown that the computed parts of the pages are made of: tables, and cards of examples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""

    def escaped(cell: object) -> str:
        # In code a bar does not end a cell, and a backslash would be shown.
        return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", str(cell))

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(escaped, cells)) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def plain(text: str) -> str:
    """Return a text whose marks do not mean anything in Markdown or HTML."""
    for mark in ("\\", "*", "_", "<", ">"):
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, "\\" + mark))
    return text


def number(value: object) -> str:
    """Return a measured value in three digits, anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    if 1000 <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.3g}"


def card(example: dict[str, Any], prefix: str = "") -> str:
    """Return one example as a linked thumbnail."""
    title = escape(example["title"])
    # A tooltip is plain text: code marks in it would end the attribute for Markdown.
    question = escape(example["intro"].replace("`", ""))
    # A Markdown link, because MkDocs neither rewrites nor checks the address of a raw `<a>`.
    picture = f"![]({prefix}{example['thumb']}){{ loading=lazy }}"
    address = f"{prefix}{example['stem']}.md"
    return f'[{picture}<span>{title}</span>]({address}){{ .gl-card title="{question}" }}'


def grid(examples: list[dict[str, Any]], prefix: str = "", *, caption: str | None = None) -> str:
    """Return several examples side by side."""
    small = f"\n<p>{caption}</p>\n" if caption else ""
    cards = "\n".join(card(example, prefix) for example in examples)
    kind = "gl-grid gl-mini" if caption else "gl-grid"
    return f'<div class="{kind}" markdown>{small}\n\n{cards}\n\n</div>'
