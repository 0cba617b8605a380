"""The backends of the selective scan on a real GPU: values, gradients, states, bits, memory.

On the CPU the same kernels run in Triton's interpreter, and mamba-ssm's has a stand-in
(`tests/scan/test_scan_triton.py` and `test_scan_mamba_ssm.py`).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmau.registry import MissingDependencyError
from mmau.scan import SCAN_BACKENDS, selective_scan
from mmau.testing import check_scan_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DISCRETIZATIONS = ("zoh", "euler")
# Error relative to the largest value: of an output, of a gradient. mamba-ssm's own tests of float32
# accept 6e-4 of each value plus 2e-3; a parallel scan rounds more often than a sequential one.
TOLERANCES = {"chunked": (2e-6, 1e-5), "triton": (2e-6, 1e-5), "mamba_ssm": (1e-4, 5e-4)}


@pytest.fixture(params=list(TOLERANCES))
def backend(request):
    """The name of each backend that is installed."""
    try:
        SCAN_BACKENDS.get(request.param)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return request.param


def make(b=2, t=150, d=70, n=16, dtype=torch.float64):
    """Inputs and an initial state on the GPU; channels differ, delta spans decades."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device="cuda")

    delta = F.softplus(2 * normal(b, t, d) - 2)
    A = -torch.arange(1, n + 1, device="cuda") * torch.exp(0.3 * normal(d, n))
    inputs = [2 + normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n), normal(b, d, n)]
    return [v.to(dtype) for v in inputs]


def close(one, other, tolerance, what):
    error = (one.double() - other).abs().max().item()
    assert error <= tolerance * other.abs().max().item(), (what, error)


def test_it_keeps_the_contract_of_all_backends(backend):
    tolerance = TOLERANCES[backend][1] if backend == "mamba_ssm" else None
    check_scan_backend(backend, device="cuda", tolerance=tolerance)


# One frame, borders of a chunk of 64, the border of the compiled kernel's chunk, one odd size.
@pytest.mark.parametrize(
    "sizes",
    [{"t": 1}, {"t": 64}, {"t": 65}, {"t": 2049, "d": 8}, {"t": 150, "b": 3, "d": 33, "n": 5}],
)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients(backend, discretization, sizes, with_state):
    inputs = make(**sizes) if with_state else make(**sizes)[:5]
    names = ("y", "state", "x", "delta", "A", "B", "C", "h0")
    weights = torch.randn_like(inputs[0]), torch.randn_like(make(**sizes)[5])

    def run(name, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        y, state = selective_scan(
            *leaves[:5],
            initial_state=leaves[5] if with_state else None,
            discretization=discretization,
            return_state=True,
            backend=name,
        )
        total = (y * weights[0]).sum() + (state * weights[1]).sum()
        return y, state, *torch.autograd.grad(total, leaves)

    exact, single = run("reference", torch.float64), run(backend, torch.float32)
    for name, one, other in zip(names, single, exact, strict=False):
        close(one, other, TOLERANCES[backend][name not in ("y", "state")], name)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.1, 1.0, 20.0])
def test_fp32_is_accurate_from_tiny_to_huge_steps(backend, step):
    x, _, A, B, C, _ = make(dtype=torch.float32)
    delta = torch.full_like(x, step)
    exact = selective_scan(*(v.double() for v in (x, delta, A, B, C)), backend="reference")
    y = selective_scan(x, delta, A, B, C, backend=backend)
    close(y, exact, TOLERANCES[backend][0], step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_rounded_only_at_the_end(backend, dtype):
    inputs = [v.to(dtype).requires_grad_() for v in make()]
    A = inputs[2].detach().float()
    x, delta, _, B, C, h = inputs
    args = {"initial_state": h, "return_state": True, "backend": backend}
    y, state = selective_scan(x, delta, A, B, C, **args)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    single = [v.detach().float() for v in (x, delta, A, B, C)]
    full, full_state = selective_scan(*single, **{**args, "initial_state": h.detach().float()})
    assert torch.equal(y, full.to(dtype))
    assert torch.equal(state, full_state)
    grads = torch.autograd.grad(y.float().sum(), [x, delta, B, C])
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)
    with torch.autocast("cuda", dtype):
        again, _ = selective_scan(*single, **{**args, "initial_state": h.detach().float()})
    assert torch.equal(again, full)


