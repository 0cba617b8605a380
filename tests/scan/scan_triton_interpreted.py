"""The Triton kernels on the CPU, in Triton's interpreter: tiny shapes, the real code.

`test_scan_triton.py` runs this file in a process of its own, because `TRITON_INTERPRET=1` counts
when the kernels are defined. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/scan/scan_triton_interpreted.py
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmau.modules import AGSSM
from mmau.scan import reference, selective_scan
from mmau.testing import check_scan_backend


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The module of the backend, with chunks of 4 frames so that short clips have borders."""
    from mmau.scan import triton as scan_triton

    assert "cpu" in scan_triton.BACKEND.devices, "run with TRITON_INTERPRET=1"
    monkeypatch.setattr(scan_triton, "CHUNK", 4)
    return scan_triton


def make(b=2, t=11, d=5, n=3):
    """Float64 inputs and an initial state; channels differ, delta spans decades."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    delta = F.softplus(2 * normal(b, t, d) - 2)
    A = -torch.arange(1, n + 1) * torch.exp(0.3 * normal(d, n))
    return [2 + normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n), normal(b, d, n)]


def compare(run, exact, single, inputs, *, tolerance=2e-6):
    """Values and gradients of `run` in float32 against `exact` in float64, each by its maximum."""
    results = []
    for function, dtype in ((exact, torch.float64), (single, torch.float32)):
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        y, state = function(*leaves)
        weights = (torch.cos(torch.arange(v.numel())).view(v.shape).to(dtype) for v in (y, state))
        total = sum((v * w).sum() for v, w in zip((y, state), weights, strict=True))
        results.append((y, state, *torch.autograd.grad(total, leaves)))
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        assert other.dtype == torch.float32
        assert (one - other).abs().max() <= tolerance * one.abs().max(), (run, index)


def test_it_keeps_the_contract_of_all_backends(backend):
    assert backend.BACKEND.compiles
    check_scan_backend("triton", device="cpu", lengths=(1, 5), tolerance=2e-6, bitwise=True)


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
@pytest.mark.parametrize(
    ("sizes", "with_reset", "with_state"),
    [
        ({"t": 1}, False, True),
        ({"t": 4}, True, False),
        ({"t": 11}, True, True),
        ({"t": 5, "d": 20, "n": 16, "b": 1}, False, False),  # two blocks of channels
        ({"t": 3, "d": 1, "n": 1}, False, True),
    ],
)
def test_it_agrees_with_the_reference(backend, discretization, sizes, with_reset, with_state):
    inputs = make(**sizes) if with_state else make(**sizes)[:5]
    reset = torch.rand(inputs[0].shape[:2]) < 0.3 if with_reset else None

    def through(module):
        return lambda *v: module.scan(
            *v[:5],
            initial_state=v[5] if with_state else None,
            reset=reset,
            discretization=discretization,
        )

    compare(discretization, through(reference), through(backend), inputs)


def test_a_reset_inside_a_chunk_separates_packed_clips():
    x, delta, A, B, C, h = (v.float() for v in make())
    x[:, :5] = math.nan
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[:, 5] = True
    args = {"return_state": True, "backend": "triton"}
    packed, state = selective_scan(x, delta, A, B, C, initial_state=h, reset=reset, **args)
    alone = selective_scan(*(v[:, 5:] for v in (x, delta)), A, *(v[:, 5:] for v in (B, C)), **args)
    assert torch.equal(packed[:, 5:], alone[0])
    assert torch.equal(state, alone[1])


def test_channels_need_not_be_neighbours_in_memory():
    inputs = [v.float() for v in make()[:5]]
    strided = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in inputs]
    assert torch.equal(
        selective_scan(*strided, backend="triton"), selective_scan(*inputs, backend="triton")
    )


def test_the_backward_is_deterministic(backend):
    inputs = [v.float().requires_grad_() for v in make(d=20, n=16, t=6)]

    def grads():
        y, state = backend.scan(*inputs[:5], initial_state=inputs[5])
        return torch.autograd.grad(y.sum() + state.square().sum(), inputs)

    assert all(torch.equal(one, other) for one, other in zip(grads(), grads(), strict=True))


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
@pytest.mark.parametrize("with_gate", [False, True])
def test_gate_and_softplus_are_fused(backend, discretization, with_gate):
    x, _, A, B, C, h = make(t=6)
    logits, gate = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    # A frozen frame, an open gate, and steps from 1e-7 (where log(1 + e) has no digits) to 20.
    logits[:, 1], gate[:, 2] = -math.inf, math.inf
    logits[:, 3], logits[:, 4], logits[:, 5] = -16.0, -3.0, 20.0
    inputs = [x, logits, 0.1 * torch.randn(5), A, B, C, h, *([gate] if with_gate else [])]

    def exact(x, logits, bias, A, B, C, h, gate=None):
        x = x if gate is None else x * torch.sigmoid(gate)
        delta = F.softplus(logits + bias)
        return reference.scan(x, delta, A, B, C, initial_state=h, discretization=discretization)

    def fused(x, logits, bias, A, B, C, h, gate=None):
        return backend.gated_scan(
            *(x, logits, bias, A, B, C),
            gate_logits=gate,
            initial_state=h,
            discretization=discretization,
        )

    compare("fused", exact, fused, inputs)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_agssm_runs_gate_softplus_and_scan_in_one_kernel(bidirectional):
    model, exact = (
        AGSSM(5, 4, d_state=3, backend=name, bidirectional=bidirectional)
        for name in ("triton", "reference")
    )
    exact.load_state_dict(model.state_dict())
    # Whoever calls the plain entry has written gate and step to memory.
    for one in (model, model.reversed_scan):
        if one is not None:
            one.backend = dataclasses.replace(one.backend, run=None)
    visual, audio = torch.randn(2, 6, 5), torch.randn(2, 6, 4)
    audio_mask, mask, reset = torch.rand(3, 2, 6) < torch.tensor([0.6, 0.8, 0.2]).view(3, 1, 1)
    visual[~mask], audio[~audio_mask] = math.nan, math.nan
    state = None if bidirectional else torch.randn(2, 5, 3)
    given = {"audio_mask": audio_mask, "mask": mask, "reset": reset, "state": state}
    results = []
    for one in (model, exact):
        out, final = one(visual, audio, **given)
        total = out.square().sum() + (0 if final is None else final.sum())
        results.append((out, final, *torch.autograd.grad(total, list(one.parameters()))))
    assert not results[0][0][~mask].any()
    for fused, composed in zip(*results, strict=True):
        assert_close(fused, composed, rtol=2e-5, atol=2e-6)


def test_softplus_keeps_its_digits(backend):
    """One frame from zero with a constant input: the state is the step, to first order."""
    logits = torch.linspace(-18, 0, 64).view(1, 1, 64)
    one = torch.ones(1, 1, 1)
    y, _ = backend.gated_scan(
        torch.ones(1, 1, 64), logits, torch.zeros(64), -torch.ones(64, 1), one, one,
        discretization="euler",
    )  # fmt: skip
    assert_close(y.double(), torch.log1p(torch.exp(logits.double())), rtol=1e-6, atol=0)


def test_half_inputs_keep_a_float32_state(backend):
    inputs = [v.bfloat16().requires_grad_() for v in make(t=6)[:5]]
    y, state = backend.scan(*inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    single = [v.detach().float() for v in inputs]
    # The interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
    assert_close(y.float(), backend.scan(*single)[0], rtol=2**-7, atol=0)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(backend, fused):
    x, delta, A, B, C, h = (v.float().requires_grad_() for v in make(t=6))
    reset = torch.rand(2, 6) < 0.3
    extra = [torch.randn(2, 6, 5).requires_grad_(), torch.randn(5).requires_grad_()]
    given = (x, delta, A, B, C, h, reset, *(extra if fused else [None, None]), True)
    torch.library.opcheck(backend._OPERATOR.operator, (*given, True))
