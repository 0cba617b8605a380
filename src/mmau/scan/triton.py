"""The fused scan for CUDA; needs Triton, so it is imported by name only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmau.scan.backend import ScanBackend, ScanOperator

# Triton compiles these functions itself; their arguments have no Python types to check.
# mypy: ignore-errors


@triton.jit
def _expm1(z):
    # Taylor's series where exp(z) - 1 would cancel; 9 terms leave less than one rounding at 0.25.
    p = 1.0 / 40320.0 + z * (1.0 / 362880.0)
    p = 1.0 / 5040.0 + z * p
    p = 1.0 / 720.0 + z * p
    p = 1.0 / 120.0 + z * p
    p = 1.0 / 24.0 + z * p
    p = 1.0 / 6.0 + z * p
    p = 0.5 + z * p
    return tl.where(tl.abs(z) < 0.25, z + z * z * p, tl.exp(z) - 1.0)


@triton.jit
def _softplus(z):
    # max(z, 0) + log1p(exp(-|z|)), which overflows nowhere; log1p by the series of artanh where
    # 1 + u would lose the digits of u.
    u = tl.exp(-tl.abs(z))
    s = u / (2.0 + u)
    q = s * s
    p = 1.0 / 9.0 + q * (1.0 / 11.0)
    p = 1.0 / 7.0 + q * p
    p = 1.0 / 5.0 + q * p
    p = 1.0 / 3.0 + q * p
    log1p = tl.where(u < 0.25, 2.0 * (s + s * q * p), tl.log(1.0 + u))
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def _frame(
    x_ptr, delta_ptr, gate_ptr, bias, row, in_d, HAS_GATE: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """Input and step size of one frame, after the gate and softplus if they are fused."""
    x = tl.load(x_ptr + row, mask=in_d, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row, mask=in_d, other=0.0).to(tl.float32)
    if HAS_GATE:
        x *= tl.sigmoid(tl.load(gate_ptr + row, mask=in_d, other=0.0).to(tl.float32))
    if SOFTPLUS:
        delta = _softplus(delta + bias)
    return x, delta


@triton.jit
def _advance(h, x, delta, B, A, A_inverse, ZOH: tl.constexpr):
    """The recurrence. Exact zero-order hold moves `h` to `-x B / A`; a step of 0 moves nothing."""
    if ZOH:
        h += _expm1(delta[:, None] * A) * (h + x[:, None] * B[None, :] * A_inverse)
    else:
        h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
    return h


@triton.jit(do_not_specialize=["num_frames"])
def forward_kernel(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, initial_ptr, reset_ptr, gate_ptr, bias_ptr,
    y_ptr, final_ptr, kept_ptr,
    num_frames, d, n,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ZOH: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write `y`, the final state and, if `KEEP`, the state before each chunk `(b, chunks, d, n)`.

    The grid is (clips, blocks of channels).
    """
    clip = tl.program_id(0).to(tl.int64)
    at_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at_n = tl.arange(0, BLOCK_N)
    in_d, in_n = at_d < d, at_n < n
    at_state, in_state = at_d[:, None] * n + at_n[None, :], in_d[:, None] & in_n[None, :]
    A = tl.load(A_ptr + at_state, mask=in_state, other=-1.0).to(tl.float32)
    A_inverse = 1.0 / A
    bias = tl.zeros([BLOCK_D], tl.float32)
    if SOFTPLUS:
        bias = tl.load(bias_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + clip * d * n + at_state, mask=in_state, other=0.0).to(tl.float32)
    num_chunks = tl.cdiv(num_frames, CHUNK)
    for chunk in range(num_chunks):
        if KEEP:
            kept = kept_ptr + (clip * num_chunks + chunk) * d * n
            tl.store(kept + at_state, h, mask=in_state)
        stop = tl.minimum(chunk * CHUNK + CHUNK, num_frames)
        for t in tl.range(chunk * CHUNK, stop, num_stages=STAGES):
            frame = clip * num_frames + t
            x, delta = _frame(
                x_ptr, delta_ptr, gate_ptr, bias, frame * d + at_d, in_d, HAS_GATE, SOFTPLUS
            )
            B = tl.load(B_ptr + frame * n + at_n, mask=in_n, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + frame * n + at_n, mask=in_n, other=0.0).to(tl.float32)
            if HAS_RESET:
                # Not a multiplication: a NaN of one clip must not reach the clip behind it.
                drop = tl.load(reset_ptr + frame).to(tl.int32)
                h = tl.where(drop != 0, 0.0, h)
            h = _advance(h, x, delta, B, A, A_inverse, ZOH)
            tl.store(y_ptr + frame * d + at_d, tl.sum(h * C[None, :], 1), mask=in_d)
    tl.store(final_ptr + clip * d * n + at_state, h, mask=in_state)


