"""From probabilities to decisions: thresholds per Action Unit, cross-fitted by video; smoothing.

A threshold that was chosen on the videos it is scored on gains points that do not exist (.560 on
the half it was tuned on, .511 on the other). Report `cross_fitted_predictions`, ship
`best_thresholds`.
"""

from __future__ import annotations

from mmau.calibration._record import Calibration
from mmau.calibration._smoothing import smooth
from mmau.calibration._thresholds import (
    best_thresholds,
    cross_fitted_predictions,
    cross_fitted_thresholds,
)

__all__ = [
    "Calibration",
    "best_thresholds",
    "cross_fitted_predictions",
    "cross_fitted_thresholds",
    "smooth",
]
