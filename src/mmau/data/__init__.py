"""Files on disk: annotations, clips, prepared videos, and data rendered at run time."""

from __future__ import annotations

from mmau.data.affwild2 import (
    Annotation,
    AnnotationError,
    JoinedLabels,
    Trial,
    find_trials,
    join_labels,
    read_annotation,
    write_submission,
)
from mmau.data.clips import ClipDataset, ClipSampler, ClipStitcher, clip_windows
from mmau.data.features import PreparationError, prepare_dataset, prepare_video
from mmau.data.prepared_trial import CacheError, PreparedTrial, load_trial, save_trial

__all__ = [
    "Annotation",
    "AnnotationError",
    "CacheError",
    "ClipDataset",
    "ClipSampler",
    "ClipStitcher",
    "JoinedLabels",
    "PreparationError",
    "PreparedTrial",
    "Trial",
    "clip_windows",
    "find_trials",
    "join_labels",
    "load_trial",
    "prepare_dataset",
    "prepare_video",
    "read_annotation",
    "save_trial",
    "write_submission",
]
