"""The adapter of mamba-ssm, with a stand-in for the compiled kernel, which needs CUDA.

The stand-in refuses what the kernel refuses (shapes, strides, dtypes) and computes its recurrence,
Euler's, in plain torch. Float64 passes here, so that agreement can be close; the registered
backend declares float32 only. The real kernel is tested in `tests/gpu`.
"""

import dataclasses
import math
import sys
import types

import pytest
import torch
from torch.testing import assert_close

from mmau.registry import MissingDependencyError
from mmau.scan import SCAN_BACKENDS, reference, selective_scan
from mmau.scan import mamba_ssm as adapter
from mmau.testing import check_scan_backend


def euler_scan(u, delta, A, B, C):
    """What the kernel computes, group by group of channels."""
    channels = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(channels, 1), C.repeat_interleave(channels, 1)
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    return torch.stack(outputs, -1)


class FakeKernel(types.ModuleType):
    """`selective_scan_cuda`, as its C++ source checks its arguments."""

    def __init__(self):
        super().__init__("selective_scan_cuda")
        self.calls = []

    def check(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        (b, d, t), n, groups = u.shape, A.shape[1], B.shape[1]
        assert (D, z, delta_bias, delta_softplus) == (None, None, None, False)
        assert u.dtype == delta.dtype == B.dtype == C.dtype == A.dtype
        assert A.dtype in (torch.float32, torch.float64)
        assert (delta.shape, A.shape) == ((b, d, t), (d, n))
        assert B.shape == C.shape == (b, groups, n, t)
        assert n <= 256
        assert d % groups == 0
        for tensor in (u, delta, B, C):
            assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        # It allocates these gradients like so and then writes with the last axis innermost.
        for tensor in (u, delta):
            assert torch.empty_like(tensor).stride(-1) == 1 or t == 1
        for tensor in (B, C):
            assert torch.zeros_like(tensor).stride(-1) == 1 or t == 1
        return -(-t // 2048)

    def fwd(self, *arguments):
        chunks = self.check(*arguments)
        u, _, A, B, C = arguments[:5]
        self.calls.append({"groups": B.shape[1], "C_strides": C.stride(), "frames": u.shape[2]})
        states = u.new_zeros(*u.shape[:2], chunks, 2 * A.shape[1])
        with torch.no_grad():
            return [euler_scan(*arguments[:5]), states]

    def bwd(self, *arguments):
        chunks = self.check(*arguments[:8], arguments[12])
        inputs, (grad, states, out, grad_z) = arguments[:5], arguments[8:12]
        u, A = inputs[0], inputs[2]
        assert (out, grad_z, arguments[13:]) == (None, None, (False,))
        assert (grad.shape, grad.dtype) == (u.shape, u.dtype)
        assert grad.stride(-1) == 1
        assert states.shape == (*u.shape[:2], chunks, 2 * A.shape[1])
        assert states.is_contiguous()
        inputs = [v.detach().clone().requires_grad_() for v in inputs]
        with torch.enable_grad():
            grads = torch.autograd.grad(euler_scan(*inputs), inputs, grad)
        return [*grads, None, None]


@pytest.fixture
def kernel(monkeypatch):
    fake = FakeKernel()
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", fake)
    return fake


def make(b=2, t=9, d=4, n=3, dtype=torch.float64, *, requires_grad=True):
    """Some steps are 0, some tiny: where `phi` and its derivative need care."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    delta = torch.nn.functional.softplus(2 * normal(b, t, d) - 2)
    delta[:, 1::4] *= 1e-6
    delta[:, 2::4] = 0
    A = -torch.arange(1, n + 1) * torch.exp(0.3 * normal(d, n))
    tensors = (2 + normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n), normal(b, d, n))
    return [tensor.to(dtype).requires_grad_(requires_grad) for tensor in tensors]


@pytest.mark.parametrize("slice_elements", [1, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_contract_of_all_backends(kernel, monkeypatch, dtype, slice_elements):
    """The registered record, except for where it runs and that the stand-in knows float64."""
    monkeypatch.setattr(adapter, "SLICE_ELEMENTS", slice_elements)
    there = SCAN_BACKENDS.get("mamba_ssm")
    here = {"devices": frozenset({"cpu"}), "dtypes": frozenset({dtype})}
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    check_scan_backend(dataclasses.replace(there, **here), lengths=(1, 5, 9), tolerance=tolerance)


def test_only_what_needs_it_has_one_group_per_channel(kernel):
    """`C` is never copied per channel, and plain Euler needs no copies at all."""
    x, delta, A, B, C, h = make(requires_grad=False)
    adapter.scan(x, delta, A, B, C)
    adapter.scan(x, delta, A, B, C, initial_state=h, discretization="euler")
    adapter.scan(x, delta, A, B, C, discretization="euler")
    exact, from_state, plain = kernel.calls
    assert (exact["groups"], exact["C_strides"][1], exact["frames"]) == (4, 0, 9 + 3)
    assert (from_state["groups"], from_state["C_strides"][1]) == (4, 0)
    assert from_state["frames"] == 1 + 9 + 3
    assert (plain["groups"], plain["frames"]) == (1, 9 + 3)


def test_a_gradient_without_strides_is_laid_out_for_the_kernel(kernel):
    """That of a sum is one number, expanded."""
    x, delta, A, B, C, _ = make()
    u, step = x.transpose(1, 2).contiguous(), delta.transpose(1, 2).contiguous()
    B_, C_ = (v.transpose(1, 2).unsqueeze(1).contiguous() for v in (B, C))
    one = torch.autograd.grad(adapter._Kernel.apply(u, step, A, B_, C_).sum(), (x, A))
    y, _ = reference.scan(x, delta, A, B, C, discretization="euler")
    other = torch.autograd.grad(y.sum(), (x, A))
    for grad, wanted in zip(one, other, strict=True):
        assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-3, 0.1, 0.49, 0.51, 1.0, 20.0])
def test_phi_and_its_derivative_keep_their_digits(step):
    """Differentiating `expm1(z) / z` as it stands is off by 6 % at 1e-6 in float32."""
    z = -torch.tensor([step], dtype=torch.float64)
    # (exp(z) - phi) / z is the integral of s exp(s z) over s in 0..1, and phi that of exp(s z).
    nodes = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    phi, derivative = torch.exp(nodes * z).mean(), (nodes * torch.exp(nodes * z)).mean()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-7)):
        assert_close(adapter._phi(z.to(dtype)).double()[0], phi, rtol=tolerance, atol=0)
        close = adapter._phi_derivative(z.to(dtype)).double()[0]
        assert_close(close, derivative, rtol=tolerance, atol=0)


def test_fp32_gradients_are_accurate_at_small_steps(kernel):
    inputs = make(t=64, dtype=torch.float64)[:5]
    with torch.no_grad():
        inputs[1].fill_(1e-4)
    single = [v.detach().float().requires_grad_() for v in inputs]
    wanted = torch.autograd.grad(reference.scan(*inputs)[0].square().sum(), inputs)
    grads = torch.autograd.grad(adapter.scan(*single)[0].square().sum(), single)
    for one, other in zip(grads, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


# ------------------------------------------------------------------ errors
def test_without_the_compiled_kernel_it_is_refused_when_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))  # proves nothing
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    message = r"'mamba_ssm' needs 'selective_scan_cuda'.*not installed.*mmau\[gpu\]"
    with pytest.raises(MissingDependencyError, match=message):
        SCAN_BACKENDS.get("mamba_ssm")


def test_a_kernel_built_for_another_torch_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "selective_scan_cuda.py"
    broken.write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"does not load \(undefined symbol: _ZN3c10\); build mamba-ssm again"
    with pytest.raises(MissingDependencyError, match=message):
        SCAN_BACKENDS.get("mamba_ssm")


def test_it_declares_what_it_cannot_do(kernel):
    record = SCAN_BACKENDS.get("mamba_ssm")
    inputs = make(dtype=torch.float32, requires_grad=False)[:5]
    with pytest.raises(ValueError, match="'mamba_ssm' runs on 'cuda'; got tensors on 'cpu'"):
        selective_scan(*inputs, backend="mamba_ssm")
    offer = {"discretization": "zoh", "device": "cuda"}
    with pytest.raises(ValueError, match="'mamba_ssm' cannot reset its state inside a sequence"):
        record.check(**offer, dtype=torch.float32, reset=True)
    with pytest.raises(ValueError, match=r"computes in torch\.float32; got torch\.float64"):
        record.check(**offer, dtype=torch.float64)
    assert not kernel.calls
    with pytest.raises(AttributeError, match="has no attribute 'BACKENDS'"):
        adapter.BACKENDS  # noqa: B018


def test_sizes_that_the_kernel_would_miscount_are_refused(kernel):
    one = torch.ones(1, 1, 1)
    x, B = one.expand(1, 2, 2), one.expand(1, 2, 257)
    message = "'mamba_ssm' takes at most 256 states per channel; got 257"
    with pytest.raises(ValueError, match=message):
        adapter.scan(x, x, -torch.ones(2, 257), B, B)
    x, B = one.expand(64, 2**14, 2**9), one.expand(64, 2**14, 16)
    message = f"counts to {2**32} elements; got 64 clips x 512 channels x 16 states x 16400 frames"
    with pytest.raises(ValueError, match=message):
        adapter.scan(x, x, -torch.ones(2**9, 16), B, B)
    assert math.prod((64, 512, 16, 16400)) > 2**32
    assert not kernel.calls
