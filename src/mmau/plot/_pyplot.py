"""Matplotlib, loaded when something is drawn."""

from __future__ import annotations

from typing import Any

from mmau._optional import require


def pyplot() -> Any:
    """Return `matplotlib.pyplot`, or say what brings it."""
    return require("matplotlib.pyplot", purpose="mmau.plot", extra="plot")
