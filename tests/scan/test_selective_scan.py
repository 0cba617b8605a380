import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mmau.registry import MissingDependencyError, UnknownComponentError
from mmau.scan import (
    SCAN_BACKENDS,
    ScanBackend,
    chunked,
    compiled,
    half_life,
    selective_scan,
)
from mmau.scan.api import resolve_scan_backend
from mmau.scan.reference import euler, zoh

BACKENDS = ("reference", "chunked")
DISCRETIZATIONS = ("zoh", "euler")


def make(b=2, t=11, d=5, n=3, dtype=torch.float64, *, requires_grad=False, seed=0):
    """Inputs and an initial state; channels and states differ, and delta spans decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = torch.nn.functional.softplus(2 * normal(b, t, d) - 2)
    A = -torch.arange(1, n + 1) * torch.exp(0.3 * normal(d, n))
    tensors = (2 + normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n), normal(b, d, n))
    return [tensor.to(dtype).requires_grad_(requires_grad) for tensor in tensors]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 3 frames at the sizes of `make`, so that short clips have borders inside."""
    monkeypatch.setattr(chunked, "WORK_ELEMENTS", 3 * 2 * 5 * 3)
    monkeypatch.setattr(compiled, "FRAMES_PER_CHUNK", 3)


@pytest.fixture(params=["chunked", "compiled"])
def by_hand(request):
    """The record of each backend with a hand-written backward that runs here."""
    try:
        return SCAN_BACKENDS.get(request.param)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


# ------------------------------------------------------------------ laws
@pytest.mark.parametrize("backend", BACKENDS)
@given(rate=st.floats(0.01, 50), step=st.floats(1e-6, 20), t=st.integers(1, 20))
def test_zero_order_hold_is_exact_for_a_constant_input(backend, rate, step, t):
    """h' = -a h + 1 has h(T) = (1 - exp(-a T)) / a, whatever the step size."""
    one = torch.ones(1, t, 1, dtype=torch.float64)
    y = selective_scan(one, one * step, one[0, :1] * -rate, one, one, backend=backend)
    clock = step * torch.arange(1, t + 1, dtype=torch.float64)
    assert_close(y.flatten(), -torch.expm1(-rate * clock) / rate, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_half_steps_are_one_step(backend):
    """Another property of the exact solution; Euler misses it by 19 % at 0.5."""
    x, _, A, B, C, h = make(t=1)
    delta = torch.full_like(x, 0.5)
    twice = [tensor.repeat(1, 2, 1) for tensor in (x, delta / 2, B, C)]
    whole = selective_scan(x, delta, A, B, C, initial_state=h, backend=backend)
    halves = selective_scan(
        twice[0], twice[1], A, twice[2], twice[3], initial_state=h, backend=backend
    )
    assert_close(halves[:, 1:], whole, rtol=1e-12, atol=1e-12)


def test_discretisations_are_the_written_formulas():
    _, delta, A, B, *_ = make(t=4)
    step = delta.unsqueeze(-1) * A
    A_bar, B_bar = zoh(delta, A, B)
    assert_close(A_bar, torch.exp(step))
    written = (torch.exp(step) - 1) / step * delta.unsqueeze(-1) * B.unsqueeze(-2)
    assert_close(B_bar, written, rtol=1e-9, atol=0)
    A_bar, B_bar = euler(delta, A, B)
    assert_close(A_bar, torch.exp(step))
    assert_close(B_bar, delta.unsqueeze(-1) * B.unsqueeze(-2))
    ratio = zoh(delta * 1e-6, A, B)[1] / euler(delta * 1e-6, A, B)[1]
    assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0)


def test_half_life_is_when_half_is_left():
    seconds = half_life(torch.tensor([0.1]), torch.tensor([[-2.0]]), frame_rate=25.0)
    assert_close(torch.exp(-0.1 * 2.0 * 25.0 * seconds), torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match=r"`frame_rate` must be in \(0, inf\)"):
        half_life(torch.ones(1), torch.ones(1, 1), frame_rate=0.0)


def test_the_direct_path_adds_and_respects_the_mask():
    x, delta, A, B, C, _ = make()
    D = torch.arange(5, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 3] = False
    x[:, 3] = math.nan
    with_path = selective_scan(x, delta, A, B, C, D=D, mask=mask)
    without = selective_scan(x, delta, A, B, C, mask=mask)
    assert_close((with_path - without)[mask], (D * x)[mask])
    assert not with_path[~mask].any()


