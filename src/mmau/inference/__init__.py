"""From a video, frames or features to a table of Action Units with one row per frame."""

from __future__ import annotations

from mmau.inference.annotate import annotate_video
from mmau.inference.live import LiveRow, LiveSession
from mmau.inference.predictor import AUPredictor
from mmau.inference.session import StageTimes, VideoLogits, detector_logits
from mmau.inference.stream import LogitStream, encode_trial
from mmau.inference.table import AUTable, read_table

__all__ = [
    "AUPredictor",
    "AUTable",
    "LiveRow",
    "LiveSession",
    "LogitStream",
    "StageTimes",
    "VideoLogits",
    "annotate_video",
    "detector_logits",
    "encode_trial",
    "read_table",
]
