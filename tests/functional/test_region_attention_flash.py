"""The adapter of flash-attn against a stand-in that insists on the contract of the real one.

`tests/gpu/test_region_attention_cuda.py` runs the real one.
"""

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from mmau.functional.region_attention import region_attention, require_region_attention
from mmau.modules.hga import HGA
from mmau.registry import MissingDependencyError

# By import: the function of the same name hides the package from attribute look-up.
FLASH = importlib.import_module("mmau.functional.region_attention")


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Signature of flash-attn 2.8; `(b, seqlen, heads, headdim)` in half precision."""
    for tensor in (q, k, v):
        assert tensor.ndim == 4
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.dtype == q.dtype
        assert tensor.stride(-1) == 1
        assert tensor.shape[0] == q.shape[0]
        assert tensor.shape[2:] == q.shape[2:], "heads and their width come last"
    assert k.shape == v.shape
    assert q.shape[-1] <= 256
    assert not causal
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bmhi,bphi->bhmp", q.float(), k.float()) * scale
    return torch.einsum("bhmp,bphi->bmhi", scores.softmax(-1), v.float()).to(q.dtype)


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in where flash-attn would be, on a device that every machine has."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(FLASH, "DEVICE", "cpu")
    monkeypatch.setattr(FLASH, "_LOADED", {})


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(FLASH, "_LOADED", {})


def arguments(m=5, p=9, d=8, e=12, dtype=torch.float32):
    shapes = ((2, 3, m, d), (2, 3, p, e), (d, e), (d, e), (d,))
    return [(0.5 * torch.randn(s) + 0.3).to(dtype).requires_grad_() for s in shapes]


# Half of the distance between neighbours, relative, and a few roundings.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("return_attention", [False, True])
@pytest.mark.usefixtures("stand_in")
def test_equals_sdpa(dtype, tolerance, autocast, return_attention):
    args = arguments(dtype=torch.float32 if autocast else dtype)
    exact = [argument.detach().double().requires_grad_() for argument in args]
    options = {"num_heads": 2, "return_attention": return_attention}
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = region_attention(*args, implementation="flash", **options)
    expected = region_attention(*exact, implementation="sdpa", **options)
    assert out.context.dtype == dtype
    direction = torch.randn_like(expected.context)
    got = torch.autograd.grad((out.context.double() * direction).sum(), args)
    wanted = torch.autograd.grad((expected.context * direction).sum(), exact)
    pairs = [(out.context, expected.context), *zip(got, wanted, strict=True)]
    if return_attention:
        assert out.attention.shape == (2, 3, 2, 5, 9)
        pairs.append((out.attention, expected.attention))
    else:
        assert out.attention is None
    for low, high in pairs:
        assert (low.double() - high).norm() < tolerance * high.norm()


@pytest.mark.usefixtures("stand_in")
def test_hga_with_flash():
    hga = HGA(32, 32, 4, attention="flash")
    tokens, weights = torch.randn(2, 16, 32, requires_grad=True), torch.rand(2, 3, 16).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        low = hga(tokens, weights).tokens
    hga.attention = "sdpa"
    exact = hga(tokens, weights).tokens
    assert (low - exact).norm() / exact.norm() < 0.03
    low.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in hga.parameters())
    assert "attention='flash'" in repr(HGA(8, 8, 2, attention="flash"))


@pytest.mark.usefixtures("stand_in")
def test_auto_never_means_flash(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("auto called flash-attn")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", refuse)
    for m in (1, 100):
        region_attention(*arguments(m=m, dtype=torch.bfloat16), num_heads=2)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": torch.float32}, r"needs float16 or bfloat16, .* got torch.float32"),
        ({"d": 520, "e": 3}, "heads of at most 256 channels; got 260"),
        ({"mask": torch.ones(2, 3, 9, dtype=torch.bool)}, "takes no `mask`; use 'folded' or"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, sentence):
    mask = change.pop("mask", None)
    args = arguments(**{"dtype": torch.bfloat16, **change})
    with pytest.raises(ValueError, match=sentence):
        region_attention(*args, num_heads=2, mask=mask, implementation="flash")


def test_other_devices_are_refused():
    with pytest.raises(
        ValueError, match=r"'flash'` needs tensors on a CUDA device; got cpu\. 'fold"
    ):
        region_attention(*arguments(), num_heads=2, implementation="flash")


@pytest.mark.usefixtures("absent")
def test_a_missing_library_is_named_when_the_module_is_built():
    sentence = r"attention with 'flash' needs 'flash_attn', .* pip install \"mmau\[gpu\]\""
    with pytest.raises(MissingDependencyError, match=sentence):
        HGA(8, 8, 2, attention="flash")
    require_region_attention("sdpa")
    with pytest.raises(ValueError, match="`implementation` must be one of"):
        require_region_attention("flashy")


def test_the_stand_in_has_the_signature_of_the_real_one():
    flash_attn = pytest.importorskip("flash_attn", reason="needs flash-attn")
    assert inspect.signature(flash_attn.flash_attn_func) == inspect.signature(flash_attn_func)