# ------------------------------------------------------------------ parity
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_gradcheck(by_hand, discretization):
    def run(*inputs, backend):
        return selective_scan(
            *inputs[:5],
            initial_state=inputs[5],
            discretization=discretization,
            return_state=True,
            backend=backend,
        )

    inputs = make(1, 5, 2, 2, requires_grad=True)
    torch.autograd.gradcheck(lambda *v: run(*v, backend=by_hand), inputs)
    torch.autograd.gradgradcheck(lambda *v: run(*v, backend="reference"), inputs)


def errors_in_fp32(inputs, backend="chunked", discretization="zoh"):
    """Largest error of `y` and of each gradient, relative to the largest entry of that tensor.

    The oracle gets the numbers that float32 holds: rounding the inputs is no error of the scan.
    Entry by entry nothing could be promised: at a step of 20 and a rate of 5 the gradient of a step
    is 1e-44, which float32 does not have.
    """
    single = [v.float() for v in inputs]
    exact = [v.double().requires_grad_() for v in single]
    single = [v.requires_grad_() for v in single]
    weight = torch.randn(inputs[0].shape)
    wanted_y = selective_scan(*exact, discretization=discretization, backend="reference")
    y = selective_scan(*single, discretization=discretization, backend=backend)
    wanted = torch.autograd.grad((wanted_y * weight.double()).sum(), exact)
    grads = torch.autograd.grad((y * weight).sum(), single)

    def error(one, other):
        return ((one - other).abs().max() / other.abs().max()).item()

    return error(y, wanted_y), max(map(error, grads, wanted))


@pytest.mark.parametrize("t", [1, 64, 300])
@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3, 0.03, 0.1, 1.0, 20.0])
def test_fp32_gradients_are_accurate_for_uniform_steps(step, t):
    """The demand is 5e-6 for steps of 1e-4 to 1 and 5e-5 outside; we are at 1.3e-6 everywhere."""
    inputs = make(t=t)[:5]
    inputs[1] = torch.full_like(inputs[1], step)
    output_error, gradient_error = errors_in_fp32(inputs)
    assert output_error <= 1e-6
    assert gradient_error <= 3e-6


@pytest.mark.parametrize("t", [1, 64, 300])
@pytest.mark.parametrize("largest", [1.0, 20.0])
def test_fp32_gradients_are_accurate_for_mixed_steps(largest, t):
    inputs = make(t=t)[:5]
    inputs[1] = 1e-6 * torch.exp(torch.rand_like(inputs[1]) * math.log(largest * 1e6))
    output_error, gradient_error = errors_in_fp32(inputs)
    assert output_error <= 1e-6
    assert gradient_error <= 3e-6


@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0, 20.0, None])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_fp32_gradients_of_compiled_are_accurate(step, discretization):
    """`None` spreads the steps over 1e-6..20. Measured 5e-7 at most."""
    try:
        backend = SCAN_BACKENDS.get("compiled")
    except MissingDependencyError as missing:
        pytest.skip(str(missing))
    inputs = make(t=64)[:5]
    if step is None:
        inputs[1] = torch.rand_like(inputs[1]).mul(math.log(2e7)).exp() * 1e-6
    else:
        inputs[1] = torch.full_like(inputs[1], step)
    assert max(errors_in_fp32(inputs, backend, discretization)) <= 2e-6


@pytest.mark.parametrize("sizes", [(2, 5, 3), (2, 128, 9)], ids=["segments", "frame by frame"])
def test_one_small_step_for_many_frames_does_not_add_up_its_rounding(sizes):
    """`1 - w` as a number in float32 is off by up to 3 % of `w` here, always to the same side."""
    b, d, n = sizes
    inputs = make(b, 1500, d, n)[:5]
    inputs[1] = torch.full_like(inputs[1], 1.3e-6)
    output_error, gradient_error = errors_in_fp32(inputs)
    assert output_error <= 2e-6
    assert gradient_error <= 5e-6


