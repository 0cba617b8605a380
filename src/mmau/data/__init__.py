"""Files on disk: annotations, clips, prepared videos, features, and data rendered at run time."""

from __future__ import annotations

from mmau.data.affwild2 import (
    Trial,
    find_listed_trials,
    find_trials,
    join_labels,
    read_annotation,
    write_submission,
)
from mmau.data.affwild2_check import check_data_root
from mmau.data.clips import (
    ClipAugmentation,
    ClipDataset,
)
from mmau.data.feature_cache import FeatureCache, FeatureLayout
from mmau.data.prepare import (
    PreparationError,
    PreparationReport,
    iterate_prepared,
    prepare_dataset,
    prepare_video,
)
from mmau.data.prepared import (
    PreparedChunk,
    PreparedTrial,
    load_trial,
)
from mmau.tables.formats import (
    write_openface,
    write_pyfeat,
)
from mmau.tables.label_conventions import AnnotationError, read_bp4d, read_disfa

__all__ = [
    "AnnotationError",
    "ClipAugmentation",
    "ClipDataset",
    "FeatureCache",
    "FeatureLayout",
    "PreparationError",
    "PreparationReport",
    "PreparedChunk",
    "PreparedTrial",
    "Trial",
    "check_data_root",
    "find_listed_trials",
    "find_trials",
    "iterate_prepared",
    "join_labels",
    "load_trial",
    "prepare_dataset",
    "prepare_video",
    "read_annotation",
    "read_bp4d",
    "read_disfa",
    "write_openface",
    "write_pyfeat",
    "write_submission",
]
