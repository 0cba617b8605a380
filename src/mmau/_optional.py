"""Libraries that are imported where they are needed, or named with the command that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from mmau.registry import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, purpose: str, extra: str) -> Any:
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
        if error.name != top:
            raise  # the library is there but something inside it is broken: show that
        raise MissingDependencyError(
            f'{purpose} needs {top!r}, which is not installed: pip install "mmau[{extra}]"',
            name=top,
        ) from error
