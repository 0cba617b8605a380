"""Scores and decisions: counting, ranking, intervals, thresholds, smoothing, the table of results.

F1 of the positive class is pooled over all labelled frames and averaged over the Action Units.
There is no average of per-batch or per-video F1 here, because those are different numbers: the same
predictions give .53 pooled, .32 per batch and .25 per video. No threshold or smoothing window is
scored on a video that helped to choose it: chosen on the half that it is scored on, thresholds give
.560, on the other half .511.
"""

from __future__ import annotations

from mmau.evaluation.bootstrap import (
    Interval,
    bootstrap_by_video,
    bootstrap_per_au_by_video,
    paired_bootstrap_by_video,
)
from mmau.evaluation.calibration import Calibrated, Calibration, PosteriorOption
from mmau.evaluation.counts import ArrayLike, AUCounts, TrivialFloors, trivial_floors
from mmau.evaluation.evaluate import (
    Comparison,
    compare_reports,
    compare_trials,
    evaluate_trials,
    fit_calibration,
)
from mmau.evaluation.ranking import (
    PrecisionRecallCurve,
    ReliabilityCurve,
    ScoreHistogram,
    average_precision,
    calibration_error,
    reliability_curve,
)
from mmau.evaluation.report import EvaluationReport, ReportRow, ScoredTrial
from mmau.evaluation.smoothing import (
    WIDTHS,
    CrossFittedSmoothing,
    ExponentialSmoother,
    FilledGaps,
    SmoothingKind,
    TimeUnit,
    choose_widths,
    cross_fitted_smoothing,
    ensemble,
    fill_gaps,
    smooth,
)
from mmau.evaluation.thresholds import (
    SHRINKAGE,
    best_thresholds,
    cross_fitted_predictions,
    cross_fitted_thresholds,
    fit_thresholds,
    shrink_thresholds,
)

__all__ = [
    "SHRINKAGE",
    "WIDTHS",
    "AUCounts",
    "ArrayLike",
    "Calibrated",
    "Calibration",
    "Comparison",
    "CrossFittedSmoothing",
    "EvaluationReport",
    "ExponentialSmoother",
    "FilledGaps",
    "Interval",
    "PosteriorOption",
    "PrecisionRecallCurve",
    "ReliabilityCurve",
    "ReportRow",
    "ScoreHistogram",
    "ScoredTrial",
    "SmoothingKind",
    "TimeUnit",
    "TrivialFloors",
    "average_precision",
    "best_thresholds",
    "bootstrap_by_video",
    "bootstrap_per_au_by_video",
    "calibration_error",
    "choose_widths",
    "compare_reports",
    "compare_trials",
    "cross_fitted_predictions",
    "cross_fitted_smoothing",
    "cross_fitted_thresholds",
    "ensemble",
    "evaluate_trials",
    "fill_gaps",
    "fit_calibration",
    "fit_thresholds",
    "paired_bootstrap_by_video",
    "reliability_curve",
    "shrink_thresholds",
    "smooth",
    "trivial_floors",
]
