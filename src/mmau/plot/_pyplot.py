"""Matplotlib, loaded when something is drawn."""

from __future__ import annotations

from typing import Any

from mmau.registry import MissingDependencyError

__all__ = ["pyplot"]


def pyplot() -> Any:
    """Return `matplotlib.pyplot`, or say what brings it."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MissingDependencyError(
            "mmau.plot needs 'matplotlib', which is not installed: pip install \"mmau[plot]\"",
            name="matplotlib",
        ) from error
    return plt
