"""Counting and scoring: the official pooled F1, its trivial floors, intervals by video.

There is no average of per-batch or per-video F1 here, because those are different numbers: the same
predictions give .53 pooled, .32 per batch and .25 per video. Pool the counts, then score.
"""

from __future__ import annotations

from mmau.metrics._counts import AUCounts, TrivialFloors, trivial_floors
from mmau.metrics._histogram import PrecisionRecallCurve, ScoreHistogram
from mmau.metrics._input import ArrayLike
from mmau.metrics._intervals import (
    Interval,
    bootstrap_by_video,
    bootstrap_per_au_by_video,
    paired_bootstrap_by_video,
)
from mmau.metrics._ranking import average_precision
from mmau.metrics._reliability import ReliabilityCurve, calibration_error, reliability_curve

__all__ = [
    "AUCounts",
    "ArrayLike",
    "Interval",
    "PrecisionRecallCurve",
    "ReliabilityCurve",
    "ScoreHistogram",
    "TrivialFloors",
    "average_precision",
    "bootstrap_by_video",
    "bootstrap_per_au_by_video",
    "calibration_error",
    "paired_bootstrap_by_video",
    "reliability_curve",
    "trivial_floors",
]
