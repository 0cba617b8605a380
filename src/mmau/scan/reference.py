"""The selective scan as the paper writes it: slow, clear, and the judge of every other backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes
from mmau.scan.backend import ScanBackend


def zoh(delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretise an input that is constant during each step: $\bar A$ and $\bar B$ `(..., d, n)`.

    The $\Delta$ of $\bar B = (\Delta A)^{-1} (\exp(\Delta A) - I) \, \Delta B$ cancels: `expm1`
    is the same number, but exact for small steps and 0 instead of NaN at $\Delta = 0$.
    """
    step = delta.unsqueeze(-1) * A
    return torch.exp(step), torch.expm1(step) / A * B.unsqueeze(-2)


def euler(delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretise the input to first order, $\bar B = \Delta B$: `zoh` as $\Delta A \to 0$."""
    step = delta.unsqueeze(-1)
    return torch.exp(step * A), step * B.unsqueeze(-2)


def half_life(delta: Tensor, A: Tensor, *, frame_rate: float) -> Tensor:
    r"""Turn step sizes into the time after which half of a state is forgotten, in seconds.

    $$ \tau = \frac{\ln 2}{\Delta \, |A|} \cdot \frac{1}{\text{frame rate}} $$

    Args:
        delta: `(..., d)`, step size in frames, at least 0; 0 never forgets.
        A: `(d, n)`, negative.
        frame_rate: Frames per second, above 0.

    Returns:
        `(..., d, n)`, in seconds.

    Raises:
        ValueError: If the shapes do not fit or `frame_rate` is not positive.

    Examples:
        >>> half_life(torch.tensor([0.1]), torch.tensor([[-1.0, -2.0]]), frame_rate=30.0)
        tensor([[0.2310, 0.1155]])
    """
    check_shapes(delta=(delta, "... d"), A=(A, "d n"))
    check_range("frame_rate", frame_rate, 0, open_low=True)
    return math.log(2.0) / (delta.unsqueeze(-1) * A.abs()) / frame_rate


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
    r"""Run the recurrence frame by frame under plain autograd.

    $$ h_t = \bar A_t h_{t-1} + \bar B_t x_t, \qquad y_t = C_t h_t $$

    Differentiable any number of times, in any dtype, on any device. Its backward keeps several
    `(b, d, n)` tensors per frame.
    """
    discretize = {"zoh": zoh, "euler": euler}[discretization]
    resets = [None] * x.shape[1] if reset is None else reset.unbind(1)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    # `unbind` and not `x[:, t]`, whose backward would cost time quadratic in the number of frames.
    frames = (x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), resets)
    for x_t, delta_t, B_t, C_t, reset_t in zip(*frames, strict=True):
        if reset_t is not None:
            h = h.masked_fill(reset_t[:, None, None], 0.0)
        A_bar, B_bar = discretize(delta_t, A, B_t)
        h = A_bar * h + B_bar * x_t[:, :, None]
        outputs.append((h * C_t[:, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y, h


BACKEND = ScanBackend(name="reference", run=scan, devices=frozenset({"cpu", "cuda", "mps", "meta"}))
