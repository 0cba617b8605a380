"""Aff-Wild2-shaped clips, rendered at run time from two public-domain photographs.

`render_dataset` writes a data set, `render_clip` keeps one clip in memory, `render_face` draws
stills. The photographs ship inside matplotlib and scikit-image, the meshes on them are found by
MediaPipe; none of the three libraries is imported before something is rendered.
"""

from __future__ import annotations

from mmau.synthetic.clip import ClipPlan, SyntheticClip, plan_clip, render_clip, render_face
from mmau.synthetic.config import SyntheticConfig
from mmau.synthetic.face_warp import Face, load_faces
from mmau.synthetic.manifest import read_truth
from mmau.synthetic.movie import write_movie
from mmau.synthetic.photographs import PHOTOGRAPHS, PhotographInfo, load_photograph
from mmau.synthetic.timeline import (
    EPISODES,
    Episode,
    Event,
    draw_events,
    draw_hidden,
    intensities_at,
)
from mmau.synthetic.writer import render_dataset

__all__ = [
    "EPISODES",
    "PHOTOGRAPHS",
    "ClipPlan",
    "Episode",
    "Event",
    "Face",
    "PhotographInfo",
    "SyntheticClip",
    "SyntheticConfig",
    "draw_events",
    "draw_hidden",
    "intensities_at",
    "load_faces",
    "load_photograph",
    "plan_clip",
    "read_truth",
    "render_clip",
    "render_dataset",
    "render_face",
    "write_movie",
]
