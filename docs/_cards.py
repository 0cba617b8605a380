"""The clickable picture of one example, used by the gallery's index and under the API."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["card", "grid"]


def card(example: dict[str, Any], prefix: str = "") -> str:
    """Return one example as a linked thumbnail.

    Args:
        example: Its entry in the gallery's manifest.
        prefix: Path from the page that shows it to the gallery's folder, ending in a slash.

    Returns:
        Markdown; the links are checked by the strict build.
    """
    title = escape(example["title"])
    # A tooltip is plain text: code marks in it would end the attribute for Markdown.
    question = escape(example["intro"].replace("`", ""))
    # A Markdown link, because MkDocs neither rewrites nor checks the address of a raw `<a>`.
    picture = f"![]({prefix}{example['thumb']}){{ loading=lazy }}"
    address = f"{prefix}{example['stem']}.md"
    return f'[{picture}<span>{title}</span>]({address}){{ .gl-card title="{question}" }}'


def grid(examples: list[dict[str, Any]], prefix: str = "", *, caption: str | None = None) -> str:
    """Return several examples side by side.

    Args:
        examples: Their entries in the gallery's manifest.
        prefix: Path from the page that shows them to the gallery's folder, ending in a slash.
        caption: A line above a small grid, or `None` for the large one.

    Returns:
        Markdown.
    """
    small = f"\n<p>{caption}</p>\n" if caption else ""
    cards = "\n".join(card(example, prefix) for example in examples)
    kind = "gl-grid gl-mini" if caption else "gl-grid"
    return f'<div class="{kind}" markdown>{small}\n\n{cards}\n\n</div>'
