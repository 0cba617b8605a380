"""Sizes of the parts and of the encoders, counted on models without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from _markdown import table
from torch import nn

from mmau.modules import (
    AGSSM,
    HGA,
    TCN,
    AsymmetricCrossAttention,
    RegionMerge,
    TemporalTransformer,
    VisionMamba,
)


def _count(module: nn.Module, *, trainable: bool = False) -> str:
    """Return the number of parameters, in thousands or millions."""
    total = sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
    if total == 0:
        return "none"
    if total < 1e6:
        return f"{total / 1e3:.0f} k"
    return f"{total / 1e6:.1f} M" if total < 1e7 else f"{total / 1e6:.0f} M"


# Widths of the paper where it gives them: 1024-wide patches, 768 everywhere else, 256 for sound.
_PARTS: dict[str, Callable[[], nn.Module]] = {
    "hga": lambda: HGA(1024, 768),
    "region_merge": lambda: RegionMerge(13, 768, 768),
    "agssm": lambda: AGSSM(768, 256),
    "vision_mamba": lambda: VisionMamba(768, 256),
    "asymmetric_cross_attention": lambda: AsymmetricCrossAttention(768, 256),
    "tcn": lambda: TCN(768, 256),
    "temporal_transformer": lambda: TemporalTransformer(768, 256),
}


def size(part: str) -> str:
    """Return the number of parameters of a part; `ValueError` if there is no such part."""
    if part not in _PARTS:
        raise ValueError(f"no size is known of {part!r}; there are: {', '.join(_PARTS)}.")
    return _count(_PARTS[part]())


# ------------------------------------------------------------------ encoders
def _visual() -> Sequence[tuple[str, str, Callable[[], nn.Module]]]:
    from mmau.encoders import VISUAL_ENCODERS, AdapterOptions, DINOv2Encoder, ViTEncoder
    from mmau.encoders.vision import DINOV2_ARCHITECTURES, VIT_ARCHITECTURES

    lora = AdapterOptions(lora_rank=8)
    dinov2 = [
        (
            f"`dinov2`, `{name}`",
            "LoRA of rank 8",
            functools.partial(DINOv2Encoder.from_config, DINOV2_ARCHITECTURES[name], lora),
        )
        for name in (f"facebook/dinov2-{size}" for size in ("small", "base", "large"))
    ]
    vit = [
        (
            f"`vit`, `{name}`",
            "all of it",
            functools.partial(ViTEncoder.from_config, VIT_ARCHITECTURES[name]),
        )
        for name in list(VIT_ARCHITECTURES)[:1]
    ]
    return [*dinov2, *vit, ("`tiny`", "all of it", lambda: VISUAL_ENCODERS.create("tiny"))]


def _audio() -> Sequence[tuple[str, str, Callable[[], nn.Module]]]:
    from mmau.encoders import AUDIO_ENCODERS, WavLMEncoder, WhisperEncoder
    from mmau.encoders.speech import WAVLM_ARCHITECTURES, WHISPER_ARCHITECTURES

    wavlm = [
        (
            f"`wavlm`, `{name}`",
            "adapters and mix, if pretrained",
            functools.partial(WavLMEncoder.from_config, architecture),
        )
        for name, architecture in WAVLM_ARCHITECTURES.items()
    ]
    whisper = [
        (
            f"`whisper`, `{name}`",
            "nothing, if pretrained",
            functools.partial(WhisperEncoder.from_config, WHISPER_ARCHITECTURES[name]),
        )
        for name in list(WHISPER_ARCHITECTURES)[:3]
    ]
    return [
        *wavlm,
        *whisper,
        ("`tiny_wavlm`", "all of it", lambda: AUDIO_ENCODERS.create("tiny_wavlm")),
        ("`log_mel`", "nothing", lambda: AUDIO_ENCODERS.create("log_mel")),
    ]


def encoder_table(kind: str) -> str:
    """Return the published sizes of the encoders, counted on models without memory."""
    if kind not in ("visual", "audio"):
        raise ValueError(f"encoders are 'visual' or 'audio'; got {kind!r}.")
    rows: list[tuple[object, ...]] = []
    for name, learns, build in _visual() if kind == "visual" else _audio():
        # Two hundred million weights are counted, not made; the small ones are made.
        try:
            with torch.device("meta"):
                encoder = build()
        except (NotImplementedError, RuntimeError):
            encoder = build()
        rows.append((name, encoder.d_out, _count(encoder), learns))
    return table(("Name", "Width", "Parameters", "What learns"), rows)
