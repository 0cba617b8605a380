"""Images to patch tokens, waveforms to timed features: adapters to pretrained networks.

Importing this package loads no heavy library; the classes around models of transformers load it
when they are first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmau.encoders.backbone import AdapterOptions
from mmau.encoders.log_mel import LogMelEncoder
from mmau.encoders.protocols import AudioEncoder, AudioFeatures, VisualEncoder, VisualFeatures
from mmau.registry import MissingDependencyError, Registry

if TYPE_CHECKING:
    from mmau.encoders.speech import HuggingFaceSpeechEncoder, WavLMEncoder, WhisperEncoder
    from mmau.encoders.vision import DINOv2Encoder, HuggingFaceVisualEncoder, ViTEncoder

__all__ = [
    "AUDIO_ENCODERS",
    "VISUAL_ENCODERS",
    "AdapterOptions",
    "AudioEncoder",
    "AudioFeatures",
    "DINOv2Encoder",
    "HuggingFaceSpeechEncoder",
    "HuggingFaceVisualEncoder",
    "LogMelEncoder",
    "ViTEncoder",
    "VisualEncoder",
    "VisualFeatures",
    "WavLMEncoder",
    "WhisperEncoder",
]

_NEEDS = ("transformers", "peft")

VISUAL_ENCODERS: Registry[Callable[..., VisualEncoder]] = Registry(
    "visual encoder", group="mmau.visual_encoders"
)
"""Name to a factory of a visual encoder."""
for _name, _path, _summary in (
    ("dinov2", "dinov2", "DINOv2, frozen, with LoRA on query and value."),
    ("tiny", "tiny_dinov2", "DINOv2 of two narrow layers, to be trained from scratch."),
    ("vit", "vit", "ViT trained for classification: the paper's baseline."),
    ("hf_vision", "hf_vision", "Any vision transformer of the hub: DINOv3, CLIP, SigLIP, ..."),
):
    VISUAL_ENCODERS.register_lazy(
        _name,
        f"mmau.encoders.vision:{_path}",
        summary=_summary,
        extra="encoders",
        requires=_NEEDS,
    )

AUDIO_ENCODERS: Registry[Callable[..., AudioEncoder]] = Registry(
    "audio encoder", group="mmau.audio_encoders"
)
"""Name to a factory of an audio encoder."""
for _name, _summary in (
    ("wavlm", "WavLM, frozen, with bottleneck adapters and a mix of its layers."),
    ("tiny_wavlm", "WavLM of two narrow layers, to be trained from scratch."),
    ("whisper", "Encoder of Whisper, frozen: the paper's baseline."),
    ("hf_speech", "Any wav2vec-like model of the hub by its name: HuBERT, wav2vec 2.0, ..."),
):
    AUDIO_ENCODERS.register_lazy(
        _name,
        f"mmau.encoders.speech:{_name}",
        summary=_summary,
        extra="encoders",
        requires=_NEEDS,
    )
AUDIO_ENCODERS.register_lazy(
    "log_mel",
    "mmau.encoders.log_mel:LogMelEncoder",
    summary="Log-mel energies in plain torch, causal if asked for.",
)

_LAZY = {
    "DINOv2Encoder": "mmau.encoders.vision",
    "HuggingFaceSpeechEncoder": "mmau.encoders.speech",
    "HuggingFaceVisualEncoder": "mmau.encoders.vision",
    "ViTEncoder": "mmau.encoders.vision",
    "WavLMEncoder": "mmau.encoders.speech",
    "WhisperEncoder": "mmau.encoders.speech",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name in _NEEDS:
            raise MissingDependencyError(
                f"{name} needs {error.name!r}, which is not installed: "
                'pip install "mmau[encoders]"',
                name=error.name,
            ) from error
        raise
