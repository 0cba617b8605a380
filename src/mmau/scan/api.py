"""The selective scan that everything else calls: checks, masks, precision, then a backend."""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmau._autocast import without_autocast
from mmau._checks import check_mask, check_shapes
from mmau.scan import chunked, reference
from mmau.scan.backend import SCAN_BACKENDS, ScanBackend

# A registry look-up runs the import system, which no compiler can trace. These are always there, so
# that their names work inside a compiled region as well.
_BUILT_IN = {
    "auto": chunked.BACKEND,
    "chunked": chunked.BACKEND,
    "reference": reference.BACKEND,
}


def resolve_scan_backend(backend: str | ScanBackend = "auto") -> ScanBackend:
    """Turn a name into a backend, once, when a model is built; a record is returned as it is.

    Inside of `torch.compile` only the names of the built-in backends can be resolved.
    """
    if isinstance(backend, ScanBackend):
        return backend
    if backend in _BUILT_IN:
        return _BUILT_IN[backend]
    found = SCAN_BACKENDS.get(backend)
    if not isinstance(found, ScanBackend):
        raise TypeError(
            f"the scan backend {backend!r} must be a ScanBackend record; its package registered "
            f"{type(found).__name__}."
        )
    return found


@overload
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    mask: Tensor | None = ...,
    reset: Tensor | None = ...,
    discretization: str = ...,
    return_state: Literal[False] = ...,
    backend: str | ScanBackend = ...,
) -> Tensor: ...


@overload
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    mask: Tensor | None = ...,
    reset: Tensor | None = ...,
    discretization: str = ...,
    return_state: Literal[True],
    backend: str | ScanBackend = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: str = "zoh",
    return_state: bool = False,
    backend: str | ScanBackend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Carry a diagonal state over time whose step, input and output depend on the frame.

    $$
    h_t = \bar A_t h_{t-1} + \bar B_t x_t, \qquad y_t = C_t h_t + D x_t
    $$

    with $\bar A = \exp(\Delta A)$ and, for `discretization="zoh"`,
    $\bar B = (\Delta A)^{-1} (\exp(\Delta A) - I) \Delta B$: exact for an input that is constant
    during each frame. `"euler"` has $\bar B = \Delta B$, which is what Mamba's kernels compute.

    A frame with $\Delta = 0$ leaves the state as it is, to the bit, and that is what `mask` does:
    in a masked frame nothing is read (NaN included), the output is 0 and the state passes
    unchanged. No frames at all give an empty output and the initial state. Calling it chunk by
    chunk with the state carried over gives, with each backend of mmau on the CPU, the same bits as
    one call.

    The computation is in float32 or better, also under autocast; `y` has the dtype of `x`, the
    state that of the computation. On the CPU, outside of `torch.compile`, the signs of `A` and
    `delta` are checked; elsewhere that would stall the device, and what comes out of bad signs is
    undefined.

    Args:
        x: `(b, t, d)`, input.
        delta: `(b, t, d)`, step size, at least 0: apply softplus first.
        A: `(d, n)`, below 0.
        B: `(b, t, n)`, input projection, shared by all channels.
        C: `(b, t, n)`, output projection, shared by all channels.
        D: `(d,)`, direct path from input to output, or `None`, as in the paper.
        initial_state: `(b, d, n)`, state before the first frame, or `None` for zeros.
        mask: `(b, t)` bool, True where there is a frame.
        reset: `(b, t)` bool, True where a new sequence begins, so that the state before is dropped.
        discretization: `"zoh"` (the paper) or `"euler"` (Mamba).
        return_state: Whether to return the state after the last frame too.
        backend: Name in `SCAN_BACKENDS`, a `ScanBackend`, or `"auto"`.

    Returns:
        `y` `(b, t, d)`, or `(y, state)` with the state `(b, d, n)`, both differentiable.

    Raises:
        ValueError: If shapes do not fit, `A` is not negative, `delta` is negative, or the backend
            does not offer what is asked.
        TypeError: If `mask` or `reset` is not bool, or the others are not floating point.
        UnknownComponentError: If there is no backend of that name.

    References:
        Section 3.3 of the paper.

    Examples:
        One channel with decay rate 1 and a constant input approaches it as `1 - exp(-t)`:

        >>> one = torch.ones(1, 3, 1)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one).flatten()
        tensor([0.6321, 0.8647, 0.9502])

        A masked frame is passed over:

        >>> mask = torch.tensor([[True, False, True]])
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one, mask=mask).flatten()
        tensor([0.6321, 0.0000, 0.8647])
    """
    check_shapes(
        x=(x, "b t d"),
        delta=(delta, "b t d"),
        A=(A, "d n"),
        B=(B, "b t n"),
        C=(C, "b t n"),
        D=(D, "d"),
        initial_state=(initial_state, "b d n"),
        mask=(mask, "b t"),
        reset=(reset, "b t"),
    )
    check_mask("mask", mask)
    check_mask("reset", reset)
    dtype = _compute_dtype(x=x, delta=delta, A=A, B=B, C=C, D=D, initial_state=initial_state)
    chosen = resolve_scan_backend(backend)
    chosen.check(
        discretization=discretization,
        device=x.device.type,
        dtype=dtype,
        state=initial_state is not None or return_state,
        reset=reset is not None,
    )
    y_dtype = x.dtype
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    if mask is not None:
        masked = ~mask.unsqueeze(-1)
        x, delta, B, C = (tensor.masked_fill(masked, 0.0) for tensor in (x, delta, B, C))
    _check_signs(delta, A)
    with without_autocast(x.device.type):
        y, state = chosen.run(
            x,
            delta,
            A,
            B,
            C,
            initial_state=None if initial_state is None else initial_state.to(dtype),
            reset=reset,
            discretization=discretization,
        )
        if D is not None:
            y = y + D.to(dtype) * x
    y = y.to(y_dtype)
    return (y, state) if return_state else y


def _compute_dtype(**tensors: Tensor | None) -> torch.dtype:
    """Widest dtype of the arguments, and never less than float32."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be a floating-point tensor; got dtype {tensor.dtype}.")
    return functools.reduce(
        torch.promote_types, (tensor.dtype for tensor in given.values()), torch.float32
    )


def _check_signs(delta: Tensor, A: Tensor) -> None:
    """Check the values that keep the state bounded, where looking at values is cheap."""
    if torch.compiler.is_compiling() or delta.device.type != "cpu":
        return
    if isinstance(delta, FakeTensor) or isinstance(A, FakeTensor):
        return  # shapes without values
    if A.numel() and not A.max() < 0:
        raise ValueError(
            f"`A` must be below 0 everywhere, or the state grows without bound; got a maximum of "
            f"{A.max().item():.4g}."
        )
    if delta.numel() and delta.min() < 0:
        raise ValueError(
            f"`delta` must be at least 0 (apply softplus first); got a minimum of "
            f"{delta.min().item():.4g}."
        )
