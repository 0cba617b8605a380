"""How far fp32 is from a float64 oracle, and what must hold to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _measure import make_inputs

from mmau.scan import selective_scan

STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0, 20.0)
SIZE = {"b": 2, "d": 32, "n": 16, "t": 128}


def errors(backends: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the largest error of output and gradients, each relative to its largest entry."""
    worst: dict[str, dict[str, float]] = {
        what: dict.fromkeys(backends, 0.0)
        for what in ("output", "gradients inside", "gradients outside")
    }
    weight = torch.randn(
        SIZE["b"], SIZE["t"], SIZE["d"], generator=torch.Generator().manual_seed(1)
    )
    inputs = make_inputs(**SIZE)

    def results(step: float, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        typed = [v.detach().to(dtype).requires_grad_() for v in inputs]
        with torch.no_grad():
            typed[1].fill_(torch.tensor(step))  # the same number in both precisions
        y = selective_scan(*typed, backend=backend)
        return [y, *torch.autograd.grad((y * weight.to(dtype)).sum(), typed)]

    for step in STEPS:
        exact = results(step, torch.float64, "reference")
        where = "gradients inside" if 1e-4 <= step <= 1 else "gradients outside"
        for backend in backends:
            output, *gradients = (
                ((one - other).abs().max() / other.abs().max()).item()
                for one, other in zip(results(step, torch.float32, backend), exact, strict=True)
            )
            worst["output"][backend] = max(worst["output"][backend], output)
            worst[where][backend] = max(worst[where][backend], *gradients)
    return worst


def differences(backend: str) -> float:
    """Return the largest change of output or state by cutting, by streaming and by padding."""
    x, delta, A, B, C = (tensor.detach() for tensor in make_inputs(2, 16, 16, 64))
    options = {"backend": backend, "return_state": True}
    y, state = selective_scan(x, delta, A, B, C, **options)

    def in_pieces(length: int) -> list[torch.Tensor]:
        h, pieces = None, []
        for start in range(0, x.shape[1], length):
            x_, delta_, B_, C_ = (v[:, start : start + length] for v in (x, delta, B, C))
            piece, h = selective_scan(x_, delta_, A, B_, C_, initial_state=h, **options)
            pieces.append(piece)
        return [torch.cat(pieces, 1) - y, h - state]

    padded = [torch.cat([v, torch.full_like(v, torch.nan)], 1) for v in (x, delta, B, C)]
    mask = torch.arange(padded[0].shape[1]).expand(len(x), -1) < x.shape[1]
    y_padded, h = selective_scan(padded[0], padded[1], A, *padded[2:], mask=mask, **options)
    changes = [*in_pieces(1), *in_pieces(13), y_padded[:, : x.shape[1]] - y, h - state]
    return max(change.abs().max().item() for change in changes)
