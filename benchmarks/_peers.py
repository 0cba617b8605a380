"""The selective scans that ours is measured against, all called as `run(x, delta, A, B, C)`.

Two come from the packages that publish them. Two are written here from their published equations,
because their packages are not on PyPI or install only with CUDA; what matters for their cost, that
the loop indexes whole tensors and stacks the outputs, is kept. All of them compute Euler, `h =
exp(Delta A) h + Delta B x`, and none takes an initial state, a mask or a reset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmau.scan import SCAN_BACKENDS, selective_scan

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

OURS = ("chunked", "compiled")
PSCAN = "mambapy pscan"
TRANSFORMERS = "transformers, slow path"
MAMBA_LOOP = "mamba, selective_scan_ref"
MINIMAL = "mamba-minimal"
LOOPS = (TRANSFORMERS, MAMBA_LOOP, MINIMAL)
"""Those whose backward is quadratic in the number of frames."""


def ours(backend: str) -> Scan:
    """Return our scan with exact zero-order hold on one backend."""
    record = SCAN_BACKENDS.get(backend)
    return lambda x, delta, A, B, C: selective_scan(x, delta, A, B, C, backend=record)


def mamba_loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Loop of `selective_scan_ref` of the Mamba repository, channels before frames."""
    x, delta, B, C = (tensor.transpose(1, 2) for tensor in (x, delta, B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, x)
    state = A.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + entering[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return torch.stack(outputs, dim=2).transpose(1, 2)


def mamba_minimal(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Loop of the mamba-minimal repository, frames before channels."""
    decay = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
    entering = torch.einsum("bld,bln,bld->bldn", delta, B, x)
    state = A.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + entering[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return torch.stack(outputs, dim=1)


def _mambapy() -> Scan:
    from mambapy.pscan import pscan

    def run(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        # As MambaBlock.selective_scan builds them, without the direct path D x.
        decay = torch.exp(delta.unsqueeze(-1) * A)
        entering = (delta.unsqueeze(-1) * B.unsqueeze(2)) * x.unsqueeze(-1)
        return (pscan(decay, entering) @ C.unsqueeze(-1)).squeeze(3)

    return run


def _transformers() -> Scan:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x, delta, B, C = (tensor.transpose(1, 2) for tensor in (x, delta, B, C))
        return mamba_selective_scan(x, delta, A, B, C).transpose(1, 2)

    return run


LOADERS: dict[str, Callable[[], Scan]] = {
    "chunked": lambda: ours("chunked"),
    "compiled": lambda: ours("compiled"),
    PSCAN: _mambapy,
    TRANSFORMERS: _transformers,
    MAMBA_LOOP: lambda: mamba_loop,
    MINIMAL: lambda: mamba_minimal,
}


def available() -> tuple[dict[str, Scan], list[str]]:
    """Return every scan that runs here, ours first, and a sentence for each that does not."""
    scans, left_out = {}, []
    for name, load in LOADERS.items():
        try:
            scans[name] = load()
        except ImportError as error:  # a missing compiler is one too
            left_out.append(f"{name} is left out: {error}")
    return scans, left_out
