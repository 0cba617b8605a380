"""From a video, frames or features to a table of Action Units with one row per frame."""

from __future__ import annotations

from mmau.inference._encode import detector_logits, encode_crops, encode_trial
from mmau.inference._live import LiveRow, LiveSession
from mmau.inference._person import VideoLogits
from mmau.inference._predictor import AUPredictor
from mmau.inference._sound import SoundStream, cut_sound
from mmau.inference._stages import StageTimes
from mmau.inference._stream import LogitStream
from mmau.inference._table import AUTable, TableError, read_table
from mmau.inference.annotated_video import annotate_video

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
