"""Scores and decisions: counting, ranking, intervals, thresholds, smoothing, the table of results.

F1 of the positive class is pooled over all labelled frames and averaged over the Action Units.
There is no average of per-batch or per-video F1 here, because those are different numbers: the same
predictions give .53 pooled, .32 per batch and .25 per video. No threshold or smoothing window is
scored on a video that helped to choose it: chosen on the half that it is scored on, thresholds give
.560, on the other half .511.
"""

from __future__ import annotations

from mmau.evaluation.bootstrap import (
    BootstrapOptions,
    Interval,
    bootstrap_by_video,
    paired_bootstrap_by_video,
)
from mmau.evaluation.calibration import Calibration
from mmau.evaluation.counts import AUCounts, trivial_baselines
from mmau.evaluation.evaluate import evaluate_trials, fit_calibration
from mmau.evaluation.ranking import average_precision, calibration_error, reliability_curve
from mmau.evaluation.report import EvaluationReport, compare_reports
from mmau.evaluation.smoothing import ensemble, smooth
from mmau.evaluation.thresholds import FitOptions, best_thresholds
from mmau.evaluation.trials import ScoredTrial

__all__ = [
    "AUCounts",
    "BootstrapOptions",
    "Calibration",
    "EvaluationReport",
    "FitOptions",
    "Interval",
    "ScoredTrial",
    "average_precision",
    "best_thresholds",
    "bootstrap_by_video",
    "calibration_error",
    "compare_reports",
    "ensemble",
    "evaluate_trials",
    "fit_calibration",
    "paired_bootstrap_by_video",
    "reliability_curve",
    "smooth",
    "trivial_baselines",
]
