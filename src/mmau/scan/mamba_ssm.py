r"""mamba-ssm's compiled kernel as a backend: exact zero-order hold through a kernel of Euler's.

The kernel computes $h_t = \exp(\Delta A) h_{t-1} + \Delta B_t x_t$ and has neither an initial state
nor a gradient of the final one. Its input projection may differ between groups of channels, though,
and that is enough for all three. With one group per channel,

$$ B'_{tdn} = \varphi(\Delta_{td} A_{dn}) \, B_{tn}, \qquad \varphi(z) = (e^z - 1) / z $$

turns Euler's input term into the exact one. A frame put in front, with $\Delta = x = 1$, $C = 0$
and the initial state for $B'$, starts from that state to the bit. And $n$ frames put behind, with
$\Delta = x = 0$ and one-hot $C$, read the final state out, one component each.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau.registry import MissingDependencyError
from mmau.scan.backend import ScanBackend

MAX_STATES = 256
"""Largest state size that the kernel is compiled for."""

MAX_ELEMENTS = 1 << 32
"""The kernel counts elements in 32 bits without a sign, and does not notice when it overflows."""

SLICE_ELEMENTS = 1 << 22
"""Elements of a temporary while `B'` is made; without slices they would take more than `B'`."""


def _kernel() -> types.ModuleType:
    """The compiled extension itself: that `mamba_ssm` imports would prove nothing."""
    try:
        return importlib.import_module("selective_scan_cuda")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the scan backend 'mamba_ssm' needs 'selective_scan_cuda', the compiled kernel of "
            "mamba-ssm, which is not installed: on Linux with CUDA, "
            'pip install --no-build-isolation "mmau[gpu]"',
            name="selective_scan_cuda",
        ) from error
    except ImportError as error:
        raise MissingDependencyError(
            "the scan backend 'mamba_ssm' needs 'selective_scan_cuda', which is installed but does "
            f"not load ({error}); build mamba-ssm again for the installed torch",
            name="selective_scan_cuda",
        ) from error


class _Kernel(torch.autograd.Function):
    """The compiled kernel under autograd, with none of its options.

    Tensors are float32: `u` and `delta` `(b, d, t)`, `A` `(d, n)`, `B` and `C` `(b, g, n, t)` with
    the time axis innermost; `C` may repeat its groups with stride 0, since it is only read.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        out, states, *_ = _kernel().fwd(u, delta, A, B, C, None, None, None, False)
        ctx.save_for_backward(u, delta, A, B, C, states)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, states = ctx.saved_tensors
        grads = _kernel().bwd(
            *(u, delta, A, B, C, None, None, None, grad_out.contiguous(), states),
            *(None, None, False, False),
        )
        return tuple(grads[:5])


class _InputPerChannel(torch.autograd.Function):
    """`B'` of the kernel, `(b, d, n, front + t + n)`: the initial state, `B` or `phi B`, zeros.

    By hand, because autograd would keep several tensors of this size, and because the derivative of
    `phi` cancels at small steps unless it is written as a series.
    """

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, zoh: bool
    ) -> Tensor:
        (num_clips, d, num_frames), n = delta.shape, A.shape[1]
        front = 0 if initial_state is None else 1
        out = B.new_zeros(num_clips, d, n, front + num_frames + n)
        if initial_state is not None:
            out[..., 0] = initial_state
        frames = out[..., front : front + num_frames]
        for part in _slices(delta, n):
            B_ = B.unsqueeze(1)[:, :, part]
            frames[:, :, part] = _phi(_step(delta, A, part)) * B_ if zoh else B_
        ctx.save_for_backward(delta, A, B)
        ctx.front, ctx.zoh = front, zoh
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        delta, A, B = ctx.saved_tensors
        grad_initial = grad[..., 0] if ctx.front else None
        grad = grad[..., ctx.front : ctx.front + delta.shape[2]]
        if not ctx.zoh:
            return None, None, grad.sum(1), grad_initial, None
        grad_delta, grad_A, grad_B = (torch.zeros_like(tensor) for tensor in (delta, A, B))
        for part in _slices(delta, A.shape[1]):
            z, grad_ = _step(delta, A, part), grad[:, :, part]
            grad_B[:, part] = (_phi(z) * grad_).sum(1)
            grad_z = _phi_derivative(z) * grad_ * B.unsqueeze(1)[:, :, part]
            grad_A[:, part] = torch.mul(grad_z, delta.unsqueeze(2)).sum((0, 3))
            grad_delta += torch.mul(grad_z, A[:, part].unsqueeze(2)).sum(2)
        return grad_delta, grad_A, grad_B, grad_initial, None


