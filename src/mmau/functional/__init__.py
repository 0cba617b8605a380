"""The equations as functions of tensors, without state."""

from __future__ import annotations

from mmau.functional.asymmetric_loss import (
    asymmetric_loss,
    asymmetric_posterior,
    focal_loss,
    logits_from_asymmetric_posterior,
    masked_bce_loss,
)
from mmau.functional.landmark_patches import landmark_patches
from mmau.functional.region_attention import (
    PooledRegions,
    region_attention,
    region_pooling,
)
from mmau.functional.selective_scan import (
    SCAN_BACKENDS,
    ScanBackend,
    half_life,
    selective_scan,
)
from mmau.functional.time_alignment import interpolate_features
from mmau.functional.windowed_attention import windowed_attention

__all__ = [
    "SCAN_BACKENDS",
    "PooledRegions",
    "ScanBackend",
    "asymmetric_loss",
    "asymmetric_posterior",
    "focal_loss",
    "half_life",
    "interpolate_features",
    "landmark_patches",
    "logits_from_asymmetric_posterior",
    "masked_bce_loss",
    "region_attention",
    "region_pooling",
    "selective_scan",
    "windowed_attention",
]
