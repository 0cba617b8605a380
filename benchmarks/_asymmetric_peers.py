"""What the asymmetric loss is compared with, each as a function of logits and target."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau.functional import asymmetric_loss

LossFunction = Callable[[Tensor, Tensor], Tensor]

OURS, COMPILED = "eager", "compiled"
OPTIMIZED, TIMM = "optimized (published)", "timm"
BCE, BCE_COMPILED = "torch BCE", "torch BCE, compiled"


def optimized(logits: Tensor, target: Tensor) -> Tensor:
    """The published memory-saving formulation: one focusing power, in place where autograd lets.

    Written from its formula, L = -w (y log p + (1 - y) log q) with q = min(1 - p + m, 1) and
    w = (1 - y p - (1 - y) q)^(y g+ + (1 - y) g-), logarithms cut at 1e-8, summed.
    """
    gamma_pos, gamma_neg, margin, smallest = 1, 4, 0.05, 1e-8
    negative = 1 - target
    p = torch.sigmoid(logits)
    q = (1.0 - p).add_(margin).clamp_(max=1)
    loss = target * torch.log(p.clamp(min=smallest))
    loss.add_(negative * torch.log(q.clamp(min=smallest)))
    p = p * target
    q = q * negative
    loss *= torch.pow(1 - p - q, gamma_pos * target + gamma_neg * negative)
    return -loss.sum()


def _compiled(run: LossFunction) -> LossFunction:
    """Compile, and wait for it."""
    # One function for each size, as training has one size.
    return torch.compile(run, fullgraph=True, dynamic=False)


def _timm() -> LossFunction:
    """Load timm's file by itself: the package also wants torchvision."""
    path = importlib.metadata.distribution("timm").locate_file("timm/loss/asymmetric_loss.py")
    spec = importlib.util.spec_from_file_location("timm_asymmetric_loss", str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AsymmetricLossMultiLabel()


LOADERS: dict[str, Callable[[], LossFunction]] = {
    OURS: lambda: asymmetric_loss,
    COMPILED: lambda: _compiled(asymmetric_loss),
    OPTIMIZED: lambda: optimized,
    TIMM: _timm,
    BCE: lambda: F.binary_cross_entropy_with_logits,
    BCE_COMPILED: lambda: _compiled(F.binary_cross_entropy_with_logits),
}


@functools.cache
def available() -> tuple[dict[str, LossFunction], list[str]]:
    """Return what can be run, and a sentence about each of the others."""
    # torch's own tracer warns about how it calls an autograd.Function.
    warnings.filterwarnings("ignore", message=".*should not be instantiated.*")
    found, left_out = {}, []
    for name, load in LOADERS.items():
        try:
            found[name] = load()
        except (ImportError, OSError) as problem:
            left_out.append(f"{name} is left out: {problem}.")
    return found, left_out