@given(exponent=st.floats(-9, 3))
def test_the_lag_of_a_state_is_exact_for_every_step(exponent):
    u = torch.tensor([10.0**exponent], dtype=torch.float32)
    got = chunked._lag(u, -torch.expm1(-u), torch.empty(1), torch.empty(1))
    exact = u.double() + torch.expm1(-u.double())
    if exponent < -3:  # where float64 cancels as well
        exact = u.double() ** 2 / 2 - u.double() ** 3 / 6
    assert_close(got.double(), exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("t", [127, 128, 129, 200])
@pytest.mark.parametrize("with_state", [False, True])
def test_segments_of_the_adjoint_agree_with_the_reference(t, with_state):
    """From 128 frames of a small state on, the backward runs segments at once."""
    inputs = make(t=t, requires_grad=True)
    weight = torch.randn(2, t, 5, dtype=torch.float64)
    grads = []
    for backend in ("chunked", "reference"):
        y, state = selective_scan(
            *inputs[:5],
            initial_state=inputs[5] if with_state else None,
            return_state=True,
            backend=backend,
        )
        total = (y * weight).sum() + (state.square().sum() if with_state else 0)
        grads.append(torch.autograd.grad(total, inputs if with_state else inputs[:5]))
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("short_chunks")
def test_a_second_derivative_is_refused(by_hand):
    inputs = make(requires_grad=True)[:5]
    (grad,) = torch.autograd.grad(
        selective_scan(*inputs, backend=by_hand).sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


# ------------------------------------------------------------------ contract
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("zoh_", [False, True])
def test_opcheck(by_hand, zoh_, with_reset):
    inputs = make(requires_grad=True)
    reset = torch.rand(2, 11) < 0.3 if with_reset else None
    operator = {"chunked": chunked, "compiled": compiled}[by_hand.name]._OPERATOR.operator
    torch.library.opcheck(operator, (*inputs, reset, zoh_, True))
    torch.library.opcheck(operator, (*(v.detach() for v in inputs), reset, zoh_, False))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_as_one_graph_even_when_first_called_inside(backend):
    torch._dynamo.reset()
    inputs = make()[:5]

    def run(*v):
        return selective_scan(*v, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), run(*inputs))


def test_exports_with_a_free_number_of_frames(by_hand):
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan(x, delta, A, B, C, backend=by_hand)

    frames = {1: torch.export.Dim("t", min=2, max=100_000)}
    shapes = {"x": frames, "delta": frames, "A": None, "B": frames, "C": frames}
    program = torch.export.export(Scan(), tuple(make()[:5]), dynamic_shapes=shapes)
    longer = make(t=40)[:5]
    assert_close(program.module()(*longer), selective_scan(*longer))


def test_backends_are_listed_without_importing_them():
    names = {info.name for info in SCAN_BACKENDS.describe()}
    assert names >= set(BACKENDS)
    assert all(SCAN_BACKENDS.get(name).name == name for name in BACKENDS)
    assert resolve_scan_backend("auto") is SCAN_BACKENDS.get("chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_values_give_shapes(backend, grad):
    inputs = make(requires_grad=grad)
    meta = [v.detach().to("meta").requires_grad_(grad) for v in inputs]
    y, state = selective_scan(*meta[:5], initial_state=meta[5], return_state=True, backend=backend)
    assert (y.device.type, tuple(y.shape), tuple(state.shape)) == ("meta", (2, 11, 5), (2, 5, 3))
    if grad:
        (y.sum() + state.sum()).backward()
        assert all(v.grad.shape == v.shape for v in meta)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(v) for v in inputs[:5]]
        assert selective_scan(*fake, backend=backend).shape == (2, 11, 5)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("zoh_", [False, True])
def test_the_operator_of_the_compiler_and_the_eager_path_give_the_same_bits(by_hand, zoh_):
    inputs = make(requires_grad=True)
    both = {"chunked": chunked, "compiled": compiled}[by_hand.name]._OPERATOR
    eager, operator = (run(*inputs, None, zoh_, True) for run in (both.eager.apply, both.operator))
    for one, other in zip(eager, operator, strict=True):
        assert torch.equal(one, other)
    grads = [torch.autograd.grad(out[0].sum() + out[1].sum(), inputs) for out in (eager, operator)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ bits
@pytest.mark.parametrize("sizes", [(1, 64, 16), (16, 64, 16), (2, 24, 4)])
def test_at_real_widths_frame_by_frame_is_bitwise_the_whole(sizes):
    """Masked frames among them, and a border of chunks of 256, 16 and 1365 frames."""
    (b, d, n), t = sizes, 40
    x, delta, A, B, C, h = make(b, t, d, n, dtype=torch.float32)
    mask = torch.rand(b, t) < 0.8
    whole, final = selective_scan(x, delta, A, B, C, initial_state=h, mask=mask, return_state=True)
    for i in range(t):
        one = slice(i, i + 1)
        y, h = selective_scan(
            x[:, one], delta[:, one], A, B[:, one], C[:, one],
            initial_state=h, mask=mask[:, one], return_state=True,
        )  # fmt: skip
        assert torch.equal(y, whole[:, one])
    assert torch.equal(h, final)


@pytest.mark.slow
def test_memory_of_inference_does_not_grow_with_the_clip():
    """Beyond its output, a forward without gradients needs its two work buffers."""
    code = """
import resource, torch
from mmau.scan import selective_scan
torch.set_num_threads(1)
t = 40_000
x, delta = torch.ones(1, t, 64), torch.ones(1, t, 64)
B, C = torch.ones(1, t, 16), torch.ones(1, t, 16)
A = -torch.ones(64, 16)
selective_scan(x[:, :5000], delta[:, :5000], A, B[:, :5000], C[:, :5000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = selective_scan(x, delta, A, B, C)
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - y.numel() * 4 // 1024
assert extra < 8 * 1024, extra
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ errors
def call(change=None, **options):
    inputs = dict(zip(("x", "delta", "A", "B", "C"), make()[:5], strict=True))
    inputs.update(change or {})
    return selective_scan(**inputs, **options)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (
            {"A": torch.ones(5, 3)},
            {},
            ValueError,
            r"`A` must be below 0 everywhere.*got a maximum of 1\.",
        ),
        ({"A": torch.zeros(5, 3)}, {}, ValueError, "`A` must be below 0 everywhere"),
        ({"A": -torch.ones(5, 4)}, {}, ValueError, "axis `n` is 4 in `A` but 3 in `B`"),
        (
            {"delta": -torch.ones(2, 11, 5)},
            {},
            ValueError,
            "`delta` must be at least 0 .apply softplus",
        ),
        (
            {"delta": torch.ones(2, 10, 5)},
            {},
            ValueError,
            "axis `t` is 11 in `x` but 10 in `delta`",
        ),
        ({"B": torch.ones(2, 3)}, {}, ValueError, r"`B` must have shape \(b, t, n\)"),
        (
            {"x": torch.ones(2, 11, 5, dtype=torch.long)},
            {},
            TypeError,
            "`x` must be a floating-point",
        ),
        (
            {},
            {"initial_state": torch.ones(2, 3, 5)},
            ValueError,
            "axis `d` is 5 in `x` but 3 in `init",
        ),
        ({}, {"mask": torch.ones(2, 11)}, TypeError, "`mask` must be a bool tensor.*float32"),
        ({}, {"reset": torch.ones(2, 11).int()}, TypeError, "`reset` must be a bool tensor.*int32"),
        (
            {},
            {"mask": torch.ones(2, 9).bool()},
            ValueError,
            "axis `t` is 11 in `x` but 9 in `mask`",
        ),
        ({}, {"D": torch.ones(4)}, ValueError, "axis `d` is 5 in `x` but 4 in `D`"),
        (
            {},
            {"discretization": "bilinear"},
            ValueError,
            "`discretization` must be one of 'euler', 'zoh' for the scan backend 'chunked'; got 'b",
        ),
        (
            {},
            {"backend": "chunkd"},
            UnknownComponentError,
            "no scan backend named 'chunkd'; did you mean 'chunked'?",
        ),
    ],
)
def test_bad_input_is_refused(change, options, error, message):
    with pytest.raises(error, match=message):
        call(change, **options)


@pytest.mark.parametrize(
    ("offer", "options", "message"),
    [
        (
            {"devices": frozenset({"cuda"})},
            {},
            "backend 'small' runs on 'cuda'; got tensors on 'cpu'",
        ),
        (
            {"dtypes": frozenset({torch.float32})},
            {},
            "computes in torch.float32; got torch.float64",
        ),
        ({"takes_state": False}, {"return_state": True}, "'small' has no initial or final state"),
        (
            {"takes_reset": False},
            {"reset": torch.zeros(2, 11).bool()},
            "'small' cannot reset its state",
        ),
        (
            {"discretizations": frozenset({"euler"})},
            {},
            "`discretization` must be one of 'euler' for the scan backend 'small'; got 'zoh'",
        ),
    ],
)
def test_what_a_backend_does_not_declare_is_refused(offer, options, message):
    record = ScanBackend(name="small", run=SCAN_BACKENDS.get("reference").run, **offer)
    with pytest.raises(ValueError, match=message):
        call(backend=record, **options)


def test_a_plug_in_that_is_no_record_is_refused(monkeypatch):
    monkeypatch.setattr(SCAN_BACKENDS, "get", lambda name: print)
    with pytest.raises(TypeError, match="'other' must be a ScanBackend record; its package regist"):
        resolve_scan_backend("other")


@pytest.mark.parametrize("keep", [False, True])
def test_what_comes_out_may_enter_a_graph(keep):
    """The kernels work on tensors that no graph may keep; none of them gets out."""
    x, delta, A, B, C = make()[:5]
    x = x.requires_grad_(keep)
    y, state = selective_scan(x, delta, A, B, C, return_state=True, backend="chunked")
    scale = torch.ones((), dtype=y.dtype, requires_grad=True)
    (y.detach().mul(scale).sum() + state.detach().mul(scale).square().sum()).backward()
    assert not y.is_inference()
    assert not state.is_inference()
    if keep:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert not grad.is_inference()
