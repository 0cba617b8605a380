"""From probabilities to decisions: thresholds and smoothing, chosen on other videos.

A threshold that was chosen on the videos it is scored on gains points that do not exist (.560 on
the half it was tuned on, .511 on the other). Report `cross_fitted_predictions` or
`cross_fitted_smoothing`, ship `fit_thresholds` and `choose_widths` in a `Calibration`.
"""

from __future__ import annotations

from mmau.calibration._cross_fit import cross_fitted_predictions, cross_fitted_thresholds
from mmau.calibration._ensemble import ensemble
from mmau.calibration._gaps import FilledGaps, fill_gaps
from mmau.calibration._record import Calibrated, Calibration, PosteriorOption
from mmau.calibration._smoothing import ExponentialSmoother, SmoothingKind, TimeUnit, smooth
from mmau.calibration._thresholds import (
    SHRINKAGE,
    best_thresholds,
    fit_thresholds,
    shrink_thresholds,
)
from mmau.calibration._widths import (
    WIDTHS,
    CrossFittedSmoothing,
    choose_widths,
    cross_fitted_smoothing,
)

__all__ = [
    "SHRINKAGE",
    "WIDTHS",
    "Calibrated",
    "Calibration",
    "CrossFittedSmoothing",
    "ExponentialSmoother",
    "FilledGaps",
    "PosteriorOption",
    "SmoothingKind",
    "TimeUnit",
    "best_thresholds",
    "choose_widths",
    "cross_fitted_predictions",
    "cross_fitted_smoothing",
    "cross_fitted_thresholds",
    "ensemble",
    "fill_gaps",
    "fit_thresholds",
    "shrink_thresholds",
    "smooth",
]
