"""The one table of results: every way to decide, each with its interval, beside the floors.

`evaluate_trials` scores what a model said about annotated videos: F1 of the positive class, pooled
over all labelled frames, unweighted mean over the Action Units. Nothing here averages F1 over
batches or videos, and no threshold or width is scored on a video that helped to choose it.
"""

from __future__ import annotations

from mmau.evaluation._compare import Comparison, compare_reports, compare_trials
from mmau.evaluation._evaluate import evaluate_trials
from mmau.evaluation._fit import fit_calibration
from mmau.evaluation._report import EvaluationReport, ReportRow
from mmau.evaluation._trials import ScoredTrial

__all__ = [
    "Comparison",
    "EvaluationReport",
    "ReportRow",
    "ScoredTrial",
    "compare_reports",
    "compare_trials",
    "evaluate_trials",
    "fit_calibration",
]
