"""The selective scan as the paper writes it: slow, clear, and the judge of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mmau.functional.selective_scan._backend import ScanBackend
from mmau.functional.selective_scan._discretize import unchecked_euler, unchecked_zoh

__all__ = ["BACKEND", "scan"]


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
    discretize = {"zoh": unchecked_zoh, "euler": unchecked_euler}[discretization]
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
