"""The audio-guided selective state space model of the paper, without anything around it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from mmau._checks import check_mask, check_shapes
from mmau.functional.selective_scan import (
    GatedScanFunction,
    ScanBackend,
    resolve_scan_backend,
    selective_scan,
)
from mmau.modules.audio_guided_selection import AudioGuidedSelection, SelectionParameters
from mmau.modules.temporal import TemporalState
from mmau.modules.temporal_module import TemporalModule, exempt_from_weight_decay

__all__ = ["AGSSM", "reverse_reset"]


def reverse_reset(reset: Tensor | None) -> Tensor | None:
    """Turn the first frames of packed sequences into those of the same sequences read backwards.

    Args:
        reset: `(b, t)` bool, True at the first frame of a sequence, or `None`.

    Returns:
        `(b, t)` bool in reversed time: True at what was the last frame of a sequence.

    Examples:
        >>> reverse_reset(torch.tensor([[True, False, False, True]])).int()
        tensor([[0, 1, 0, 0]], dtype=torch.int32)
    """
    if reset is None:
        return None
    return torch.cat([torch.zeros_like(reset[:, :1]), reset.flip(1)[:, :-1]], dim=1)


class AGSSM(TemporalModule):
    r"""Carry a memory over frames; the sound tells it what to let in, to keep and to give.

    $$
    h_t = \bar A_t h_{t-1} + \bar B_t \bigl( x^v_t \odot \sigma(W_g x^a_t) \bigr), \qquad
    y_t = C_t h_t
    $$

    with $\Delta_t$, $B_t$, $C_t$ from `AudioGuidedSelection` and exact zero-order hold. $A$ is
    diagonal and negative, $A = -\exp(\texttt{A\_log})$, and starts as $-(1, \dots, n)$ in each
    channel. With `d_audio=None` this is a plain selective state space model. For a network layer
    with norm, projections and residual take `AGSSMBlock`, for a stack of them `VisionMamba`.

    A masked frame is passed over: the state goes through it unchanged and the output there is 0.
    Nothing in it is read, NaN included. The scan runs in float32 under autocast.

    The recurrence gives the same bits whether a clip is read at once, in pieces or by `step`. The
    projections before it are matrix products whose last bit may depend on how many rows they have,
    so the outputs of the module agree to rounding (about 1e-6 in float32).

    `A_log`, `selection.delta_bias` and `D` are time constants and scales: they carry
    `parameter._no_weight_decay = True`, for whoever builds the optimiser.

    Args:
        d_model: Width `d` of the visual stream and of the output.
        d_audio: Width `a` of the guide, or `None` for no guide.
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
        self._exempt_parameters()
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._exempt_parameters()  # copy.deepcopy drops the marks

    def _exempt_parameters(self) -> None:
        for parameter in (self.A_log, self.D):
            if parameter is not None:
                exempt_from_weight_decay(parameter)

    def reset_parameters(self) -> None:
        """Start each channel with decay rates 1 to n; S4D-real."""
        with torch.no_grad():
            rates = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
            if self.D is not None:
                self.D.fill_(1.0)

    @overload
    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = ...,
        *,
        audio_mask: Tensor | None = ...,
        mask: Tensor | None = ...,
        state: TemporalState = ...,
        reset: Tensor | None = ...,
        return_selection: Literal[False] = ...,
    ) -> tuple[Tensor, Tensor | None]: ...

    @overload
    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = ...,
        *,
        audio_mask: Tensor | None = ...,
        mask: Tensor | None = ...,
        state: TemporalState = ...,
        reset: Tensor | None = ...,
        return_selection: Literal[True],
    ) -> tuple[Tensor, Tensor | None, SelectionParameters]: ...

    def forward(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: TemporalState = None,
        reset: Tensor | None = None,
        return_selection: bool = False,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, SelectionParameters]:
        """Read a clip, or the next piece of one.

        Args:
            visual: `(b, t, d)`.
            audio: `(b, t, a)`; `None` means absent everywhere.
            audio_mask: `(b, t)` bool, True where there is audio; the gate is 1 elsewhere.
            mask: `(b, t)` bool, True where there is a frame.
            state: `(b, d, n)`, what the call on the frames before returned. Gradients flow through
                it; detach it to cut them.
            reset: `(b, t)` bool, True at the first frame of each of several clips in one row.
            return_selection: Whether to return the `SelectionParameters` too (of the forward scan).

        Returns:
            The output `(b, t, d)` and the state `(b, d, n)`, which is `None` if bidirectional.

        Raises:
            ValueError: If shapes do not fit, or a state is given to a bidirectional module.
            TypeError: If a mask is not bool or the state is not a tensor.
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
        visual, audio, present = self.prepare(visual, audio, audio_mask, mask)
        fused = self.fused_scan
        if fused is not None and not return_selection:
            out, final = self._scan_fused(fused, visual, audio, present, state, mask, reset)
        else:
            selection = self.selection(visual, audio, audio_mask=present)
            gated = visual if selection.gate is None else visual * selection.gate
            out, final = self._scan(gated, selection, state, mask, reset)
        final_state: Tensor | None = None if self.share_directions else final
        if self.share_directions:
            # Selection and gate look at one frame each, so they are the same in both directions.
            back, _ = self._scan(
                gated.flip(1),
                SelectionParameters(
                    selection.delta.flip(1), selection.B.flip(1), selection.C.flip(1), None
                ),
                None,
                None if mask is None else mask.flip(1),
                reverse_reset(reset),
            )
            out = out + back.flip(1)
        elif self.reversed_scan is not None:
            # Masked frames leave the state alone, so padding at either end needs no shifting.
            flipped = (None if t is None else t.flip(1) for t in (visual, audio, present, mask))
            back_visual, back_audio, back_present, back_mask = flipped
            back, _ = self.reversed_scan(
                back_visual,
                back_audio,
                audio_mask=back_present,
                mask=back_mask,
                reset=reverse_reset(reset),
            )
            out = out + back.flip(1)
            final_state = None
        return (out, final_state, selection) if return_selection else (out, final_state)

    def _scan(
        self,
        gated: Tensor,
        selection: SelectionParameters,
        state: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return selective_scan(
            gated,
            selection.delta,
            -torch.exp(self.A_log),
            selection.B,
            selection.C,
            D=self.D,
            initial_state=state,
            mask=mask,
            reset=reset,
            discretization=self.discretization,
            return_state=True,
            backend=self.backend,
        )

    @property
    def fused_scan(self) -> GatedScanFunction | None:
        """What computes gate, softplus and scan in one kernel, where the backend has such a one."""
        composed = self.D is not None or self.share_directions
        return None if composed else self.backend.run_gated

    def _scan_fused(
        self,
        run: GatedScanFunction,
        visual: Tensor,
        audio: Tensor | None,
        present: Tensor | None,
        state: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        delta_logits, B, C, gate_logits = self.selection.logits(visual, audio, audio_mask=present)
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
