"""Lines and headers of the text files of Aff-Wild2."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["AnnotationError", "header", "read_lines"]


class AnnotationError(ValueError):
    """An annotation or submission file does not say what it should; names the file and the line."""


def read_lines(path: Path) -> list[str]:
    """Lines without their ends; blank lines at the end are dropped, so line numbers stay true."""
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{kind}: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file: {error.reason}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def header(line: str, where: str) -> tuple[str, ...]:
    """Names of the Action Units; empty fields at the end come from trailing commas."""
    names = [name.strip() for name in line.split(",")]
    while names and not names[-1]:
        names.pop()
    bad = [name for name in names if not re.fullmatch(r"AU\d+", name)]
    if not names or bad:
        raise AnnotationError(f"{where}: expected names such as AU1,AU2,AU4; got {line.strip()!r}.")
    if len(set(names)) != len(names):
        raise AnnotationError(f"{where}: an Action Unit occurs twice; got {line.strip()!r}.")
    return tuple(names)
