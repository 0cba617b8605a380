"""Dilated causal convolutions over time: the baseline of the paper's ablation."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_range, check_shapes
from mmau.modules.temporal import TemporalState
from mmau.modules.temporal_module import TemporalModule, zero_where_masked

__all__ = ["TCN", "CausalConv"]


class CausalConv(nn.Module):
    """Convolution over time that sees only the past and remembers what it will need of it.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        kernel_size: Number of taps.
        dilation: Frames between two taps.

    Shape:
        - input: `(b, t, d_in)`
        - output: `(b, t, d_out)` and the last `(kernel_size - 1) * dilation` input frames

    Examples:
        >>> out, state = CausalConv(3, 5, kernel_size=2, dilation=4)(torch.ones(1, 6, 3))
        >>> tuple(out.shape), tuple(state.shape)
        ((1, 6, 5), (1, 4, 3))
    """

    def __init__(self, d_in: int, d_out: int, *, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.memory = (kernel_size - 1) * dilation
        self.d_in = d_in
        self.conv = nn.Conv1d(d_in, d_out, kernel_size, dilation=dilation)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve a clip, or the next piece of one.

        Args:
            x: `(b, t, d_in)`.
            mask: `(b, t)` bool, True where there is a frame; the others count as zeros.
            state: `(b, memory, d_in)`, the frames before, or `None` for zeros.

        Returns:
            The output `(b, t, d_out)` and the frames to remember.
        """
        x = zero_where_masked(x, mask)
        if state is None:
            joined = F.pad(x, (0, 0, self.memory, 0))
        else:
            joined = torch.cat([state.to(x.dtype), x], dim=1)
        out = self.conv(joined.transpose(1, 2)).transpose(1, 2)
        return out, joined[:, joined.shape[1] - self.memory :]


class TCN(TemporalModule):
    r"""Residual blocks of two dilated causal convolutions; the dilation doubles every block.

    A frame sees itself and the `receptive_field - 1` frames before it: $1 + 2 (k - 1)(2^{L} - 1)$
    frames for kernel size $k$ and $L$ blocks, 253 by default. The guide is concatenated to the
    visual stream and projected, once, at the entry. Norms are per frame, and the mask is applied
    before every convolution, so that padding and other clips cannot be seen.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the guide, or `None` for no guide.
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
        """Read a clip, or the next piece of one.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.
            mask: `(b, t)` bool, True where there is a frame; the output is 0 elsewhere.
            state: What the call on the frames before returned, or `None` at the beginning.

        Returns:
            The output `(b, t, d)` and the state after the last frame.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If a mask is not bool or the state is not such a tuple.
        """
        given = self.check_state_tuple(state, len(self.convs))
        states: tuple[Tensor | None, ...] = given or (None,) * len(self.convs)
        x, guide, _ = self.prepare(visual, audio, audio_mask, mask)
        for conv, past in zip(self.convs, states, strict=True):
            known = {"k": cast("int", conv.memory), "w": cast("int", conv.d_in)}
            check_shapes(sizes=known, visual=(visual, "b t d"), state=(past, "b k w"))
        if self.fuse is not None and guide is not None:
            x = self.fuse(torch.cat([x, guide], dim=-1))
        final = []
        for index, norm in enumerate(self.norms):
            first, second = self.convs[2 * index], self.convs[2 * index + 1]
            hidden, first_state = first(norm(x), mask, states[2 * index])
            added, second_state = second(F.gelu(hidden), mask, states[2 * index + 1])
            x = x + self.dropout(added)
            final += [first_state, second_state]
        return zero_where_masked(x, mask), tuple(final)
