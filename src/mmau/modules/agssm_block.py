"""One residual layer around the audio-guided selective state space model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_range
from mmau.functional.selective_scan import ScanBackend
from mmau.modules.agssm import AGSSM
from mmau.modules.temporal import TemporalState
from mmau.modules.temporal_module import TemporalModule

__all__ = ["AGSSMBlock"]


class AGSSMBlock(TemporalModule):
    r"""Normalise, project, scan, gate, project back, add: a layer to stack.

    $$ [u, z] = W_{in} \, \text{norm}(x), \qquad
    \text{out} = x + W_{out} \bigl( \text{AGSSM}(\text{silu}(u), x^a) \odot \text{silu}(z) \bigr) $$

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the guide, or `None` for no guide.
        d_inner: Width of the scan: the "expanded state dimension" 64 of the paper.
        d_state: State size `n` per channel of the scan.
        dropout: Probability of dropping an entry of what is added to the stream, in [0, 1).
        discretization: `"zoh"` (the paper) or `"euler"` (Mamba).
        backend: Name in `SCAN_BACKENDS`, a record, or `"auto"`.
        bidirectional: Whether to add a scan that reads the clip backwards.
        share_directions: Whether both directions have the same parameters; needs
            `bidirectional`.
        skip: Whether the scan has the direct path `D x`.
        dt_range: Smallest and largest step size at initialisation, in frames.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state `(b, d_inner, n)`

    Raises:
        ValueError: If an option is out of range.

    References:
        The paper gives the scan (section 3.3) and its widths (4.1); the layer around it is Mamba's
        without the convolution, which the paper does not mention.

    Examples:
        >>> import torch
        >>> block = AGSSMBlock(d_model=8, d_audio=4)
        >>> out, state = block(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(out.shape), tuple(state.shape)
        ((1, 5, 8), (1, 64, 16))
    """

    _streaming_option: ClassVar[str] = "bidirectional=False"

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        *,
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
        check_range("d_inner", d_inner, 1)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.norm = nn.LayerNorm(d_model)
        self.to_inner = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.ssm = AGSSM(
            d_inner,
            d_audio,
            d_state,
            discretization=discretization,
            backend=backend,
            bidirectional=bidirectional,
            share_directions=share_directions,
            skip=skip,
            dt_range=dt_range,
        )
        self.to_out = nn.Linear(d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Read a clip, or the next piece of one.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.
            mask: `(b, t)` bool, True where there is a frame; the output is 0 elsewhere.
            state: `(b, d_inner, n)`, what the call on the frames before returned.
            reset: `(b, t)` bool, True at the first frame of each of several clips in one row.

        Returns:
            The output `(b, t, d)` and the state, which is `None` if bidirectional.

        Raises:
            ValueError: If shapes do not fit, or a state is given to a bidirectional module.
            TypeError: If a mask is not bool or the state is not a tensor.
        """
        self.refuse_state(state)
        visual, audio, present = self.prepare(visual, audio, audio_mask, mask)
        u, z = self.to_inner(self.norm(visual)).chunk(2, dim=-1)
        y, final = self.ssm(
            F.silu(u), audio, audio_mask=present, mask=mask, state=state, reset=reset
        )
        # No bias on the way out: where y is 0, in masked frames, nothing is added.
        out = visual + self.dropout(self.to_out(y * F.silu(z)))
        return out, final
