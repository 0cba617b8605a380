"""The components as `torch.nn.Module`s; each stands alone."""

from __future__ import annotations

from mmau.modules.agssm import (
    AGSSM,
    AudioGuidedSelection,
    SelectionParameters,
    VisionMamba,
)
from mmau.modules.baselines import TCN, TemporalTransformer
from mmau.modules.cross_attention import AsymmetricCrossAttention
from mmau.modules.frame_chunked import FrameChunked
from mmau.modules.hga import HGA, HGAOutput, RegionMerge
from mmau.modules.landmark_to_patch import LandmarkToPatch
from mmau.modules.losses import LOSSES, AsymmetricLoss, FocalLoss, MaskedBCELoss
from mmau.modules.temporal import TEMPORAL_MODELS, TemporalModel, mask_from_lengths

__all__ = [
    "AGSSM",
    "HGA",
    "LOSSES",
    "TCN",
    "TEMPORAL_MODELS",
    "AsymmetricCrossAttention",
    "AsymmetricLoss",
    "AudioGuidedSelection",
    "FocalLoss",
    "FrameChunked",
    "HGAOutput",
    "LandmarkToPatch",
    "MaskedBCELoss",
    "RegionMerge",
    "SelectionParameters",
    "TemporalModel",
    "TemporalTransformer",
    "VisionMamba",
    "mask_from_lengths",
]
