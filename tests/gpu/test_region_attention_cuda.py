"""Region attention and HGA on a real GPU: every implementation, low precision, memory, compiler.

On the CPU flash-attn has a stand-in (`tests/functional/test_region_attention_flash.py`).
"""

import importlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.functional.region_attention import region_attention
from mmau.modules.hga import HGA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FOLDED = importlib.import_module("mmau.functional.region_attention")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def arguments(b=4, m=10, p=256, d=256, e=384, dtype=torch.float64):
    """Tokens of unit size, weights that keep it, everything off zero."""
    tokens, queries = torch.randn(b, p, e) + 0.3, torch.randn(b, m, d) + 0.3
    matrices = [torch.randn(d, e) / e**0.5 for _ in range(2)]
    values = (queries, tokens, *matrices, torch.randn(d))
    return [value.to("cuda", dtype).requires_grad_() for value in values]


def results(args, implementation, **options):
    """The context, and the gradients of everything under a fixed weighting of it."""
    context = region_attention(*args, num_heads=4, implementation=implementation, **options).context
    weight = torch.linspace(-1, 1, context.numel(), device="cuda", dtype=torch.float64)
    loss = (context.double().flatten() * weight).sum()
    return context, *torch.autograd.grad(loss, args)


def errors(got, wanted):
    return [
        ((g.double() - w.double()).norm() / w.double().norm()).item()
        for g, w in zip(got, wanted, strict=True)
    ]


# Rounding of a sum of a few hundred terms; half precision rounds a dozen times in a row.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 8e-2),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["folded", "sdpa"])
def test_values_and_gradients(implementation, dtype, tolerance, masked):
    exact = arguments()
    mask = None
    if masked:
        mask = torch.rand(4, 256, device="cuda") > 0.4
        mask[1] = False
    args = [value.detach().to(dtype).requires_grad_() for value in exact]
    on_cpu = [value.detach().cpu().requires_grad_() for value in exact]
    options = {"mask": None if mask is None else mask.cpu()}
    context = region_attention(*on_cpu, num_heads=4, implementation="sdpa", **options).context
    weight = torch.linspace(-1, 1, context.numel(), dtype=torch.float64)
    wanted = context, *torch.autograd.grad((context.flatten() * weight).sum(), on_cpu)
    got = [value.cpu() for value in results(args, implementation, mask=mask)]
    assert max(errors(got, wanted)) < tolerance


def test_chunks_of_the_batch_change_nothing():
    args = arguments(b=5)
    whole = results(args, "folded")
    with mock.patch.object(FOLDED, "GPU_CHUNK", 2 * 10 * 4 * 384):
        parts = results(args, "folded")
    assert max(errors(parts, whole)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("return_attention", [False, True])
def test_flash_attn(dtype, tolerance, autocast, return_attention):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    exact = arguments()
    args = [
        value.detach().to(torch.float32 if autocast else dtype).requires_grad_() for value in exact
    ]
    with torch.autocast("cuda", dtype, enabled=autocast):
        got = results(args, "flash", return_attention=return_attention)
    assert got[0].dtype == dtype
    assert max(errors(got, results(exact, "sdpa"))) < tolerance


def test_flash_refuses_float32():
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        results(arguments(dtype=torch.float32), "flash")


@pytest.mark.parametrize("attention", ["folded", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hga_under_autocast(attention, dtype):
    hga = HGA(384, 256, 8, attention=attention).cuda()
    tokens = torch.randn(4, 256, 384, device="cuda", requires_grad=True)
    weights = torch.rand(4, 10, 256, device="cuda").softmax(-1)
    exact = hga(tokens, weights, return_attention=True)
    with torch.autocast("cuda", dtype):
        low = hga(tokens, weights, return_attention=True)
    assert low.tokens.dtype == dtype
    assert max(errors(low, exact)) < 0.03
    low.tokens.float().square().mean().backward()
    for value in (tokens, *hga.parameters()):
        assert value.grad.dtype == torch.float32
        assert torch.isfinite(value.grad).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_by_inductor():
    hga = HGA(96, 64, 4).double().cuda()
    tokens = torch.randn(4, 36, 96, device="cuda", dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 5, 36, device="cuda", dtype=torch.float64).softmax(-1)
    compiled = torch.compile(hga, fullgraph=True)
    leaves = [tokens, *hga.parameters()]
    got, wanted = (
        torch.autograd.grad(run(tokens, weights).tokens.square().sum(), leaves)
        for run in (compiled, hga)
    )
    assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def peak(run):
    """Peak of the allocator during one call, beyond what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("frozen", "part"), [(False, 0.55), (True, 0.3)])
def test_memory_against_multihead_attention(frozen, part):
    """At the paper's sizes, 256 frames."""
    mha = nn.MultiheadAttention(768, 8, batch_first=True).cuda()
    hga = HGA.from_multihead_attention(mha)
    tokens = torch.randn(256, 256, 768, device="cuda", requires_grad=not frozen)
    queries = torch.randn(256, 10, 768, device="cuda", requires_grad=not frozen)

    def usual():
        out = mha(queries, tokens, tokens, need_weights=False)[0]
        given = [] if frozen else [queries, tokens]
        torch.autograd.grad(out.sum(), [*given, *mha.parameters()])

    def ours():
        out = hga.to_output(
            region_attention(
                hga.to_query(queries),
                tokens,
                hga.to_key.weight,
                hga.to_value.weight,
                hga.to_value.bias,
                num_heads=8,
                implementation="folded",
            ).context
        )
        layers = (hga.to_query, hga.to_key, hga.to_value, hga.to_output)
        weights = [weight for layer in layers for weight in layer.parameters()]
        torch.autograd.grad(out.sum(), [*([] if frozen else [queries, tokens]), *weights])

    with mock.patch.object(FOLDED, "GPU_CHUNK", 2**22):
        assert peak(ours) <= part * peak(usual)
