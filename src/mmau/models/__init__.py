"""The assembled detector, built from parts or by name, saved and loaded."""

from __future__ import annotations

from mmau.models.checkpoint import (
    load_pretrained,
    model_card,
    push_to_hub,
    read_record,
    save_pretrained,
)
from mmau.models.config import Component, DetectorConfig
from mmau.models.detector import AUDetector, build_detector
from mmau.models.export import export_head_onnx, export_hga_onnx, export_temporal

__all__ = [
    "AUDetector",
    "Component",
    "DetectorConfig",
    "build_detector",
    "export_head_onnx",
    "export_hga_onnx",
    "export_temporal",
    "load_pretrained",
    "model_card",
    "push_to_hub",
    "read_record",
    "save_pretrained",
]
