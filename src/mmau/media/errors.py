"""What goes wrong with files that users give, in one sentence that names the file."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from mmau.registry import MissingDependencyError

__all__ = ["MediaError", "check_file", "require"]


class MediaError(ValueError):
    """A media file cannot be used; the message is one sentence with its path."""


def check_file(path: str | os.PathLike[str]) -> Path:
    """Check that a path is a file with something in it.

    Args:
        path: What the user gave.

    Returns:
        The same as a `Path`.

    Raises:
        MediaError: If there is no such file, it is a folder, or it is empty.

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


def require(module: str, *, purpose: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Args:
        module: Name to import, such as `"av"`.
        purpose: What needs it, as the subject of the sentence: `"reading video"`.
        extra: The extra of mmau that installs it.

    Returns:
        The module.

    Raises:
        MissingDependencyError: If it is not installed.

    Examples:
        >>> require("nothing_of_this_name", purpose="reading video", extra="video")
        Traceback (most recent call last):
        ...
        mmau.registry.MissingDependencyError: reading video needs 'nothing_of_this_name', ...
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        if (error.name or "").split(".")[0] != top:
            raise  # the library is there but something inside it is broken: show that
        raise MissingDependencyError(
            f'{purpose} needs {top!r}, which is not installed: pip install "mmau[{extra}]"',
            name=top,
        ) from error
