"""Images to patch tokens, waveforms to timed features: adapters to pretrained networks.

Importing this package loads no heavy library; `DINOv2Encoder` and `WavLMEncoder` load theirs when
they are first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmau.encoders.log_mel import LogMelEncoder
from mmau.encoders.protocols import (
    AudioEncoder,
    AudioFeatures,
    PretrainedSource,
    VisualEncoder,
    VisualFeatures,
)
from mmau.registry import MissingDependencyError, Registry

if TYPE_CHECKING:
    from mmau.encoders.speech import HuggingFaceSpeechEncoder, WavLMEncoder, WhisperEncoder
    from mmau.encoders.vision import DINOv2Encoder, HuggingFaceVisualEncoder, ViTEncoder

__all__ = [
    "AUDIO_ENCODERS",
    "VISUAL_ENCODERS",
    "AudioEncoder",
    "AudioFeatures",
    "DINOv2Encoder",
    "HuggingFaceSpeechEncoder",
    "HuggingFaceVisualEncoder",
    "LogMelEncoder",
    "PretrainedSource",
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
VISUAL_ENCODERS.register_lazy(
    "dinov2",
    "mmau.encoders.vision:dinov2",
    summary="DINOv2, frozen, with LoRA on query and value.",
    extra="encoders",
    requires=_NEEDS,
)
VISUAL_ENCODERS.register_lazy(
    "tiny",
    "mmau.encoders.vision:tiny_dinov2",
    summary="DINOv2 of two narrow layers, to be trained from scratch.",
    extra="encoders",
    requires=_NEEDS,
)
VISUAL_ENCODERS.register_lazy(
    "vit",
    "mmau.encoders.vision:vit",
    summary="ViT trained for classification: the paper's baseline.",
    extra="encoders",
    requires=_NEEDS,
)
VISUAL_ENCODERS.register_lazy(
    "hf_vision",
    "mmau.encoders.vision:hf_vision",
    summary="Any vision transformer of the hub by its name: DINOv3, CLIP, SigLIP, ...",
    extra="encoders",
    requires=_NEEDS,
)

AUDIO_ENCODERS: Registry[Callable[..., AudioEncoder]] = Registry(
    "audio encoder", group="mmau.audio_encoders"
)
"""Name to a factory of an audio encoder."""
AUDIO_ENCODERS.register_lazy(
    "wavlm",
    "mmau.encoders.speech:wavlm",
    summary="WavLM, frozen, with bottleneck adapters and a mix of its layers.",
    extra="encoders",
    requires=_NEEDS,
)
AUDIO_ENCODERS.register_lazy(
    "tiny_wavlm",
    "mmau.encoders.speech:tiny_wavlm",
    summary="WavLM of two narrow layers, to be trained from scratch.",
    extra="encoders",
    requires=_NEEDS,
)
AUDIO_ENCODERS.register_lazy(
    "whisper",
    "mmau.encoders.speech:whisper",
    summary="Encoder of Whisper, frozen: the paper's baseline.",
    extra="encoders",
    requires=_NEEDS,
)
AUDIO_ENCODERS.register_lazy(
    "hf_speech",
    "mmau.encoders.speech:hf_speech",
    summary="Any wav2vec-like model of the hub by its name: HuBERT, wav2vec 2.0, ...",
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