def _slices(delta: Tensor, n: int) -> Iterator[slice]:
    """As many states at a time as keep temporaries small."""
    size = max(1, SLICE_ELEMENTS // max(1, delta.numel()))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _step(delta: Tensor, A: Tensor, part: slice) -> Tensor:
    return delta.unsqueeze(2) * A[:, part].unsqueeze(2)


def _phi(z: Tensor) -> Tensor:
    """`expm1(z) / z`, which is 1 at 0."""
    return torch.where(z == 0, 1.0, torch.expm1(z) / z)


def _phi_derivative(z: Tensor) -> Tensor:
    """Derivative of `_phi`, by Taylor's series where the closed form would cancel."""
    terms = 8 if z.dtype == torch.float32 else 15
    series = torch.zeros_like(z)
    for k in range(terms, 1, -1):
        series.add_(k / math.factorial(k + 1)).mul_(z)
    closed = (torch.exp(z) - _phi(z)) / z
    return torch.where(z.abs() < 0.5, series.add_(0.5), closed)


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
    """Run the scan in mamba-ssm's kernel, `selective_scan_cuda`; differentiable once, float32.

    Memory: exact zero-order hold, and Euler from an initial state, need one input projection per
    channel. That is `4 b d n (t + n + 1)` bytes kept from the forward and two more of that size in
    the backward: 12 b d n t bytes at the peak, 0.8 GB for `(b, d, n, t) = (16, 512, 16, 512)`.
    Euler without an initial state needs none of this.

    The kernel sums the gradient of `A` over clips (and with Euler those of `B` and `C` over
    channels) atomically, so those are not the same to the bit in two runs. It has no resets.
    """
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    front = 0 if initial_state is None else 1
    per_channel = initial_state is not None or discretization == "zoh"
    _check_sizes(num_clips, d, n if per_channel else 1, front + num_frames + n, num_states=n)
    if x.numel() == 0:
        state = x.new_zeros(num_clips, d, n) if initial_state is None else initial_state
        return torch.zeros_like(x), state
    # Frames in front and behind; `u` and `delta` of the one in front are 1, all others 0.
    u, step, B, C = (tensor.transpose(1, 2) for tensor in (x, delta, B, C))
    first, last = x.new_ones(num_clips, d, front), x.new_zeros(num_clips, d, n)
    if per_channel:
        B = _InputPerChannel.apply(  # type: ignore[no-untyped-call]
            step, A, B, initial_state, discretization == "zoh"
        )
    else:
        B = F.pad(B, (0, n)).unsqueeze(1)
    read_out = torch.eye(n, dtype=x.dtype, device=x.device).expand(num_clips, n, n)
    C = torch.cat([F.pad(C, (front, 0)), read_out], dim=2).unsqueeze(1)
    out = _Kernel.apply(  # type: ignore[no-untyped-call]
        torch.cat([first, u, last], dim=2).contiguous(),
        torch.cat([first, step, last], dim=2).contiguous(),
        A.contiguous(),
        B,
        C.expand(-1, B.shape[1], -1, -1),
    )
    y, state = out[..., front : front + num_frames], out[..., front + num_frames :]
    return y.transpose(1, 2), state.contiguous()


def _check_sizes(num_clips: int, d: int, n: int, num_frames: int, *, num_states: int) -> None:
    """Refuse what the kernel would refuse without an error message, or compute wrongly."""
    if num_states > MAX_STATES:
        raise ValueError(
            f"the scan backend 'mamba_ssm' takes at most {MAX_STATES} states per channel; got "
            f"{num_states}."
        )
    elements = num_clips * d * n * num_frames
    if elements >= MAX_ELEMENTS:
        raise ValueError(
            f"the scan backend 'mamba_ssm' counts to {MAX_ELEMENTS} elements; got {num_clips} "
            f"clips x {d} channels x {n} states x {num_frames} frames = {elements}; split the "
            "batch, or carry the state over chunks of the clips."
        )


def __getattr__(name: str) -> ScanBackend:
    """Hand out `BACKEND` only where the kernel loads: a model is refused when it is built."""
    if name != "BACKEND":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _kernel()
    return ScanBackend(
        name="mamba_ssm",
        run=scan,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32}),
        takes_reset=False,
        compiles=False,
    )
