"""Import an optional library at the moment it is needed, or say how to install it."""

from __future__ import annotations

import importlib
from typing import Any

from mmau.registry import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, extra: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: Dotted name, such as `"skimage.data"`.
        extra: The extra of mmau that installs it.

    Returns:
        The module.

    Raises:
        MissingDependencyError: If the library is not installed; gives the command.

    Examples:
        >>> require("no_such_library.part", extra="recipes")
        Traceback (most recent call last):
        ...
        mmau.registry.MissingDependencyError: the synthetic data need 'no_such_library', which is
        not installed: pip install "mmau[recipes]"
    """
    library = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the absence of the library itself is an extra to install; a broken one shows itself.
        if error.name != library:
            raise
        raise MissingDependencyError(
            f"the synthetic data need {library!r}, which is not installed: "
            f'pip install "mmau[{extra}]"',
            name=library,
        ) from error
