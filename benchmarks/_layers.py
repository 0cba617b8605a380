"""One layer of each kind, at equal width, for the comparison of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau.modules import AGSSM, TCN
from mmau.registry import MissingDependencyError


class Attention(nn.Module):
    """Causal self-attention: projections and PyTorch's fused kernel, no dropout."""

    def __init__(self, d_model: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(d_model, 3 * d_model)
        self.to_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every frame to itself and the past."""
        b, t, d = x.shape
        q, k, v = self.to_qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(out.transpose(1, 2).reshape(b, t, d))


class First(nn.Module):
    """The first of the outputs of a layer that also returns a state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Leave the state out."""
        out: Tensor = self.layer(x)[0]
        return out


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "AGSSM": lambda d: First(AGSSM(d)),
    "AGSSM, compiled scan": lambda d: First(AGSSM(d, backend="compiled")),
    "TCN block": lambda d: First(TCN(d, num_layers=1, d_hidden=d)),
    "LSTM": lambda d: First(nn.LSTM(d, d, batch_first=True)),
    "GRU": lambda d: First(nn.GRU(d, d, batch_first=True)),
    "attention": Attention,
}


def build_layers(d_model: int) -> dict[str, nn.Module]:
    """Build all that run here."""
    torch.manual_seed(0)
    layers = {}
    for name, build in LAYERS.items():
        try:
            layers[name] = build(d_model)
        except MissingDependencyError:
            continue  # the table of the scans has said so
    return layers


def once(layer: nn.Module, x: Tensor, *, backward: bool) -> None:
    """Run without gradients, or with the gradients of the input and of all parameters."""
    if not backward:
        with torch.no_grad():
            layer(x)
        return
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.autograd.grad(layer(x).sum(), wanted)
