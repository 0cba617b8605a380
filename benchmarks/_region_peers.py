"""Attention of regions over patches as it is usually written, and ours, with the same weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau import HGA
from mmau.functional import region_attention

MHA = "nn.MultiheadAttention"
SDPA = "projected keys + SDPA"
OURS = "mmau"
NAMES = (MHA, SDPA, OURS)
NUM_HEADS = 8


class UsualAttention(nn.Module):
    """`nn.MultiheadAttention`, or the same around `F.scaled_dot_product_attention`."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, NUM_HEADS, batch_first=True)
        self.fused = fused

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attend: `(b, m, d)` and `(b, p, d)` to `(b, m, d)`."""
        if not self.fused:
            out: Tensor = self.attention(queries, tokens, tokens, need_weights=False)[0]
            return out

        def project(x: Tensor, part: int) -> Tensor:
            weight = self.attention.in_proj_weight.chunk(3)[part]
            bias = self.attention.in_proj_bias.chunk(3)[part]
            return F.linear(x, weight, bias).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            project(queries, 0), project(tokens, 1), project(tokens, 2)
        )
        joined: Tensor = self.attention.out_proj(context.transpose(1, 2).flatten(2))
        return joined


class OurAttention(nn.Module):
    """`region_attention` between a query and an output projection."""

    def __init__(self, given: nn.MultiheadAttention, implementation: str) -> None:
        super().__init__()
        hga = HGA.from_multihead_attention(given)
        self.to_query, self.to_key, self.to_value = hga.to_query, hga.to_key, hga.to_value
        self.to_output, self.implementation = hga.to_output, implementation

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attend: `(b, m, d)` and `(b, p, d)` to `(b, m, d)`."""
        found = region_attention(
            self.to_query(queries),
            tokens,
            self.to_key.weight,
            self.to_value.weight,
            self.to_value.bias,
            num_heads=NUM_HEADS,
            implementation=self.implementation,
        )
        out: Tensor = self.to_output(found.context)
        return out


class UsualHGA(nn.Module):
    """Section 3.2 of the paper as one would write it: means, attention, concatenation, MLP."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.attend = UsualAttention(width, fused=fused)
        self.first, self.second = nn.Linear(3 * width, width), nn.Linear(width, width)

    def forward(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Align: `(b, m, p)` and `(b, p, d)` to `(b, m, d)`."""
        local = weights @ tokens
        overall = tokens.mean(1, keepdim=True).expand_as(local)
        joined = torch.cat((self.attend(local, tokens), local, overall), dim=-1)
        out: Tensor = self.second(F.gelu(self.first(joined)))
        return out


class OurHGA(nn.Module):
    """`HGA` with the weights of a `UsualHGA`."""

    def __init__(self, given: UsualHGA, implementation: str) -> None:
        super().__init__()
        self.hga = HGA.from_multihead_attention(given.attend.attention)
        self.hga.attention = implementation
        parts = given.first.weight.chunk(3, dim=1)
        with torch.no_grad():
            self.hga.hidden_attended.weight.copy_(parts[0])
            self.hga.hidden_attended.bias.copy_(given.first.bias)
            self.hga.hidden_local.weight.copy_(parts[1])
            self.hga.hidden_overall.weight.copy_(parts[2])
            self.hga.to_token.load_state_dict(given.second.state_dict())

    def forward(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Align: `(b, m, p)` and `(b, p, d)` to `(b, m, d)`."""
        out: Tensor = self.hga(tokens, weights).tokens
        return out


def build(what: str, name: str, width: int, implementation: str = "auto") -> nn.Module:
    """Build `"attention"` or `"hga"` of one name; all of one width have the same weights."""
    torch.manual_seed(0)
    usual = (UsualAttention if what == "attention" else UsualHGA)(width, fused=name == SDPA)
    if name != OURS:
        return usual
    if isinstance(usual, UsualHGA):
        return OurHGA(usual, implementation)
    return OurAttention(usual.attention, implementation)


def inputs(
    what: str, size: dict[str, int], *, frozen: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Draw queries (or pooling weights) and tokens; frozen ones learn nothing."""
    generator = torch.Generator().manual_seed(0)
    b, m, p, d = (size[letter] for letter in "bmpd")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens = normal(b, p, d).requires_grad_(not frozen)
    if what == "attention":
        return [normal(b, m, d).requires_grad_(not frozen), tokens]
    # Each region covers about a twentieth of the face.
    marked = normal(b, m, p) > 1.6
    marked[..., 0] = True
    return [marked.to(dtype) / marked.sum(-1, keepdim=True), tokens]


def once(module: nn.Module, given: list[Tensor], *, backward: bool) -> list[Tensor]:
    """Run without gradients, or with the gradients of everything that learns."""
    if not backward:
        with torch.no_grad():
            return [module(*given)]
    out = module(*given)
    wanted = [x for x in (*given, *module.parameters()) if x.requires_grad]
    return [out, *torch.autograd.grad(out.sum(), wanted)]
