"""Audio-visual, temporal components for facial Action Unit detection."""

from __future__ import annotations

from mmau._version import __version__
from mmau.action_units import AU_NAMES
from mmau.models.detector import AUDetector
from mmau.modules import (
    AGSSM,
    HGA,
    TCN,
    AsymmetricCrossAttention,
    AsymmetricLoss,
    AudioGuidedSelection,
    FocalLoss,
    HGAOutput,
    LandmarkToPatch,
    MaskedBCELoss,
    RegionMerge,
    TemporalTransformer,
    VisionMamba,
)

__all__ = [
    "AGSSM",
    "AU_NAMES",
    "HGA",
    "TCN",
    "AUDetector",
    "AsymmetricCrossAttention",
    "AsymmetricLoss",
    "AudioGuidedSelection",
    "FocalLoss",
    "HGAOutput",
    "LandmarkToPatch",
    "MaskedBCELoss",
    "RegionMerge",
    "TemporalTransformer",
    "VisionMamba",
    "__version__",
]
