"""The chunked scan in front of autograd, and as one node in front of compilers and exporters.

Both sides call the same kernels. The operator is not used eagerly, because its dispatch costs as
much as scanning a hundred frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmau.functional.selective_scan import _chunked_kernels as kernels
from mmau.functional.selective_scan._backend import ScanBackend

__all__ = ["BACKEND", "scan"]


# The schema is written out because torch would evaluate annotations, which are strings here.
# Whoever changes the number or the shapes of the outputs has to rename the operator: compilers keep
# graphs on disk by this name, with the old shapes in them.
@torch.library.custom_op(
    "mmau::selective_scan_chunked",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? initial_state, "
    "Tensor? reset, bool zoh, bool keep_states) -> (Tensor, Tensor, Tensor)",
)
def _scan_op(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    zoh: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(x, delta, A, B, C, initial_state, reset, zoh, keep_states)


@_scan_op.register_fake
def _scan_shapes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    zoh: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    kept = kernels.kept_elements(num_clips, num_frames, d, n) if keep_states else 0
    return (
        x.new_empty(num_clips, num_frames, d),
        x.new_empty(num_clips, d, n),
        x.new_empty(kept),
    )


@torch.library.custom_op(
    "mmau::selective_scan_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor kept, Tensor? reset, bool zoh) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    zoh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels.backward(grad_y, grad_state, x, delta, A, B, C, kept, reset, zoh)


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
    zoh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, A, B, C)
    )
    grad_x, grad_delta, grad_A, grad_B, grad_C = empty
    grad_initial = x.new_empty(x.shape[0], *A.shape)
    return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_initial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, initial_state, reset, zoh, keep_states = inputs
    if not keep_states:
        return  # nothing asked for a gradient when the operator was called
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, delta, A, B, C, output[2], reset)
    ctx.zoh, ctx.has_state = zoh, initial_state is not None


def _backward_with(
    run: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    grad_y: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, kept, reset = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    *grads, grad_initial = run(grad_y, grad_state, x, delta, A, B, C, kept, reset, ctx.zoh)
    return (*grads, grad_initial if ctx.has_state else None, None, None, None)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    return _backward_with(_backward_op, ctx, grad_y, grad_state)


_scan_op.register_autograd(_backward, setup_context=_setup)


class _EagerScan(torch.autograd.Function):
    forward = staticmethod(kernels.forward)
    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Where a graph of the gradients is asked for (grad mode is on), the operator refuses to be
        # differentiated; the kernels would drop the second derivative without a word.
        run = _backward_op if torch.is_grad_enabled() else kernels.backward
        return _backward_with(run, ctx, grad_y, grad_state)


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
    """Run the scan in chunks; linear time, one kept state per chunk, backward by hand.

    Differentiable once in every tensor; for second derivatives and `torch.func` take the backend
    `"reference"`.

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
        `y` `(b, t, d)` and the final state `(b, d, n)`.
    """
    zoh = discretization == "zoh"
    differentiable = (
        (x, delta, A, B, C) if initial_state is None else (x, delta, A, B, C, initial_state)
    )
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        run = _scan_op
    elif wants_grad:
        run = _EagerScan.apply
    else:
        run = kernels.forward
    y, state, _ = run(x, delta, A, B, C, initial_state, reset, zoh, wants_grad)
    return y, state


BACKEND = ScanBackend(name="chunked", run=scan, devices=frozenset({"cpu", "cuda", "mps", "meta"}))
