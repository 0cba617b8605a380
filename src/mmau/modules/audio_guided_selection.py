"""The parameters of a selective scan, computed from what is seen and what is heard."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.modules.temporal_module import exempt_from_weight_decay, zero_where_masked

__all__ = ["AudioGuidedSelection", "SelectionParameters"]


class SelectionParameters(NamedTuple):
    """What `AudioGuidedSelection` returns, by the names of the paper."""

    delta: Tensor
    """`(b, t, d)`, step size in frames, positive."""
    B: Tensor
    """`(b, t, n)`, input projection."""
    C: Tensor
    """`(b, t, n)`, output projection."""
    gate: Tensor | None
    """`(b, t, d)`, gate of the guide on the visual input, in (0, 1), 1 where the guide is absent;
    `None` for a selection without a guide."""


class AudioGuidedSelection(nn.Module):
    r"""Turn aligned visual and audio features into the parameters of a selective scan.

    $$
    s_t = W_s [x^v_t \,\|\, x^a_t] + b_s, \quad
    \Delta_t = \text{softplus}(b_\Delta + W_\Delta s_t), \quad
    B_t = W_B s_t, \quad C_t = W_C s_t, \quad g_t = \sigma(W_g x^a_t)
    $$

    Where the guide is absent, its part of $s_t$ is 0 and $g_t = 1$. The guide need not be audio:
    any features at the frames' times do, of any width.

    Args:
        d_model: Width `d` of the visual features.
        d_audio: Width `a` of the guide, or `None` for a selection by the visual features alone.
        d_state: State size `n` per channel.
        dt_range: Smallest and largest step size at initialisation, in frames: a state of decay rate
            1 remembers about `1 / step` frames.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - audio_mask: `(b, t)` bool, True where there is audio
        - output: `SelectionParameters`

    Raises:
        ValueError: If a size is not positive or `dt_range` is not `0 < low <= high`.

    References:
        Section 3.3 of the paper. That $b_\Delta$ makes the first steps log-uniform in `dt_range` is
        our choice and follows Gu and Dao, *Mamba*, 2023, as do $W_B$ and $W_C$ without a bias.

    Examples:
        >>> select = AudioGuidedSelection(d_model=8, d_audio=4, d_state=2)
        >>> parameters = select(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(parameters.delta.shape), tuple(parameters.B.shape), tuple(parameters.gate.shape)
        ((1, 5, 8), (1, 5, 2), (1, 5, 8))
    """

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        d_state: int = 16,
        *,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        check_range("d_model", d_model, 1)
        check_range("d_state", d_state, 1)
        if not 0 < dt_range[0] <= dt_range[1]:
            raise ValueError(f"`dt_range` must be 0 < low <= high, in frames; got {dt_range}.")
        self.d_model = d_model
        self.d_audio = d_audio
        self.dt_range = dt_range
        self.fuse = nn.Linear(d_model + (d_audio or 0), d_model)
        self.to_delta = nn.Linear(d_model, d_model, bias=False)
        self.delta_bias = nn.Parameter(torch.empty(d_model))
        self.to_B = nn.Linear(d_model, d_state, bias=False)
        self.to_C = nn.Linear(d_model, d_state, bias=False)
        self.to_gate = None if d_audio is None else nn.Linear(d_audio, d_model, bias=False)
        exempt_from_weight_decay(self.delta_bias)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        exempt_from_weight_decay(self.delta_bias)  # copy.deepcopy drops the mark

    def reset_parameters(self) -> None:
        """Draw the steps log-uniformly, so that memories of all lengths are there to begin with."""
        low, high = (math.log(step) for step in self.dt_range)
        with torch.no_grad():
            step = torch.empty_like(self.delta_bias).uniform_(low, high).exp_()
            # The inverse of softplus, in the form that keeps its digits for small steps.
            self.delta_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, visual: Tensor, audio: Tensor | None = None, *, audio_mask: Tensor | None = None
    ) -> SelectionParameters:
        """Compute the parameters of every frame.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.

        Returns:
            Step, projections and gate.

        Raises:
            ValueError: If shapes do not fit, or there is audio and `d_audio` is `None`.
            TypeError: If `audio_mask` is not bool.
        """
        delta_logits, B, C, gate_logits = self.logits(visual, audio, audio_mask=audio_mask)
        return SelectionParameters(
            delta=F.softplus(delta_logits + self.delta_bias),
            B=B,
            C=C,
            gate=None if gate_logits is None else torch.sigmoid(gate_logits),
        )

    def logits(
        self, visual: Tensor, audio: Tensor | None = None, *, audio_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute what a kernel turns into step and gate by itself.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio.

        Returns:
            Step before bias and softplus `(b, t, d)`, `B` and `C` `(b, t, n)`, and the gate before
            the sigmoid `(b, t, d)`: `inf` where there is no audio, `None` without `d_audio`.

        Raises:
            ValueError: If shapes do not fit, or there is audio and `d_audio` is `None`.
            TypeError: If `audio_mask` is not bool.
        """
        sizes = {"d": self.d_model, "a": self.d_audio or 0}
        check_shapes(
            sizes=sizes,
            visual=(visual, "b t d"),
            audio=(audio, "b t a"),
            audio_mask=(audio_mask, "b t"),
        )
        check_mask("audio_mask", audio_mask)
        gate_logits = None
        fused = visual
        if self.to_gate is not None:
            if audio is None:
                audio = visual.new_zeros(*visual.shape[:2], self.to_gate.in_features)
                audio_mask = torch.zeros_like(audio[..., 0], dtype=torch.bool)
            audio = zero_where_masked(audio, audio_mask)
            gate_logits = self.to_gate(audio)
            if audio_mask is not None:
                gate_logits = gate_logits.masked_fill(~audio_mask.unsqueeze(-1), math.inf)
            fused = torch.cat([visual, audio], dim=-1)
        s = self.fuse(fused)
        # The bias decides the time scale, over decades: it is added in its own precision, also
        # where autocast made the projection a half-precision one.
        delta_logits = self.to_delta(s).to(self.delta_bias.dtype)
        return delta_logits, self.to_B(s), self.to_C(s), gate_logits

    def extra_repr(self) -> str:
        """Say what is not visible in the layers."""
        return f"dt_range={self.dt_range}"