@triton.jit(do_not_specialize=["num_frames"])
def backward_kernel(
    grad_y_ptr, grad_final_ptr,
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, kept_ptr, reset_ptr, gate_ptr, bias_ptr, scratch_ptr,
    grad_x_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_initial_ptr,
    grad_gate_ptr, grad_bias_ptr,
    num_frames, d, n,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ZOH: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Write all gradients; those of `A` and the bias per clip, those of `B` and `C` per block.

    `chunked.scan_backward` explains the formulas: `G` is the adjoint, `GS` what goes to the
    step size, `P` what goes to the input.
    """
    clip = tl.program_id(0).to(tl.int64)
    block = clip * tl.num_programs(1) + tl.program_id(1)
    in_block = tl.arange(0, BLOCK_D)
    at_d = tl.program_id(1) * BLOCK_D + in_block
    at_n = tl.arange(0, BLOCK_N)
    in_d, in_n = at_d < d, at_n < n
    at_state, in_state = at_d[:, None] * n + at_n[None, :], in_d[:, None] & in_n[None, :]
    A = tl.load(A_ptr + at_state, mask=in_state, other=-1.0).to(tl.float32)
    A_inverse = 1.0 / A
    bias = tl.zeros([BLOCK_D], tl.float32)
    if SOFTPLUS:
        bias = tl.load(bias_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
    later = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if HAS_FINAL:
        later = tl.load(grad_final_ptr + clip * d * n + at_state, mask=in_state, other=0.0)
        later = later.to(tl.float32)
    grad_A = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_D], tl.float32)
    scratch = scratch_ptr + block * CHUNK * BLOCK_D * BLOCK_N
    scratch += in_block[:, None] * BLOCK_N + at_n[None, :]
    num_chunks = tl.cdiv(num_frames, CHUNK)
    for back in range(num_chunks):
        chunk = num_chunks - 1 - back
        start = chunk * CHUNK
        size = tl.minimum(CHUNK, num_frames - start)
        kept = kept_ptr + (clip * num_chunks + chunk) * d * n
        h = tl.load(kept + at_state, mask=in_state, other=0.0)
        for i in tl.range(0, size, num_stages=STAGES):
            frame = clip * num_frames + start + i
            x, delta = _frame(
                x_ptr, delta_ptr, gate_ptr, bias, frame * d + at_d, in_d, HAS_GATE, SOFTPLUS
            )
            B = tl.load(B_ptr + frame * n + at_n, mask=in_n, other=0.0).to(tl.float32)
            if HAS_RESET:
                drop = tl.load(reset_ptr + frame).to(tl.int32)
                h = tl.where(drop != 0, 0.0, h)
            # The state before the frame: what is left of it afterwards cannot be had back from the
            # state after it without cancellation.
            tl.store(scratch + i * BLOCK_D * BLOCK_N, h)
            h = _advance(h, x, delta, B, A, A_inverse, ZOH)
        # The compiler may give the loads below another layout, so other threads may read.
        tl.debug_barrier()
        for i_back in tl.range(0, size, num_stages=STAGES):
            i = size - 1 - i_back
            frame = clip * num_frames + start + i
            row = frame * d + at_d
            x, delta = _frame(x_ptr, delta_ptr, gate_ptr, bias, row, in_d, HAS_GATE, SOFTPLUS)
            B = tl.load(B_ptr + frame * n + at_n, mask=in_n, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + frame * n + at_n, mask=in_n, other=0.0).to(tl.float32)
            grad_y = tl.load(grad_y_ptr + row, mask=in_d, other=0.0).to(tl.float32)
            before = tl.load(scratch + i * BLOCK_D * BLOCK_N)
            G = grad_y[:, None] * C[None, :] + later
            Bx = x[:, None] * B[None, :]
            if ZOH:
                change = _expm1(delta[:, None] * A)
                h = before + change * (before + Bx * A_inverse)
                GS = G * (A * before + Bx) * (1.0 + change)
                P = G * change * A_inverse
                grad_A += (delta[:, None] * GS - P * Bx) * A_inverse
                grad_delta = tl.sum(GS, 1)
                later = G + change * G
            else:
                decay = tl.exp(delta[:, None] * A)
                remains = decay * before
                h = remains + delta[:, None] * Bx
                P = G * delta[:, None]
                grad_A += P * remains
                grad_delta = tl.sum(G * (A * remains + Bx), 1)
                later = decay * G
            grad_x = tl.sum(P * B[None, :], 1)
            part = (block * num_frames + start + i) * n + at_n
            tl.store(grad_B_ptr + part, tl.sum(P * x[:, None], 0), mask=in_n)
            tl.store(grad_C_ptr + part, tl.sum(grad_y[:, None] * h, 0), mask=in_n)
            if HAS_GATE:
                gate = tl.sigmoid(tl.load(gate_ptr + row, mask=in_d, other=0.0).to(tl.float32))
                # x is gated here, so x (1 - gate) is the derivative by the logit.
                tl.store(grad_gate_ptr + row, grad_x * x * (1.0 - gate), mask=in_d)
                grad_x *= gate
            if SOFTPLUS:
                logit = tl.load(delta_ptr + row, mask=in_d, other=0.0).to(tl.float32) + bias
                grad_delta *= tl.sigmoid(logit)
                grad_bias += grad_delta
            tl.store(grad_x_ptr + row, grad_x, mask=in_d)
            tl.store(grad_delta_ptr + row, grad_delta, mask=in_d)
            if HAS_RESET:
                drop = tl.load(reset_ptr + frame).to(tl.int32)
                later = tl.where(drop != 0, 0.0, later)
        tl.debug_barrier()
    tl.store(grad_A_ptr + clip * d * n + at_state, grad_A, mask=in_state)
    tl.store(grad_initial_ptr + clip * d * n + at_state, later, mask=in_state)
    if SOFTPLUS:
        tl.store(grad_bias_ptr + clip * d + at_d, grad_bias, mask=in_d)


# Under TRITON_INTERPRET=1 the decorator gives functions that run in Python, slowly, on any device.
INTERPRETED: bool = not isinstance(forward_kernel, triton.JITFunction)


CHUNK = 64
"""Frames between two states that are kept for the backward: `n / 64` of the memory of `x`."""


def launch_options(d: int, n: int) -> dict[str, int]:
    """Choose the block of channels and states of one program, and how it is compiled.

    A warp with 8 elements a thread, so that many programs run side by side: the recurrence waits
    for its own result in each frame, and only other programs can fill the gap. The inputs of the
    next frames are fetched ahead (`STAGES`). Fused multiply-add is asked for, because Triton is
    about to change what it does when nothing is said.
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


def _kept_elements(num_clips: int, num_frames: int, d: int, n: int) -> int:
    return (num_frames + CHUNK - 1) // CHUNK * num_clips * d * n


def _forward(
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
    kept = final.new_empty(_kept_elements(num_clips, num_frames, d, n) if keep_states else 0)
    if x.numel() == 0:  # a launch without programs is an error
        if initial_state is not None:
            final.copy_(initial_state)
        return y, final, kept
    x, delta, A, B, C = (tensor.contiguous() for tensor in (x, delta, A, B, C))
    options = launch_options(d, n)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        forward_kernel[num_clips, -(-d // options["BLOCK_D"])](
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


def _backward(
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
            backward_kernel[num_clips, blocks](
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
        x.new_empty(0) if gate is None else grad_gate.to(gate.dtype),
        x.new_empty(0) if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
    )


_OPERATOR = ScanOperator(
    "triton", _forward, _backward, _kept_elements, fused=("gate", "delta_bias")
)


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
    """
    tensors = (x, delta, A, B, C, initial_state, reset, None, None)
    return _OPERATOR(*tensors, discretization=discretization)


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
    """
    tensors = (x, delta_logits, A, B, C, initial_state, reset, gate_logits, delta_bias)
    return _OPERATOR(*tensors, discretization=discretization)


BACKEND = ScanBackend(
    name="triton",
    run=scan,
    run_gated=gated_scan,
    devices=frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"}),
    dtypes=frozenset({torch.float32}),
)
