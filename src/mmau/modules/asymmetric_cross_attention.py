"""Visual queries retrieve audio context around each frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes

__all__ = ["AsymmetricCrossAttention"]


class AsymmetricCrossAttention(nn.Module):
    r"""Let each video frame attend to the sound around it, by time and not by index.

    $$ \text{context}_t = \sum_s A_{ts} V_s, \qquad
    A_{t \cdot} = \operatorname{softmax}_s \big( q_t k_s / \sqrt{d_h} - \alpha_h |\tau_t - \tau_s|
    \big), \quad |\tau_t - \tau_s| \le \text{window} $$

    Queries are visual, keys and values are audio: never the other way round. The slopes
    $\alpha_h$ are fixed, one per head, from 4 to 1/32 nats per second with eight heads. Every
    frame also sees one learned null key, so a frame without sound, or a clip without any, gets a
    finite vector that does not depend on the picture.

    Args:
        d_model: Width `d` of the visual features and of the attention.
        d_audio: Width `a` of the audio features.
        num_heads: Number of attention heads, a divisor of `d_model`.
        window: How far a frame listens, before and after it, in seconds.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, s, a)`, or `None` for no sound
        - visual_time: `(b, t)` seconds
        - audio_time: `(b, s)` seconds on the same clock, in any order
        - audio_mask: `(b, s)` bool
        - output: `(b, t, d)`, the audio context of each frame, without a residual

    Raises:
        ValueError: If a width or the window is not positive, or the heads do not divide `d_model`.

    References:
        Section 1 of the paper. The slopes follow Press et al., *ALiBi*, ICLR 2022.

    Examples:
        >>> attend = AsymmetricCrossAttention(d_model=16, d_audio=8, num_heads=2)
        >>> video, audio = torch.arange(5).view(1, 5) / 25, torch.arange(10).view(1, 10) / 50
        >>> attend(torch.randn(1, 5, 16), torch.randn(1, 10, 8), video, audio).shape
        torch.Size([1, 5, 16])
    """

    slopes: Tensor

    def __init__(
        self, d_model: int, d_audio: int, num_heads: int = 8, *, window: float = 1.0
    ) -> None:
        super().__init__()
        check_range("d_model", d_model, 1)
        check_range("d_audio", d_audio, 1)
        check_range("window", window, 0, open_low=True)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                "`num_heads` must divide `d_model`; got "
                f"{num_heads} heads and a width of {d_model}."
            )
        self.d_model, self.d_audio, self.num_heads, self.window = (
            d_model,
            d_audio,
            num_heads,
            window,
        )
        self.to_query = nn.Linear(d_model, d_model)
        self.to_key = nn.Linear(d_audio, d_model, bias=False)
        self.to_value = nn.Linear(d_audio, d_model)
        self.to_output = nn.Linear(d_model, d_model)
        self.null_key = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        self.null_value = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        # Fixed: a learned slope would need the gradient of a (b, heads, t, s) bias.
        slopes = 4.0 * 2.0 ** (-8.0 * torch.arange(num_heads) / num_heads)
        self.register_buffer("slopes", slopes.view(num_heads, 1, 1), persistent=False)

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None,
        visual_time: Tensor,
        audio_time: Tensor | None,
        audio_mask: Tensor | None = None,
    ) -> Tensor:
        """Retrieve the audio context of each frame.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, s, a)`, or `None` for a clip without sound.
            visual_time: `(b, t)` float32 or float64, seconds.
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
        if audio is None or audio_time is None:
            audio = visual.new_zeros(visual.shape[0], 0, self.d_audio)
            audio_time, audio_mask = visual_time[:, :0], None
        check_shapes(
            visual=(visual, "b t d"),
            audio=(audio, "b s a"),
            visual_time=(visual_time, "b t"),
            audio_time=(audio_time, "b s"),
            audio_mask=(audio_mask, "b s"),
            sizes={"d": self.d_model, "a": self.d_audio},
        )
        check_mask("audio_mask", audio_mask)
        for name, times in (("visual_time", visual_time), ("audio_time", audio_time)):
            if times.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"`{name}` must be float32 or float64 seconds; got {times.dtype}.")
        if audio_mask is not None:
            # Before the projections: attention weights of zero do not stop a NaN.
            audio = torch.where(audio_mask.unsqueeze(-1), audio, 0.0)

        query = self._split(self.to_query(visual))
        key = self._with_null(self._split(self.to_key(audio)), self.null_key)
        value = self._with_null(self._split(self.to_value(audio)), self.null_value)
        bias = self._bias(visual_time, audio_time, audio_mask).to(query.dtype)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.to_output(context.transpose(1, 2).flatten(-2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.d_model // self.num_heads).transpose(1, 2)

    def _with_null(self, x: Tensor, null: Tensor) -> Tensor:
        return torch.cat((null.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), dim=2)

    def _bias(self, visual_time: Tensor, audio_time: Tensor, audio_mask: Tensor | None) -> Tensor:
        """`(b, heads, t, 1 + s)`: what to add to the scores; 0 for the null key."""
        # The difference of two long clocks, taken before the precision is lowered.
        distance = (visual_time.unsqueeze(2).double() - audio_time.unsqueeze(1).double()).abs()
        heard = distance <= self.window
        if audio_mask is not None:
            heard = heard & audio_mask.unsqueeze(1)
        bias = -self.slopes.float() * distance.float().unsqueeze(1)
        return F.pad(bias.masked_fill(~heard.unsqueeze(1), -torch.inf), (1, 0), value=0.0)

    def extra_repr(self) -> str:
        """Widths, heads and window, as `print` shows them."""
        return (
            f"d_model={self.d_model}, d_audio={self.d_audio}, num_heads={self.num_heads}, "
            f"window={self.window:g} s"
        )
