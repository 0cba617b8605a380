"""Figures: overlays on a face, and Action Units over time. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from mmau.plot.overlays import draw_attention, draw_landmarks, draw_regions
from mmau.plot.timeline import draw_timeline, save_timeline

__all__ = [
    "draw_attention",
    "draw_landmarks",
    "draw_regions",
    "draw_timeline",
    "save_timeline",
]
