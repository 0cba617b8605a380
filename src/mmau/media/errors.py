"""What goes wrong with files that users give."""

from __future__ import annotations

import os
from pathlib import Path


class MediaError(ValueError):
    """A media file cannot be used; the message is one line with its path."""


def check_file(path: str | os.PathLike[str]) -> Path:
    """Check that a path is a file with something in it.

    Examples:
        >>> check_file("no/such/video.mp4")
        Traceback (most recent call last):
        ...
        mmau.media.errors.MediaError: no such file: no/such/video.mp4
    """
    file = Path(path)
    if file.is_dir():
        raise MediaError(f"expected a file but this is a folder: {file}")
    if not file.exists():
        raise MediaError(f"no such file: {file}")
    if file.stat().st_size == 0:
        raise MediaError(f"the file is empty (0 bytes): {file}")
    return file
