"""The fused scan as a `torch.library` operator; needs Triton, so it is imported by name only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmau.functional.selective_scan import _triton_kernels as kernels
from mmau.functional.selective_scan._backend import ScanBackend

__all__ = ["BACKEND", "CHUNK", "gated_scan", "launch_options", "scan"]

CHUNK = 64
"""Frames between two states that are kept for the backward: `n / 64` of the memory of `x`."""


def launch_options(d: int, n: int) -> dict[str, int]:
    """Choose the block of channels and states of one program, and how it is compiled.

    A warp with 8 elements a thread, so that many programs run side by side: the recurrence waits
    for its own result in each frame, and only other programs can fill the gap. The inputs of the
    next frames are fetched ahead (`STAGES`). Fused multiply-add is asked for, because Triton is
    about to change what it does when nothing is said.

    Args:
        d: Number of channels.
        n: Number of states per channel.

    Returns:
        `BLOCK_D`, `BLOCK_N`, `STAGES` and the options of the compiler.
    """
    block_n = _power_of_two(n)
    block_d = min(_power_of_two(d), max(4, 256 // block_n))
    return {
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "STAGES": 4,
        "num_warps": min(8, max(1, block_d * block_n // 256)),
        "enable_fp_fusion": True,
    }


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _chunks(num_frames: int) -> int:
    return (num_frames + CHUNK - 1) // CHUNK


# As in `_chunked`: whoever changes the number or the shapes of the outputs renames the operator.
@torch.library.custom_op(
    "mmau::selective_scan_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? initial_state, "
    "Tensor? reset, Tensor? gate, Tensor? delta_bias, bool zoh, bool keep_states) "
    "-> (Tensor, Tensor, Tensor)",
)
def _scan_op(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
    zoh: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_zeros(num_clips, d, n, dtype=torch.float32)
    kept = final.new_empty(
        num_clips * _chunks(num_frames) * d * n if keep_states else 0, dtype=torch.float32
    )
    if x.numel() == 0:  # a launch without programs is an error
        if initial_state is not None:
            final.copy_(initial_state)
        return y, final, kept
    x, delta, A, B, C = (tensor.contiguous() for tensor in (x, delta, A, B, C))
    options = launch_options(d, n)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernels.forward_kernel[num_clips, -(-d // options["BLOCK_D"])](
            x,
            delta,
            A,
            B,
            C,
            _or(initial_state, x),
            _or(reset, x),
            _or(gate, x),
            _or(delta_bias, x),
            y,
            final,
            kept if keep_states else final,
            num_frames,
            d,
            n,
            CHUNK=CHUNK,
            ZOH=zoh,
            HAS_INITIAL=initial_state is not None,
            HAS_RESET=reset is not None,
            HAS_GATE=gate is not None,
            SOFTPLUS=delta_bias is not None,
            KEEP=keep_states,
            **options,
        )
    return y, final, kept


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What to hand to a kernel that does not read a missing tensor but wants a pointer."""
    if tensor is None:
        return other
    # A bool has no arithmetic in Triton; one byte is one byte.
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@_scan_op.register_fake
def _scan_shapes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
    zoh: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    final = x.new_empty(num_clips, d, n, dtype=torch.float32)
    kept = final.new_empty(num_clips * _chunks(num_frames) * d * n if keep_states else 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final, kept


@torch.library.custom_op(
    "mmau::selective_scan_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor kept, Tensor? reset, Tensor? gate, Tensor? delta_bias, bool zoh) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
    zoh: bool,
) -> tuple[Tensor, ...]:
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    options = launch_options(d, n)
    blocks = -(-d // options["BLOCK_D"])
    per_frame = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, delta))
    grad_x, grad_delta = per_frame
    grad_gate = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if gate is not None else x
    )
    grad_initial = x.new_zeros(num_clips, d, n, dtype=torch.float32)
    grad_A = torch.zeros_like(grad_initial)
    grad_bias = x.new_zeros(num_clips, d, dtype=torch.float32)
    # Parts per block of channels, summed below in a fixed order: an atomic sum has none.
    grad_B = x.new_zeros(num_clips, blocks, num_frames, n, dtype=torch.float32)
    grad_C = torch.zeros_like(grad_B)
    if x.numel() == 0:
        if grad_state is not None:
            grad_initial.copy_(grad_state)
    else:
        x, delta, A, B, C = (tensor.contiguous() for tensor in (x, delta, A, B, C))
        scratch = x.new_empty(
            num_clips * blocks * CHUNK * options["BLOCK_D"] * options["BLOCK_N"],
            dtype=torch.float32,
        )
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernels.backward_kernel[num_clips, blocks](
                grad_y.contiguous(),
                _or(grad_state, x),
                x,
                delta,
                A,
                B,
                C,
                kept,
                _or(reset, x),
                _or(gate, x),
                _or(delta_bias, x),
                scratch,
                grad_x,
                grad_delta,
                grad_A,
                grad_B,
                grad_C,
                grad_initial,
                grad_gate,
                grad_bias,
                num_frames,
                d,
                n,
                CHUNK=CHUNK,
                ZOH=zoh,
                HAS_FINAL=grad_state is not None,
                HAS_RESET=reset is not None,
                HAS_GATE=gate is not None,
                SOFTPLUS=delta_bias is not None,
                **options,
            )
    return (
        grad_x,
        grad_delta,
        grad_A.sum(0).to(A.dtype),
        grad_B.sum(1).to(B.dtype),
        grad_C.sum(1).to(C.dtype),
        grad_initial,
        grad_gate if gate is not None else x.new_empty(0),
        grad_bias.sum(0),
    )


