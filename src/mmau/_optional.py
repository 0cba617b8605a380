"""Libraries that are imported where they are needed, or named with the command that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from mmau.registry import MissingDependencyError


def require(module: str, *, purpose: str, extra: str) -> Any:
    """Import an optional library, or say which extra brings it.

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
