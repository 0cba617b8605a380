"""The chooser table and the encoders, with parameters counted on models without memory."""

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

__all__ = ["chooser", "encoder_table"]


def _count(module: nn.Module, *, trainable: bool = False) -> str:
    """Return the number of parameters, in thousands or millions."""
    total = sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
    if total == 0:
        return "none"
    if total < 1e6:
        return f"{total / 1e3:.0f} k"
    return f"{total / 1e6:.1f} M" if total < 1e7 else f"{total / 1e6:.0f} M"


def _counted(build: Callable[[], nn.Module]) -> str:
    return _count(build())


# Widths of the paper where it gives them: 1024-wide patches, 768 everywhere else, 256 for sound.
_PARTS: tuple[tuple[str, str, str, Callable[[], nn.Module] | None, str, str | None], ...] = (
    (
        "[LandmarkToPatch](components/landmark_to_patch.md)",
        "landmarks, a patch grid",
        "weights `(m, p)` per frame",
        None,
        "frames, regions x patches",
        "plot_landmarks_to_patches",
    ),
    (
        "[HGA](components/hga.md)",
        "patch tokens, those weights",
        "one token per region",
        lambda: HGA(1024, 768),
        "frames, regions x patches",
        "plot_hga_attention",
    ),
    (
        "[RegionMerge](components/region_merge.md)",
        "one token per region",
        "one vector per frame",
        lambda: RegionMerge(13, 768, 768),
        "frames",
        None,
    ),
    (
        "[AGSSM](components/agssm.md)",
        "one vector per frame, and sound",
        "the same, with memory",
        lambda: AGSSM(768, 256),
        "frames; constant when streaming",
        "plot_delta_gate",
    ),
    (
        "[VisionMamba](components/agssm.md)",
        "one vector per frame, and sound",
        "the same, in layers",
        lambda: VisionMamba(768, 256),
        "frames; constant when streaming",
        "plot_streaming",
    ),
    (
        "[selective_scan](components/selective_scan.md)",
        "input, step, A, B, C per frame",
        "output per frame, state",
        None,
        "frames x width x state",
        "plot_backends_agree",
    ),
    (
        "[AsymmetricCrossAttention](components/asymmetric_cross_attention.md)",
        "frames and sound on two clocks",
        "the sound of each frame",
        lambda: AsymmetricCrossAttention(768, 256),
        "frames x sound in the window",
        "plot_two_clocks",
    ),
    (
        "[TCN](components/temporal_baselines.md)",
        "one vector per frame",
        "the same, a bounded past",
        lambda: TCN(768, 256),
        "frames; constant when streaming",
        "plot_cost_of_length",
    ),
    (
        "[TemporalTransformer](components/temporal_baselines.md)",
        "one vector per frame",
        "the same, all frames at once",
        lambda: TemporalTransformer(768, 256),
        "frames squared",
        "plot_cost_of_length",
    ),
    (
        "[Losses](components/losses.md)",
        "logits, labels with gaps",
        "a number to minimise",
        None,
        "labelled entries",
        "plot_asymmetric_loss",
    ),
    (
        "[Visual encoders](components/visual_encoders.md)",
        "face crops",
        "patch tokens",
        None,
        "frames; see the card",
        "plot_own_encoder",
    ),
    (
        "[Audio encoders](components/audio_encoders.md)",
        "a waveform",
        "features with their times",
        None,
        "seconds; see the card",
        "plot_two_clocks",
    ),
    (
        "[AUDetector](components/au_detector.md)",
        "crops, landmarks, sound",
        "logits per frame",
        None,
        "its encoders",
        "plot_missing_audio",
    ),
    (
        "[AUPredictor](components/au_predictor.md)",
        "a video file or a camera",
        "a table, one row per frame",
        None,
        "frames; memory is constant",
        "plot_streaming",
    ),
    (
        "[Evaluation](components/evaluation.md)",
        "logits and labels of videos",
        "F1 with intervals, thresholds",
        None,
        "frames, resamples",
        "plot_which_f1",
    ),
)


def chooser() -> str:
    """Return the table of all parts: what goes in, what comes out, what it costs, an example.

    Returns:
        Markdown, for a page at the top of the documentation.
    """
    rows: list[tuple[object, ...]] = []
    for part, given, made, build, grows, example in _PARTS:
        size = "none" if build is None else _counted(build)
        shown = f"[see it](gallery/{example}.md)" if example else ""
        if part.startswith(("[Visual", "[Audio", "[AUDet", "[AUPre")):
            size = "see the card"
        rows.append((part, given, made, size, grows, shown))
    header = ("Part", "You have", "You get", "Parameters", "Cost grows with", "Example")
    return table(header, rows)


# ------------------------------------------------------------------ encoders
def _visual() -> Sequence[tuple[str, str, Callable[[], nn.Module]]]:
    from mmau.encoders import VISUAL_ENCODERS, DINOv2Encoder, ViTEncoder
    from mmau.encoders.vision import DINOV2_ARCHITECTURES, VIT_ARCHITECTURES

    dinov2 = [
        (
            f"`dinov2`, `{name}`",
            "LoRA of rank 8",
            functools.partial(DINOv2Encoder.from_config, DINOV2_ARCHITECTURES[name], lora_rank=8),
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
    """Return the published sizes of the encoders, counted on models without memory.

    Args:
        kind: `"visual"` or `"audio"`.

    Returns:
        A Markdown table.

    Raises:
        ValueError: If the kind is neither.
    """
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