@_backward_op.register_fake
def _backward_shapes(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
    zoh: bool,
) -> tuple[Tensor, ...]:
    empty = [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, A, B, C)
    ]
    return (
        *empty,
        x.new_empty(x.shape[0], *A.shape, dtype=torch.float32),
        x.new_empty(0) if gate is None else torch.empty_like(empty[0]),
        x.new_empty(x.shape[2], dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, initial_state, reset, gate, delta_bias, zoh, keep_states = inputs
    if not keep_states:
        return  # nothing asked for a gradient when the operator was called
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, delta, A, B, C, output[2], reset, gate, delta_bias)
    ctx.zoh = zoh
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, kept, reset, gate, bias = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    *grads, grad_initial, grad_gate, grad_bias = _backward_op(
        grad_y, grad_state, x, delta, A, B, C, kept, reset, gate, bias, ctx.zoh
    )
    return (
        *grads,
        None if ctx.state_dtype is None else grad_initial.to(ctx.state_dtype),
        None,
        None if gate is None else grad_gate,
        None if bias is None else grad_bias.to(bias.dtype),
        None,
        None,
    )


_scan_op.register_autograd(_backward, setup_context=_setup)


def _run(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    gate: Tensor | None,
    delta_bias: Tensor | None,
    discretization: str,
) -> tuple[Tensor, Tensor]:
    given = (x, delta, A, B, C, initial_state, gate, delta_bias)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, state, _ = _scan_op(
        *(x, delta, A, B, C, initial_state, reset, gate, delta_bias),
        discretization == "zoh",
        wants_grad,
    )
    return y, state


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """Run the scan in one kernel; one kept state per 64 frames, deterministic backward.

    Differentiable once in every tensor. The tensors may have different floating dtypes, such as
    bfloat16 activations and a float32 `A`: the arithmetic and the state are float32, and each
    gradient has the dtype of its tensor.

    Args:
        x: `(b, t, d)`, input.
        delta: `(b, t, d)`, step size, at least 0.
        A: `(d, n)`, negative.
        B: `(b, t, n)`, input projection.
        C: `(b, t, n)`, output projection.
        initial_state: `(b, d, n)` or `None` for zeros.
        reset: `(b, t)`, True where the state before a frame is dropped.
        discretization: `"zoh"` or `"euler"`.

    Returns:
        `y` `(b, t, d)` in the dtype of `x`, and the final state `(b, d, n)` in float32.
    """
    return _run(x, delta, A, B, C, initial_state, reset, None, None, discretization)


def gated_scan(
    x: Tensor,
    delta_logits: Tensor,
    delta_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    gate_logits: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    r"""Run the scan with what comes right before it in the same kernel: the gate and softplus.

    The same as `scan` of $x \odot \sigma(\text{gate logits})$ with
    $\Delta = \text{softplus}(\text{delta logits} + \text{delta bias})$, without writing either to
    memory. A gate logit of `inf` opens the gate, a step logit of `-inf` freezes the state: that is
    how a caller expresses absent audio and masked frames.

    Args:
        x: `(b, t, d)`, input.
        delta_logits: `(b, t, d)`, step size before bias and softplus.
        delta_bias: `(d,)`, bias of the step size.
        A: `(d, n)`, negative.
        B: `(b, t, n)`, input projection.
        C: `(b, t, n)`, output projection.
        gate_logits: `(b, t, d)`, gate of the input before the sigmoid, or `None` for no gate.
        initial_state: `(b, d, n)` or `None` for zeros.
        reset: `(b, t)`, True where the state before a frame is dropped.
        discretization: `"zoh"` or `"euler"`.

    Returns:
        `y` `(b, t, d)` in the dtype of `x`, and the final state `(b, d, n)` in float32.
    """
    return _run(
        *(x, delta_logits, A, B, C, initial_state, reset, gate_logits, delta_bias), discretization
    )


BACKEND = ScanBackend(
    name="triton",
    run=scan,
    run_gated=gated_scan,
    devices=frozenset({"cpu", "cuda"} if kernels.INTERPRETED else {"cuda"}),
    dtypes=frozenset({torch.float32}),
)