def test_half_inputs_of_the_kernel_itself():
    """Without casts before and after, and with `A` in float32 beside the others."""
    pytest.importorskip("triton")
    from mmau.scan import triton as scan_triton

    x, delta, A, B, C, h = (v.bfloat16() for v in make())
    A = A.float()
    y, state = scan_triton.scan(x, delta, A, B, C, initial_state=h)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    single = [v.float() for v in (x, delta, A, B, C)]
    full, full_state = scan_triton.scan(*single, initial_state=h.float())
    # Another dtype is another binary, which may fuse other multiply-adds; then one rounding.
    assert_close(y.float(), full, rtol=2**-8, atol=1e-5)
    close(state, full_state.double(), 2e-6, "state")


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_two_runs_give_the_same_bits(backend, discretization):
    """mamba-ssm adds some gradients atomically, so of it only the outputs are asked."""
    inputs = [v.requires_grad_() for v in make(b=4, t=300, dtype=torch.float32)]

    def run():
        y, state = selective_scan(
            *inputs[:5],
            initial_state=inputs[5],
            discretization=discretization,
            return_state=True,
            backend=backend,
        )
        if backend == "mamba_ssm":
            return y, state
        return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), inputs)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_chunks_are_the_whole(backend):
    x, delta, A, B, C, h = make(dtype=torch.float32)
    args = {"return_state": True, "backend": backend}
    whole, final = selective_scan(x, delta, A, B, C, initial_state=h, **args)
    chunks = []
    for part in (slice(0, 1), slice(1, 64), slice(64, 150)):
        chunk, h = selective_scan(
            *(v[:, part] for v in (x, delta)),
            A,
            *(v[:, part] for v in (B, C)),
            initial_state=h,
            **args,
        )
        chunks.append(chunk)
    y = torch.cat(chunks, dim=1)
    if backend == "triton":  # one frame after the other, wherever the chunks end
        assert torch.equal(y, whole)
        assert torch.equal(h, final)
    close(y, whole.double(), TOLERANCES[backend][0], "y")
    close(h, final.double(), TOLERANCES[backend][0], "state")


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_a_masked_frame_does_not_exist(backend, discretization):
    x, delta, A, B, C, h = make(dtype=torch.float32)
    mask = torch.rand(x.shape[:2], device="cuda") < 0.7
    for tensor in (x, delta, B, C):
        tensor[~mask] = math.nan
    args = {"discretization": discretization, "backend": backend, "return_state": True}
    inputs = [v.requires_grad_() for v in (x, delta, A, B, C, h)]
    y, state = selective_scan(*inputs[:5], initial_state=h, mask=mask, **args)
    grads = torch.autograd.grad(y.sum() + state.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert not y[~mask].any()
    for clip in range(len(x)):
        kept = [v[clip : clip + 1, mask[clip]] for v in (x, delta, B, C)]
        alone, alone_state = selective_scan(
            *kept[:2], A, *kept[2:], initial_state=h[clip : clip + 1], **args
        )
        close(y[clip, mask[clip]], alone[0].double(), TOLERANCES[backend][0], "y")
        close(state[clip], alone_state[0].double(), TOLERANCES[backend][0], "state")


def test_packed_clips_do_not_see_each_other(backend):
    if not SCAN_BACKENDS.get(backend).takes_reset:
        pytest.skip(f"{backend} has no resets")
    x, delta, A, B, C, h = make(dtype=torch.float32)
    x[:, :70] = math.nan
    reset = torch.zeros(x.shape[:2], dtype=torch.bool, device="cuda")
    reset[:, 70] = True
    args = {"return_state": True, "backend": backend}
    packed, state = selective_scan(x, delta, A, B, C, initial_state=h, reset=reset, **args)
    rest = [v[:, 70:] for v in (x, delta, B, C)]
    alone, alone_state = selective_scan(*rest[:2], A, *rest[2:], **args)
    close(packed[:, 70:], alone.double(), TOLERANCES[backend][0], "y")
    close(state, alone_state.double(), TOLERANCES[backend][0], "state")


@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_it_compiles_as_one_graph(name):
    if name == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    record = SCAN_BACKENDS.get(name)
    inputs = [v.requires_grad_() for v in make(dtype=torch.float32)[:5]]

    def run(*v):
        return selective_scan(*v, backend=record)

    compiled = torch.compile(run, fullgraph=True)
    assert_close(compiled(*inputs), run(*inputs))
    one, other = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, run))
    for grad, wanted in zip(one, other, strict=True):
        assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_fused_gate_and_softplus():
    pytest.importorskip("triton")
    from mmau.scan import triton as scan_triton

    x, _, A, B, C, h = make(dtype=torch.float32)
    logits, gate = torch.randn(2, *x.shape, device="cuda")
    logits = 4 * logits - 6
    logits[:, 7], gate[:, 9] = -math.inf, math.inf
    bias = torch.randn(x.shape[2], device="cuda")
    leaves = [v.requires_grad_() for v in (x, logits, bias, A, B, C, h, gate)]
    y, state = scan_triton.gated_scan(*leaves[:6], gate_logits=gate, initial_state=h)
    grads = torch.autograd.grad(y.sum() + state.sum(), leaves)
    double = [v.detach().double().requires_grad_() for v in leaves]
    x, logits, bias, A, B, C, h, gate = double
    delta = F.softplus(logits + bias)
    wanted, wanted_state = selective_scan(
        *(x * torch.sigmoid(gate), delta, A, B, C),
        initial_state=h,
        return_state=True,
        backend="reference",
    )
    expected = torch.autograd.grad(wanted.sum() + wanted_state.sum(), double)
    close(y, wanted, 2e-6, "y")
    close(state, wanted_state, 2e-6, "state")
    for index, (one, other) in enumerate(zip(grads, expected, strict=True)):
        close(one, other, 1e-5, index)


def test_memory_of_the_exact_adapter_is_what_its_docstring_says():
    try:
        SCAN_BACKENDS.get("mamba_ssm")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    b, d, n, t = 4, 512, 16, 1024
    inputs = [v.requires_grad_() for v in make(b, t, d, n, dtype=torch.float32)[:5]]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selective_scan(*inputs, backend="mamba_ssm").sum().backward()
    used = torch.cuda.max_memory_allocated() - before
    # A third more for tensors of the size of `x`, each of them 1/16 of one of those three, and
    # for the slices.
    assert used <= 12 * b * d * n * (t + n) * 4 / 3
