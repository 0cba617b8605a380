"""Models over time: one interface, one table of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from mmau.registry import Registry

__all__ = ["TEMPORAL_MODELS", "TemporalModel", "TemporalState"]

TemporalState: TypeAlias = "Tensor | tuple[Tensor, ...] | None"
"""What a causal model hands from one piece of a video to the next; opaque to everyone else."""


@runtime_checkable
class TemporalModel(Protocol):
    """A module that reads one visual vector per frame, and a guide if there is one.

    `mmau.modules.TemporalModule` is a base class with the checks and `step`; it is not compulsory.
    """

    d_model: int
    """Width of `visual` and of the output."""
    d_audio: int | None
    """Width of `audio`, or `None` for a model that takes no guide."""
    causal: bool
    """Whether a frame sees only itself and the past; if so there is a state."""

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
    ) -> tuple[Tensor, TemporalState]:
        """Map `(b, t, d)` to `(b, t, d)` and return the state after the last frame.

        Args:
            visual: `(b, t, d)`, one vector per frame.
            audio: `(b, t, a)`, the guide at the same frames; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.
            mask: `(b, t)` bool, True where there is a frame; the output is 0 elsewhere.
            state: What the call on the frames before returned, or `None` at the beginning.

        Returns:
            The output, and the state (`None` if the model is not causal).
        """


TEMPORAL_MODELS: Registry[Callable[..., TemporalModel]] = Registry(
    "temporal model", group="mmau.temporal_models"
)
TEMPORAL_MODELS.register_lazy(
    "agssm",
    "mmau.modules.vision_mamba:VisionMamba",
    summary="Stack of audio-guided selective state space blocks (the paper).",
)
TEMPORAL_MODELS.register_lazy(
    "tcn",
    "mmau.modules.tcn:TCN",
    summary="Dilated causal convolutions (the paper's baseline).",
)
TEMPORAL_MODELS.register_lazy(
    "transformer",
    "mmau.modules.temporal_transformer:TemporalTransformer",
    summary="Self-attention over time with linear distance biases.",
)
