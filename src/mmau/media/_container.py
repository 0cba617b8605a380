"""Opening a media container with FFmpeg, its errors turned into sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmau._optional import require
from mmau.media.errors import MediaError, check_file

__all__ = ["open_container"]


@contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file for reading with PyAV.

    Args:
        path: The file.

    Yields:
        The open `av` container.

    Raises:
        MediaError: If the file is missing, a folder, empty, or nothing that FFmpeg can read.
    """
    av = require("av", purpose="reading video and sound", extra="video")
    file = check_file(path)
    try:
        container = av.open(str(file), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(
            f"not a video or sound file that FFmpeg can read, or its header is damaged: {file} "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error
    with container:
        yield container
