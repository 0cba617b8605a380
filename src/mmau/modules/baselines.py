"""What the scan is compared with: dilated causal convolutions and a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.modules.temporal import TemporalModule, TemporalState, zero_where_masked


class CausalConv(nn.Module):
    """Convolution over the present and the past; its state is the past that it will read again."""

    def __init__(self, d_in: int, d_out: int, *, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.memory = (kernel_size - 1) * dilation
        self.d_in = d_in
        self.conv = nn.Conv1d(d_in, d_out, kernel_size, dilation=dilation)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve a clip, or the next chunk of one."""
        x = zero_where_masked(x, mask)
        if state is None:
            joined = F.pad(x, (0, 0, self.memory, 0))
        else:
            sizes = {"k": self.memory, "w": self.d_in}
            check_shapes(sizes=sizes, visual=(x, "b t w"), state=(state, "b k w"))
            joined = torch.cat([state.to(x.dtype), x], dim=1)
        out = self.conv(joined.transpose(1, 2)).transpose(1, 2)
        return out, joined[:, joined.shape[1] - self.memory :]


class TCN(TemporalModule):
    r"""Residual blocks of two dilated causal convolutions; the dilation doubles every block.

    A frame depends on itself and the `receptive_field - 1` frames before it,
    $1 + 2 (k - 1)(2^{L} - 1)$ frames for kernel size $k$ and $L$ blocks, 253 by default. Audio is
    concatenated to the visual stream and projected, once, at the entry. Norms are per frame, and
    the mask is applied before every convolution, so that padding and other clips have no influence.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the audio, or `None` for a model without audio.
        num_layers: Number of blocks; dilations are 1, 2, 4, ...
        d_hidden: Width between the two convolutions of a block.
        kernel_size: Taps of each convolution.
        dropout: Probability of dropping an entry of what a block adds to the stream, in [0, 1).

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state, two tensors of past frames per block

    Raises:
        ValueError: If an option is out of range.

    References:
        Row "baseline" of the ablation (Table 1) of the paper, which does not give its sizes.
        Bai et al., *An Empirical Evaluation of Generic Convolutional and Recurrent Networks*, 2018.

    Examples:
        >>> model = TCN(d_model=8, d_audio=4)
        >>> model.receptive_field
        253
        >>> out, state = model(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(out.shape), len(state)
        ((1, 5, 8), 12)
    """

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        *,
        num_layers: int = 6,
        d_hidden: int = 64,
        kernel_size: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, d_audio, causal=True)
        check_range("num_layers", num_layers, 1)
        check_range("d_hidden", d_hidden, 1)
        check_range("kernel_size", kernel_size, 1)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.fuse = None if d_audio is None else nn.Linear(d_model + d_audio, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))
        self.convs = nn.ModuleList()
        for dilation in (2**layer for layer in range(num_layers)):
            for d_in, d_out in ((d_model, d_hidden), (d_hidden, d_model)):
                self.convs.append(
                    CausalConv(d_in, d_out, kernel_size=kernel_size, dilation=dilation)
                )
        self.dropout = nn.Dropout(dropout)
        self.receptive_field = 1 + 2 * (kernel_size - 1) * (2**num_layers - 1)

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read a clip, or the next chunk of one, as in `TemporalModel`."""
        given = self.check_state_tuple(state, len(self.convs))
        states: tuple[Tensor | None, ...] = given or (None,) * len(self.convs)
        x, audio, _ = self.prepare(visual, audio, audio_mask, mask)
        if self.fuse is not None and audio is not None:
            x = self.fuse(torch.cat([x, audio], dim=-1))
        final = []
        for index, norm in enumerate(self.norms):
            first, second = self.convs[2 * index], self.convs[2 * index + 1]
            hidden, first_state = first(norm(x), mask, states[2 * index])
            added, second_state = second(F.gelu(hidden), mask, states[2 * index + 1])
            x = x + self.dropout(added)
            final += [first_state, second_state]
        return zero_where_masked(x, mask), tuple(final)


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and feed-forward layer that can carry keys and values over.

    There is no dropout on the attention weights: it would force the whole `(t, t)` matrix into
    memory, for 3.5 times the time on a CPU.
    """

    def __init__(
        self, d_model: int, num_heads: int, d_hidden: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.to_qkv = nn.Linear(d_model, 3 * d_model)
        self.to_out = nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_hidden),
            nn.GELU(),
            nn.Linear(d_hidden, d_model),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, bias: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend and transform."""
        q, k, v = rearrange(
            self.to_qkv(self.attention_norm(x)),
            "b t (three h e) -> three b h t e",
            three=3,
            h=self.num_heads,
        ).unbind(0)
        if past is not None:
            k = torch.cat([past[0].to(k.dtype), k], dim=2)
            v = torch.cat([past[1].to(v.dtype), v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.dropout(self.to_out(rearrange(mixed, "b h t e -> b t (h e)")))
        return x + self.dropout(self.feed_forward(x)), k, v


class TemporalTransformer(TemporalModule):
    r"""Transformer over frames that knows time by distance alone.

    Attention scores are lowered by $m_h |i - j|$ for frames $i$ and $j$, with the fixed slope $m_h
    = 2^{-8 h / H}$ of head $h = 1, \dots, H$: no position table, hence no longest clip. Causal, it
    carries keys and values as its state, which grows with the video unless `window` bounds it.
    Audio is concatenated to the visual stream and projected, once, at the entry. Memory is
    quadratic in the length of a clip.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the audio, or `None` for a model without audio.
        num_layers: Number of layers.
        num_heads: Attention heads, a divisor of `d_model`.
        d_hidden: Width of the feed-forward layers, `4 * d_model` if left out.
        dropout: Probability of dropping an entry of what is added to the stream, in [0, 1).
            Attention weights are never dropped.
        causal: Whether a frame attends to itself and the past alone.
        window: A frame attends to frames less than this many away (1 is itself alone); `None` is
            all.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state, `None` if not causal

    Raises:
        ValueError: If an option is out of range or `num_heads` does not divide `d_model`.

    References:
        Press et al., *Train Short, Test Long* (ALiBi), 2022, for the distance biases.

    Examples:
        >>> model = TemporalTransformer(d_model=8, d_audio=4, num_heads=2)
        >>> out, state = model(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(out.shape)
        (1, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        *,
        num_layers: int = 2,
        num_heads: int = 4,
        d_hidden: int | None = None,
        dropout: float = 0.0,
        causal: bool = True,
        window: int | None = None,
    ) -> None:
        super().__init__(d_model, d_audio, causal=causal)
        check_range("num_layers", num_layers, 1)
        check_range("num_heads", num_heads, 1)
        check_range("dropout", dropout, 0, 1, open_high=True)
        if d_model % num_heads:
            raise ValueError(f"`num_heads` must divide d_model = {d_model}; got {num_heads}.")
        if d_hidden is not None:
            check_range("d_hidden", d_hidden, 1)
        if window is not None:
            check_range("window", window, 1)
        self.window = window
        self.fuse = None if d_audio is None else nn.Linear(d_model + d_audio, d_model)
        self.layers = nn.ModuleList(
            AttentionBlock(d_model, num_heads, d_hidden or 4 * d_model, dropout=dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        slopes = torch.tensor([2.0 ** (-8.0 * h / num_heads) for h in range(1, num_heads + 1)])
        self.register_buffer("slopes", slopes, persistent=False)
        self.slopes: Tensor

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Read a clip, or the next chunk of one, as in `TemporalModel`."""
        states = self.check_state_tuple(state, 1 + 2 * len(self.layers))
        x, audio, _ = self.prepare(visual, audio, audio_mask, mask)
        visible = torch.ones_like(visual[..., 0], dtype=torch.bool) if mask is None else mask
        if states is not None:
            self._check_past(x, states)
            visible = torch.cat([states[0], visible], dim=1)
        if self.fuse is not None and audio is not None:
            x = self.fuse(torch.cat([x, audio], dim=-1))
        bias = self._bias(x, visible)
        # What no later frame can attend to is forgotten.
        keep = visible.shape[1] if self.window is None else min(visible.shape[1], self.window - 1)
        oldest = visible.shape[1] - keep
        final = [visible[:, oldest:]]
        for index, layer in enumerate(self.layers):
            past = None if states is None else (states[1 + 2 * index], states[2 + 2 * index])
            x, k, v = layer(x, bias, past)
            final += [k[:, :, oldest:], v[:, :, oldest:]]
        out = zero_where_masked(self.norm(x), mask)
        return out, tuple(final) if self.causal else None

    def _bias(self, x: Tensor, visible: Tensor) -> Tensor:
        """`(b, heads, t, s)`: minus slope times distance, `-inf` where a frame may not attend."""
        s, t = visible.shape[1], x.shape[1]
        key_time = torch.arange(s, device=x.device)
        behind = (key_time[s - t :, None] - key_time).float()
        distance = behind.abs()
        allowed = visible[:, None, :]
        if self.causal:
            allowed = allowed & (behind >= 0)
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        # A frame always attends to itself: a masked one that attended to nothing would be NaN.
        allowed = allowed | (behind == 0)
        bias = -self.slopes[:, None, None] * distance
        return bias.masked_fill(~allowed[:, None], float("-inf"))

    def _check_past(self, x: Tensor, states: tuple[Tensor, ...]) -> None:
        """Check what another model, or another batch, could have returned."""
        sizes = {"h": len(self.slopes), "e": self.d_model // len(self.slopes)}
        check_mask("state[0]", states[0])
        for past in states[1:]:
            check_shapes(
                sizes=sizes,
                visual=(x, "b t d"),
                visible=(states[0], "b s"),
                state=(past, "b h s e"),
            )
