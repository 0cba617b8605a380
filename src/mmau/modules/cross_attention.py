"""Cross-attention from video frames to the audio around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_mask, check_range, check_shapes
from mmau.functional.time_alignment import check_seconds, interpolate_features
from mmau.functional.windowed_attention import (
    WINDOWED_ATTENTION_IMPLEMENTATIONS,
    windowed_attention,
)


class AsymmetricCrossAttention(nn.Module):
    r"""Let each video frame attend to the audio around it, by time and not by index.

    $$ \text{context}_t = \sum_s A_{ts} V_s, \qquad
    A_{t \cdot} = \operatorname{softmax}_s \big( q_t k_s / \sqrt{d_h} - \alpha_h |\tau_t - \tau_s|
    \big), \quad |\tau_t - \tau_s| \le \text{window} $$

    Queries are visual, keys and values are audio: never the other way round. The slopes
    $\alpha_h$ are fixed, one per head. Every frame also attends to one learned null key, so a frame
    without audio, or a clip without any, gets a finite vector that does not depend on the image.

    Without visual features (`visual=None`) all frames have the same learned query, and the module
    carries audio from its own clock to that of the frames; `resampler` starts it as one.

    Args:
        d_model: Width `d` of the visual features and of the attention.
        d_audio: Width `a` of the audio features.
        num_heads: Number of attention heads, a divisor of `d_model`.
        window: Largest distance in time between a frame and audio that it attends to, in seconds.
        slopes: Decay of each head in nats per second, at least 0; from 4 to 1/32 with eight heads
            if left out.
        implementation: `"auto"`, `"dense"` or `"local"`, as in
            [windowed_attention][mmau.functional.windowed_attention].

    Shape:
        - visual: `(b, t, d)`, or `None` for one query for all frames
        - audio: `(b, s, a)`, or `None` for no audio
        - visual_time: `(b, t)` seconds
        - audio_time: `(b, s)` seconds on the same clock, in any order
        - audio_mask: `(b, s)` bool
        - output: `(b, t, d)`, the audio context of each frame, without a residual

    Raises:
        ValueError: If a width or the window is not positive, the heads do not divide `d_model`, or
            there is not one slope per head.

    References:
        Section 1 of the paper. The slopes follow Press et al., *ALiBi*, ICLR 2022; they are fixed
        because a learned slope needs the gradient of every score's bias.

    Examples:
        >>> attend = AsymmetricCrossAttention(d_model=16, d_audio=8, num_heads=2)
        >>> video, audio = torch.arange(5).view(1, 5) / 25, torch.arange(10).view(1, 10) / 50
        >>> attend(torch.randn(1, 5, 16), torch.randn(1, 10, 8), video, audio).shape
        torch.Size([1, 5, 16])
    """

    slopes: Tensor

    def __init__(
        self,
        d_model: int,
        d_audio: int,
        num_heads: int = 8,
        *,
        window: float = 1.0,
        slopes: Sequence[float] | None = None,
        implementation: Literal["auto", "dense", "local"] = "auto",
    ) -> None:
        super().__init__()
        check_range("d_model", d_model, 1)
        check_range("d_audio", d_audio, 1)
        check_range("window", window, 0, open_low=True)
        check_choice("implementation", implementation, WINDOWED_ATTENTION_IMPLEMENTATIONS)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                "`num_heads` must divide `d_model`; got "
                f"{num_heads} heads and a width of {d_model}."
            )
        if slopes is None:
            slopes = [4.0 * 2.0 ** (-8.0 * head / num_heads) for head in range(num_heads)]
        if len(slopes) != num_heads or not all(0 <= slope < math.inf for slope in slopes):
            raise ValueError(
                f"`slopes` must be {num_heads} finite numbers of at least 0, one per head; got "
                f"{list(slopes)}."
            )
        self.d_model, self.d_audio, self.num_heads = d_model, d_audio, num_heads
        self.window, self.implementation = window, implementation
        self.to_query = nn.Linear(d_model, d_model)
        self.to_key = nn.Linear(d_audio, d_model, bias=False)
        self.to_value = nn.Linear(d_audio, d_model)
        self.to_output = nn.Linear(d_model, d_model)
        self.null_key = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        self.null_value = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        self.register_buffer("slopes", torch.tensor(slopes).view(-1, 1, 1), persistent=False)

    @classmethod
    def resampler(
        cls, d_audio: int, num_heads: int = 1, *, rate: float = 50.0
    ) -> AsymmetricCrossAttention:
        r"""Build a module that starts as a resampler of audio features onto frames.

        Call it with `visual=None`. Before any training each frame gets the mean of the features
        near it with weights $e^{-2 r |\tau_t - \tau_s|}$, $r$ being their rate. A feature that
        grows steadily is read at the right time to a twentieth of a step or so; the nearest one
        would be half a step off. A frame without audio gets zero.

        Args:
            d_audio: Width of the features, and of the output.
            num_heads: Number of attention heads, a divisor of `d_audio`.
            rate: Features per second.

        Returns:
            A module of width `d_audio`; all of it can be trained further.

        Raises:
            ValueError: If the rate is not positive or the heads do not divide the width.

        Examples:
            >>> resample = AsymmetricCrossAttention.resampler(1, rate=50)
            >>> seconds = torch.arange(50).view(1, 50, 1) / 50  # a feature that tells the time
            >>> frames = torch.tensor([[0.2, 0.5]])
            >>> resample(None, seconds, frames, seconds[..., 0]).flatten()
            tensor([0.2000, 0.5000], grad_fn=...)
        """
        check_range("rate", rate, 0, open_low=True)
        module = cls(d_audio, d_audio, num_heads, window=5 / rate, slopes=[2.0 * rate] * num_heads)
        module.reset_to_resampler()
        return module

    @torch.no_grad()
    def reset_to_resampler(self) -> None:
        """Make weights depend on time only, and hand the features on as they are.

        Raises:
            ValueError: If `d_model` and `d_audio` differ.
        """
        if self.d_model != self.d_audio:
            raise ValueError(
                "a resampler hands features on as they are, so `d_model` and `d_audio` must be "
                f"equal; got {self.d_model} and {self.d_audio}."
            )
        for layer in (self.to_query, self.to_key):
            layer.weight.zero_()
        for layer in (self.to_value, self.to_output):
            layer.weight.copy_(torch.eye(self.d_model))
            layer.bias.zero_()
        # The score of the null key is -30: it has weight only where no other key has.
        width = self.d_model // self.num_heads
        self.to_query.bias.fill_(1.0)
        self.null_key.fill_(-30.0 / width**0.5)
        self.null_value.zero_()

    def forward(
        self,
        visual: Tensor | None,
        audio: Tensor | None,
        visual_time: Tensor,
        audio_time: Tensor | None,
        audio_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the audio context of each frame.

        Args:
            visual: `(b, t, d)`, or `None` for one learned query for all frames.
            audio: `(b, s, a)`, or `None` for a clip without audio.
            visual_time: `(b, t)` float32 or float64, seconds; a frame at NaN gets the null value.
            audio_time: `(b, s)` float32 or float64, seconds, centre of each audio feature.
            audio_mask: `(b, s)` bool, True for audio to use. What it excludes, NaN too, has no
                influence.

        Returns:
            `(b, t, d)`.

        Raises:
            TypeError: If the mask is not bool, or times are of low precision.
            ValueError: If a shape is wrong, or audio comes without its times.
        """
        if (audio is None) != (audio_time is None):
            missing = "audio_time" if audio_time is None else "audio"
            raise ValueError(f"`audio` and `audio_time` go together; `{missing}` is missing.")
        check_shapes(
            visual=(visual, "b t d"),
            audio=(audio, "b s a"),
            visual_time=(visual_time, "b t"),
            audio_time=(audio_time, "b s"),
            audio_mask=(audio_mask, "b s"),
            sizes={"d": self.d_model, "a": self.d_audio},
        )
        check_mask("audio_mask", audio_mask)
        check_seconds(visual_time=visual_time, audio_time=audio_time)
        if audio is None or audio_time is None:
            audio = self.null_key.new_zeros(visual_time.shape[0], 0, self.d_audio)
            audio_time, audio_mask = visual_time[:, :0], None
        if audio_mask is not None:
            # Before the projections: a gradient of zero does not stop a NaN.
            audio = torch.where(audio_mask.unsqueeze(-1), audio, 0.0)
        if visual is None:
            query = self.to_query.bias.expand(*visual_time.shape, -1)
        else:
            query = self.to_query(visual)
        key, value = self.to_key(audio), self.to_value(audio)
        context = windowed_attention(
            query.to(key.dtype),
            key,
            value,
            visual_time,
            audio_time,
            window=self.window,
            slopes=self.slopes.flatten(),
            null_key=self.null_key.flatten(),
            null_value=self.null_value.flatten(),
            key_mask=audio_mask,
            implementation=self.implementation,
        )
        out: Tensor = self.to_output(context)
        return out

    def attend_by_blocks(
        self,
        visual: Tensor,
        audio: Tensor,
        visual_time: Tensor,
        audio_time: Tensor,
        audio_mask: Tensor | None = None,
        *,
        block: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """Attend block of frames by block, so that memory does not grow with the video.

        A frame attends to nothing outside the window, so that the result is that of `forward`.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, s, a)`.
            visual_time: `(b, t)` seconds.
            audio_time: `(b, s)` seconds, ascending.
            audio_mask: `(b, s)` bool, True for audio to use.
            block: Frames at a time; a clip of training is one block.

        Returns:
            Context `(b, t, d)`, and `(b, t)` bool, True where a frame has audio within the window.
        """
        _, has_audio = interpolate_features(
            audio[..., :1].detach(),
            audio_time,
            visual_time,
            feature_mask=audio_mask,
            max_gap=self.window,
        )
        if visual.shape[1] <= block:
            context: Tensor = self(visual, audio, visual_time, audio_time, audio_mask)
            return context, has_audio
        contexts = []
        for start in range(0, visual.shape[1], block):
            frames = slice(start, start + block)
            times = visual_time[:, frames]
            earliest = torch.nan_to_num(times, nan=torch.inf).amin() - self.window
            latest = torch.nan_to_num(times, nan=-torch.inf).amax() + self.window
            near = ((audio_time >= earliest) & (audio_time <= latest)).any(0).nonzero().flatten()
            first, last = (int(near[0]), int(near[-1]) + 1) if len(near) else (0, 0)
            contexts.append(
                self(
                    visual[:, frames],
                    audio[:, first:last],
                    times,
                    audio_time[:, first:last],
                    None if audio_mask is None else audio_mask[:, first:last],
                )
            )
        return torch.cat(contexts, dim=1), has_audio

    def extra_repr(self) -> str:
        """Widths, heads, window and implementation, as `print` shows them."""
        return (
            f"d_model={self.d_model}, d_audio={self.d_audio}, num_heads={self.num_heads}, "
            f"window={self.window:g} s, implementation={self.implementation!r}"
        )
