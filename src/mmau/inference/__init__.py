"""From a video, frames or features to a table of Action Units with one row per frame."""

from __future__ import annotations

from mmau.inference.annotate import annotate_video
from mmau.inference.live import LiveRow, LiveSession
from mmau.inference.predictor import AUPredictor
from mmau.inference.session import StageTimes, VideoLogits, detector_logits
from mmau.inference.stream import (
    LogitStream,
    SoundStream,
    cut_sound,
    encode_crops,
    encode_trial,
)
from mmau.inference.table import AUTable, TableError, read_table

__all__ = [
    "AUPredictor",
    "AUTable",
    "LiveRow",
    "LiveSession",
    "LogitStream",
    "SoundStream",
    "StageTimes",
    "TableError",
    "VideoLogits",
    "annotate_video",
    "cut_sound",
    "detector_logits",
    "encode_crops",
    "encode_trial",
    "read_table",
]
