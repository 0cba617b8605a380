"""The components as `torch.nn.Module`s; each stands alone."""

from __future__ import annotations

from mmau.modules.agssm import AGSSM
from mmau.modules.agssm_block import AGSSMBlock
from mmau.modules.asymmetric_cross_attention import AsymmetricCrossAttention
from mmau.modules.audio_guided_selection import AudioGuidedSelection, SelectionParameters
from mmau.modules.frame_chunked import FrameChunked, run_in_chunks
from mmau.modules.hga import HGA, HGAOutput
from mmau.modules.landmark_to_patch import LandmarkToPatch
from mmau.modules.losses import LOSSES, AsymmetricLoss, FocalLoss, MaskedBCELoss
from mmau.modules.region_merge import RegionMerge
from mmau.modules.tcn import TCN
from mmau.modules.temporal import TEMPORAL_MODELS, TemporalModel
from mmau.modules.temporal_module import mask_from_lengths
from mmau.modules.temporal_transformer import TemporalTransformer
from mmau.modules.vision_mamba import VisionMamba

__all__ = [
    "AGSSM",
    "HGA",
    "LOSSES",
    "TCN",
    "TEMPORAL_MODELS",
    "AGSSMBlock",
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
    "run_in_chunks",
]
