"""The audio-guided selective state space model: selection, scan, residual block, stack."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.modules.temporal import (
    TemporalModule,
    TemporalState,
    zero_where_masked,
)
from mmau.scan.api import resolve_scan_backend, selective_scan
from mmau.scan.backend import GatedScanFunction, ScanBackend


class SelectionParameters(NamedTuple):
    """What `AudioGuidedSelection` returns, by the names of the paper."""

    delta: Tensor
    """`(b, t, d)`, step size in frames, positive."""
    B: Tensor
    """`(b, t, n)`, input projection."""
    C: Tensor
    """`(b, t, n)`, output projection."""
    gate: Tensor | None
    """`(b, t, d)`, gate of the audio on the visual input, in (0, 1), 1 where there is no audio;
    `None` for a selection by the visual features alone."""


class AudioGuidedSelection(nn.Module):
    r"""Turn aligned visual and audio features into the parameters of a selective scan.

    $$
    s_t = W_s [x^v_t \,\|\, x^a_t] + b_s, \quad
    \Delta_t = \text{softplus}(b_\Delta + W_\Delta s_t), \quad
    B_t = W_B s_t, \quad C_t = W_C s_t, \quad g_t = \sigma(W_g x^a_t)
    $$

    Where audio is absent, its part of $s_t$ is 0 and $g_t = 1$. Any features at the frames' times
    can take its place, of any width.

    Args:
        d_model: Width `d` of the visual features.
        d_audio: Width `a` of the audio, or `None` for a selection by the visual features alone.
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

    no_weight_decay: ClassVar = ("delta_bias",)

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
        self.reset_parameters()

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
        """Compute the parameters of every frame; `audio=None` means absent everywhere."""
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
        """Return step and gate before bias, softplus and sigmoid, for a kernel that applies them.

        The gate logit is `inf` where there is no audio, and `None` without `d_audio`.
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


def reverse_reset(reset: Tensor | None) -> Tensor | None:
    """Turn the first frames of packed sequences into those of the same sequences read backwards."""
    if reset is None:
        return None
    return torch.cat([torch.zeros_like(reset[:, :1]), reset.flip(1)[:, :-1]], dim=1)


def _flip(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flip(1)


class AGSSM(TemporalModule):
    r"""Carry a state over frames; audio selects what enters it, what it keeps and what is read.

    $$
    h_t = \bar A_t h_{t-1} + \bar B_t \bigl( x^v_t \odot \sigma(W_g x^a_t) \bigr), \qquad
    y_t = C_t h_t
    $$

    with $\Delta_t$, $B_t$, $C_t$ from `AudioGuidedSelection` and exact zero-order hold. $A$ is
    diagonal and negative, $A = -\exp(\texttt{A\_log})$, and starts as $-(1, \dots, n)$ in each
    channel. With `d_audio=None` this is a plain selective state space model. For a network layer
    with norm, projections and residual, or a stack of them, take `VisionMamba`.

    A masked frame is passed over: the state goes through it unchanged and the output there is 0.
    Nothing in it is read, NaN included. The scan runs in float32 under autocast.

    The recurrence gives the same bits whether a clip is read at once, in chunks or by `step`. The
    projections before it are matrix products whose last bit may depend on how many rows they have,
    so the outputs of the module agree to rounding (about 1e-6 in float32).

    `A_log`, `selection.delta_bias` and `D` are time constants and scales: the class lists them in
    `no_weight_decay`, which `mmau.training.parameter_groups` reads.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the audio, or `None` for a model without audio.
        d_state: State size `n` per channel.
        discretization: `"zoh"` (the paper) or `"euler"` (Mamba).
        backend: Name in `SCAN_BACKENDS`, a record, or `"auto"`; resolved here, once.
        bidirectional: Whether to add a second scan that reads the clip backwards. The module is
            then not causal and has no state.
        share_directions: Whether the scan that reads backwards has the same parameters as the
            other; by default it has its own. Without `bidirectional` there is nothing to share.
        skip: Whether to add the direct path `D x`, which the paper does not have.
        dt_range: Smallest and largest step size at initialisation, in frames.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state `(b, d, n)`

    Raises:
        ValueError: If an option is out of range or the backend does not offer the discretisation.
        UnknownComponentError: If there is no backend of that name.

    References:
        Section 3.3 of the paper. The initialisations are ours: S4D-real for $A$, Mamba's for
        $\Delta$.

    Examples:
        >>> model = AGSSM(d_model=8, d_audio=4)
        >>> out, state = model(torch.ones(1, 5, 8), torch.ones(1, 5, 4))
        >>> tuple(out.shape), tuple(state.shape)
        ((1, 5, 8), (1, 8, 16))
        >>> out, state = model.step(torch.ones(1, 8), torch.ones(1, 4), state)
        >>> tuple(out.shape)
        (1, 8)
    """

    _streaming_option: ClassVar[str] = "bidirectional=False"

    no_weight_decay: ClassVar = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        d_state: int = 16,
        *,
        discretization: Literal["zoh", "euler"] = "zoh",
        backend: str | ScanBackend = "auto",
        bidirectional: bool = False,
        share_directions: bool = False,
        skip: bool = False,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(d_model, d_audio, causal=not bidirectional)
        if share_directions and not bidirectional:
            raise ValueError(
                "`share_directions` must be False without `bidirectional`: there is one direction; "
                "got True."
            )
        self.share_directions = share_directions
        self.d_state = d_state
        self.discretization = discretization
        self.backend = resolve_scan_backend(backend)
        self.backend.check_discretization(discretization)
        self.selection = AudioGuidedSelection(d_model, d_audio, d_state, dt_range=dt_range)
        self.A_log = nn.Parameter(torch.empty(d_model, d_state))
        self.D = nn.Parameter(torch.empty(d_model)) if skip else None
        self.reversed_scan: AGSSM | None = None
        if bidirectional and not share_directions:
            self.reversed_scan = AGSSM(
                d_model,
                d_audio,
                d_state,
                discretization=discretization,
                backend=self.backend,
                skip=skip,
                dt_range=dt_range,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each channel with decay rates 1 to n; S4D-real."""
        with torch.no_grad():
            rates = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
            if self.D is not None:
                self.D.fill_(1.0)

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
        """Read a clip, or the next chunk of one, as in `TemporalModel`.

        The state is one tensor `(b, d, n)`, through which gradients flow; detach it to cut them.
        `reset` `(b, t)` bool is True at the first frame of each of several clips in one row.
        """
        self.refuse_state(state)
        if isinstance(state, tuple):
            raise TypeError("`state` must be one tensor (b, d, n); got tuple.")
        check_shapes(
            sizes={"d": self.d_model, "n": self.d_state},
            visual=(visual, "b t d"),
            state=(state, "b d n"),
            reset=(reset, "b t"),
        )
        check_mask("reset", reset)
        visual, audio, audio_mask = self.prepare(visual, audio, audio_mask, mask)
        run_gated = self.backend.run_gated
        if run_gated is not None and self.D is None and not self.share_directions:
            out, final = self._scan_gated(run_gated, visual, audio, audio_mask, state, mask, reset)
        else:
            delta, B, C, gate = self.selection(visual, audio, audio_mask=audio_mask)
            gated = visual if gate is None else visual * gate
            out, final = self._scan(gated, delta, B, C, state, mask, reset)
            if self.share_directions:
                # Selection and gate look at one frame each: they are the same in both directions.
                back, _ = self._scan(
                    gated.flip(1),
                    delta.flip(1),
                    B.flip(1),
                    C.flip(1),
                    state=None,
                    mask=_flip(mask),
                    reset=reverse_reset(reset),
                )
                out = out + back.flip(1)
        if self.reversed_scan is not None:
            # Masked frames leave the state alone, so padding at either end needs no shifting.
            back, _ = self.reversed_scan(
                visual.flip(1),
                _flip(audio),
                audio_mask=_flip(audio_mask),
                mask=_flip(mask),
                reset=reverse_reset(reset),
            )
            out = out + back.flip(1)
        return out, final if self.causal else None

    def _scan(
        self,
        gated: Tensor,
        delta: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return selective_scan(
            gated,
            delta,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            initial_state=state,
            mask=mask,
            reset=reset,
            discretization=self.discretization,
            return_state=True,
            backend=self.backend,
        )

    def _scan_gated(
        self,
        run: GatedScanFunction,
        visual: Tensor,
        audio: Tensor | None,
        audio_mask: Tensor | None,
        state: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Leave gate and softplus to the kernel of the scan."""
        delta_logits, B, C, gate_logits = self.selection.logits(
            visual, audio, audio_mask=audio_mask
        )
        self.backend.check(
            discretization=self.discretization,
            device=visual.device.type,
            dtype=self.A_log.dtype,
            state=True,
            reset=reset is not None,
        )
        if mask is not None:  # `prepare` has put zeros into the masked frames of `visual`
            masked = ~mask.unsqueeze(-1)
            C = C.masked_fill(masked, 0.0)
            delta_logits = delta_logits.masked_fill(masked, -torch.inf)
        return run(
            visual,
            delta_logits,
            self.selection.delta_bias,
            -torch.exp(self.A_log),
            B,
            C,
            gate_logits=gate_logits,
            initial_state=state,
            reset=reset,
            discretization=self.discretization,
        )

    def extra_repr(self) -> str:
        """Say what is not visible in the layers, the resolved backend above all."""
        return (
            f"{self.d_model}, d_audio={self.d_audio}, d_state={self.d_state}, "
            f"discretization={self.discretization!r}, backend={self.backend.name!r}, "
            f"bidirectional={not self.causal}, share_directions={self.share_directions}, "
            f"skip={self.D is not None}"
        )


class AGSSMBlock(nn.Module):
    """One layer of `VisionMamba`, whose page has the equation; `options` are those of `AGSSM`."""

    def __init__(
        self,
        d_model: int,
        d_audio: int | None = None,
        *,
        d_inner: int = 64,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_range("d_inner", d_inner, 1)
        check_range("dropout", dropout, 0, 1, open_high=True)
        self.norm = nn.LayerNorm(d_model)
        self.to_inner = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.ssm = AGSSM(d_inner, d_audio, **options)
        self.to_out = nn.Linear(d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, visual: Tensor, audio: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map `(b, t, d)`, 0 in masked frames, to the same; the rest is as in `AGSSM`."""
        u, z = self.to_inner(self.norm(visual)).chunk(2, dim=-1)
        y, final = self.ssm(F.silu(u), audio, **options)
        # No bias on the way out: where y is 0, in masked frames, nothing is added.
        return visual + self.dropout(self.to_out(y * F.silu(z))), final


class VisionMamba(TemporalModule):
    r"""Stack of residual layers around `AGSSM`, with a norm at the end.

    Each layer normalises, projects, scans, gates, projects back and adds:

    $$ [u, z] = W_{in} \, \text{norm}(x), \qquad
    \text{out} = x + W_{out} \bigl( \text{AGSSM}(\text{silu}(u), x^a) \odot \text{silu}(z) \bigr) $$

    Causal as it stands: a frame depends on itself and the past, memory and time per frame are
    constant, and a video may be read in chunks of any length. With `bidirectional=True` each layer
    also reads the clip backwards; then the whole clip is needed at once.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the audio, or `None` for a model without audio.
        num_layers: Number of layers.
        d_inner: Width of the scan in each layer: the "expanded state dimension" 64 of the paper.
        d_state: State size `n` per channel of the scan.
        dropout: Probability of dropping an entry of what a layer adds to the stream, in [0, 1).
        discretization: This and the following are options of each `AGSSM`.
        backend: Name in `SCAN_BACKENDS`, a record, or `"auto"`.
        bidirectional: Whether each layer also reads the clip backwards.
        share_directions: Whether both directions have the same parameters.
        skip: Whether the scans have the direct path `D x`.
        dt_range: Smallest and largest step size at initialisation, in frames.

    Shape:
        - visual: `(b, t, d)`
        - audio: `(b, t, a)`, one vector per video frame
        - output: `(b, t, d)` and the state, a tuple of `num_layers` tensors `(b, d_inner, n)`

    Raises:
        ValueError: If an option is out of range.

    References:
        The paper gives the scan (section 3.3) and its widths (4.1), not the number of layers; the
        layer around it is Mamba's without the convolution, which the paper does not mention.

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
        """Read a clip, or the next chunk of one, as in `TemporalModel`.

        The state is a tuple of one `(b, d_inner, n)` per layer. `reset` `(b, t)` bool is True at
        the first frame of each of several clips in one row.
        """
        states = self.check_state_tuple(state, len(self.layers))
        x, audio, audio_mask = self.prepare(visual, audio, audio_mask, mask)
        final = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(
                x,
                audio,
                audio_mask=audio_mask,
                mask=mask,
                state=None if states is None else states[index],
                reset=reset,
            )
            final.append(layer_state)
        out = zero_where_masked(self.norm(x), mask)
        return out, tuple(final) if self.causal else None
