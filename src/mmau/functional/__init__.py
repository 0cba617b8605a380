"""The equations as functions of tensors, without state."""

from __future__ import annotations

from mmau.functional.asymmetric_loss import asymmetric_loss, asymmetric_posterior, focal_loss
from mmau.functional.landmark_patches import PatchRegions, landmark_patches
from mmau.functional.masked_bce_loss import masked_bce_loss
from mmau.functional.region_attention import region_attention
from mmau.functional.region_pooling import PooledRegions, region_pooling
from mmau.functional.selective_scan import (
    SCAN_BACKENDS,
    ScanBackend,
    half_life,
    resolve_scan_backend,
    selective_scan,
)
from mmau.functional.time_alignment import AlignedFeatures, interpolate_features

__all__ = [
    "SCAN_BACKENDS",
    "AlignedFeatures",
    "PatchRegions",
    "PooledRegions",
    "ScanBackend",
    "asymmetric_loss",
    "asymmetric_posterior",
    "focal_loss",
    "half_life",
    "interpolate_features",
    "landmark_patches",
    "masked_bce_loss",
    "region_attention",
    "region_pooling",
    "resolve_scan_backend",
    "selective_scan",
]
