"""Aff-Wild2-shaped clips, rendered at run time from two public-domain photographs.

`render_dataset` writes a data set, `render_clip` keeps one clip in memory, `render_face` draws
stills. The photographs ship inside matplotlib and scikit-image, the meshes on them are found by
MediaPipe; none of the three libraries is imported before something is rendered.
"""

from __future__ import annotations

from mmau.synthetic.clips import ClipPlan, SyntheticClip, render_clip, render_face
from mmau.synthetic.photographs import load_photograph
from mmau.synthetic.timeline import EPISODES, SyntheticConfig
from mmau.synthetic.writer import read_truth, render_dataset, write_movie

__all__ = [
    "EPISODES",
    "ClipPlan",
    "SyntheticClip",
    "SyntheticConfig",
    "load_photograph",
    "read_truth",
    "render_clip",
    "render_dataset",
    "render_face",
    "write_movie",
]
