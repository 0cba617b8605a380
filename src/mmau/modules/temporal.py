"""Models over time: one interface, one table of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.registry import Registry


def mask_from_lengths(lengths: Tensor, num_frames: int | None = None) -> Tensor:
    """Turn the number of frames of each clip into the mask that every temporal model takes.

    Args:
        lengths: `(b,)` integers, frames of each clip, at the beginning of its row.
        num_frames: Frames `t` of the padded batch, or `None` for the longest clip, which has to
            look at the values and cannot be traced by a compiler.

    Returns:
        `(b, t)` bool, True where there is a frame.

    Raises:
        TypeError: If `lengths` does not hold integers.
        ValueError: If a length is negative or above `num_frames`.

    Examples:
        >>> import torch
        >>> mask_from_lengths(torch.tensor([1, 3])).int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    check_shapes(lengths=(lengths, "b"))
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"`lengths` must hold integers; got dtype {lengths.dtype}.")
    if torch.compiler.is_compiling():
        if num_frames is None:
            raise ValueError("`num_frames` must be given inside of torch.compile; got None.")
    else:
        # Looked at here, because a mask that is silently too short would hide frames.
        least, most = (int(v) for v in lengths.aminmax()) if len(lengths) else (0, 0)
        num_frames = most if num_frames is None else num_frames
        if least < 0 or most > num_frames:
            raise ValueError(
                f"`lengths` must be in [0, {num_frames}], the number of frames; "
                f"got {least} to {most}."
            )
    return torch.arange(num_frames, device=lengths.device) < lengths.unsqueeze(1)


def zero_where_masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros where there is no frame: not by a product, since NaN times 0 is NaN."""
    if mask is None:
        return tensor
    return tensor.masked_fill(~mask.reshape(*mask.shape, *(1,) * (tensor.ndim - mask.ndim)), 0.0)


class TemporalModule(nn.Module):
    """Base class of the temporal models here, which a model of another package may use too."""

    _streaming_option: ClassVar[str] = "causal=True"

    def __init__(self, d_model: int, d_audio: int | None = None, *, causal: bool) -> None:
        super().__init__()
        check_range("d_model", d_model, 1)
        if d_audio is not None:
            check_range("d_audio", d_audio, 1)
        self.d_model = d_model
        self.d_audio = d_audio
        self.causal = causal

    def prepare(
        self,
        visual: Tensor,
        audio: Tensor | None,
        audio_mask: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check a clip and put zeros where nothing is; return visual, audio and the audio mask."""
        if audio is not None and self.d_audio is None:
            raise ValueError(
                f"`audio` must be None: this {type(self).__name__} was built with d_audio=None; "
                f"got a tensor {tuple(audio.shape)}."
            )
        if audio is None and audio_mask is not None:
            raise ValueError(
                "`audio_mask` must be None where `audio` is None; got a mask and no audio."
            )
        check_shapes(
            sizes={"d": self.d_model, "a": self.d_audio or 0},
            visual=(visual, "b t d"),
            audio=(audio, "b t a"),
            audio_mask=(audio_mask, "b t"),
            mask=(mask, "b t"),
        )
        check_mask("audio_mask", audio_mask)
        check_mask("mask", mask)
        if visual.shape[1] == 0:
            raise ValueError(f"`visual` must have at least one frame; got {tuple(visual.shape)}.")
        visual = zero_where_masked(visual, mask)
        if self.d_audio is None:
            return visual, None, None
        if audio is None:
            absent = visual.new_zeros(*visual.shape[:2], self.d_audio)
            return visual, absent, absent[..., 0].bool()
        if mask is not None:
            audio_mask = mask if audio_mask is None else mask & audio_mask
        return visual, zero_where_masked(audio, audio_mask), audio_mask

    def refuse_state(self, state: TemporalState) -> None:
        """Refuse a state that this model could not use."""
        if state is not None and not self.causal:
            raise ValueError(
                f"`state` must be None: this {type(self).__name__} reads a clip in both "
                "directions, so nothing can be carried on; build it with "
                f"{self._streaming_option} to stream."
            )

    def check_state_tuple(self, state: TemporalState, length: int) -> tuple[Tensor, ...] | None:
        """Check a state that is a tuple of tensors."""
        self.refuse_state(state)
        if state is None:
            return None
        if not isinstance(state, tuple) or len(state) != length:
            given = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
            raise TypeError(
                f"`state` must be the tuple of {length} tensors that the call before returned; "
                f"got {given}."
            )
        return state

    def step(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        state: TemporalState = None,
        *,
        audio_mask: Tensor | None = None,
    ) -> tuple[Tensor, TemporalState]:
        """Read one frame: what `forward` gives for a clip of one frame."""
        if not self.causal:
            raise ValueError(
                f"this {type(self).__name__} reads a clip in both directions and cannot go frame "
                f"by frame; build it with {self._streaming_option} to stream."
            )
        check_shapes(visual=(visual, "b d"), audio=(audio, "b a"), audio_mask=(audio_mask, "b"))
        out, state = self(
            visual.unsqueeze(1),
            None if audio is None else audio.unsqueeze(1),
            audio_mask=None if audio_mask is None else audio_mask.unsqueeze(1),
            state=state,
        )
        return out.squeeze(1), state


TemporalState: TypeAlias = "Tensor | tuple[Tensor, ...] | None"
"""What a causal model hands from one chunk of a video to the next; opaque to its callers."""


@runtime_checkable
class TemporalModel(Protocol):
    """A module that reads one visual vector per frame, and one audio vector if there is one.

    `mmau.modules.temporal.TemporalModule` is a base class with the checks and `step`; it is not
    compulsory.
    """

    d_model: int
    """Width of `visual` and of the output."""
    d_audio: int | None
    """Width of `audio`, or `None` for a model without audio."""
    causal: bool
    """Whether a frame depends on itself and the past alone; if so there is a state."""

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
            audio: `(b, t, a)`, audio at the same frames; `None` means absent everywhere.
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
    "mmau.modules.agssm:VisionMamba",
    summary="Stack of audio-guided selective state space blocks (the paper).",
)
TEMPORAL_MODELS.register_lazy(
    "tcn",
    "mmau.modules.baselines:TCN",
    summary="Dilated causal convolutions (the paper's baseline).",
)
TEMPORAL_MODELS.register_lazy(
    "transformer",
    "mmau.modules.baselines:TemporalTransformer",
    summary="Self-attention over time with linear distance biases.",
)
