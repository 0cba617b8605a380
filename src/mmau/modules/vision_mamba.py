"""A stack of audio-guided state space blocks: the temporal model of the paper."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mmau._checks import check_range
from mmau.functional.selective_scan import ScanBackend
from mmau.modules.agssm_block import AGSSMBlock
from mmau.modules.temporal import TemporalState
from mmau.modules.temporal_module import TemporalModule, zero_where_masked

__all__ = ["VisionMamba"]


class VisionMamba(TemporalModule):
    r"""Stack of `AGSSMBlock` layers with a norm at the end.

    Causal as it stands: a frame sees itself and the past, memory and time per frame are constant,
    and a video may be read in pieces of any length. With `bidirectional=True` each layer also reads
    the clip backwards, with parameters of its own unless `share_directions`; then the whole clip is
    needed at once.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the guide, or `None` for no guide.
        num_layers: Number of blocks.
        d_inner: Width of the scan in each block.
        d_state: State size `n` per channel of the scan.
        dropout: Probability of dropping an entry of what a block adds to the stream, in [0, 1).
        discretization: `"zoh"` (the paper) or `"euler"` (Mamba).
        backend: Name in `SCAN_BACKENDS`, a record, or `"auto"`.
        bidirectional: Whether each block also reads the clip backwards.
        share_directions: Whether both directions have the same parameters; needs
            `bidirectional`.
        skip: Whether the scans have the direct path `D x`.
        dt_range: Smallest and largest step size at initialisation, in frames.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state, a tuple of `num_layers` tensors `(b, d_inner, n)`

    Raises:
        ValueError: If an option is out of range.

    References:
        Sections 3.3 and 4.1 of the paper, which do not give the number of layers.

    Examples:
        >>> import torch
        >>> model = VisionMamba(d_model=8, d_audio=4, num_layers=2)
        >>> out, state = model(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(out.shape), len(state)
        ((1, 5, 8), 2)
    """

    _streaming_option: ClassVar[str] = "bidirectional=False"

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        *,
        num_layers: int = 2,
        d_inner: int = 64,
        d_state: int = 16,
        dropout: float = 0.0,
        discretization: Literal["zoh", "euler"] = "zoh",
        backend: str | ScanBackend = "auto",
        bidirectional: bool = False,
        share_directions: bool = False,
        skip: bool = False,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(d_model, d_audio, causal=not bidirectional)
        check_range("num_layers", num_layers, 1)
        self.layers = nn.ModuleList(
            AGSSMBlock(
                d_model,
                d_audio,
                d_inner=d_inner,
                d_state=d_state,
                dropout=dropout,
                discretization=discretization,
                backend=backend,
                bidirectional=bidirectional,
                share_directions=share_directions,
                skip=skip,
                dt_range=dt_range,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Read a clip, or the next piece of one.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.
            mask: `(b, t)` bool, True where there is a frame; the output is 0 elsewhere.
            state: Tuple of one `(b, d_inner, n)` per layer, what the call on the frames before
                returned.
            reset: `(b, t)` bool, True at the first frame of each of several clips in one row.

        Returns:
            The output `(b, t, d)` and the state, which is `None` if bidirectional.

        Raises:
            ValueError: If shapes do not fit, or a state is given to a bidirectional model.
            TypeError: If a mask is not bool or the state is not such a tuple.
        """
        states = self.check_state_tuple(state, len(self.layers))
        x, audio, present = self.prepare(visual, audio, audio_mask, mask)
        final = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(
                x,
                audio,
                audio_mask=present,
                mask=mask,
                state=None if states is None else states[index],
                reset=reset,
            )
            final.append(layer_state)
        out = zero_where_masked(self.norm(x), mask)
        return out, tuple(final) if self.causal else None
