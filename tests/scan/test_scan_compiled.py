import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from mmau.registry import MissingDependencyError
from mmau.scan import SCAN_BACKENDS, selective_scan
from mmau.scan import compiled as compiled_scan
from mmau.testing import check_scan_backend

DISCRETIZATIONS = ("zoh", "euler")


@pytest.fixture(scope="module")
def compiled():
    """The record of the backend; the first use on a machine compiles it."""
    try:
        return SCAN_BACKENDS.get("compiled")
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(compiled_scan, "FRAMES_PER_CHUNK", 3)


def make(b=2, t=11, d=5, n=3, dtype=torch.float64, *, requires_grad=False, seed=0):
    """Inputs and an initial state; channels and states differ, and delta spans decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = torch.nn.functional.softplus(2 * normal(b, t, d) - 2)
    A = -torch.arange(1, n + 1) * torch.exp(0.3 * normal(d, n))
    tensors = (2 + normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n), normal(b, d, n))
    return [tensor.to(dtype).requires_grad_(requires_grad) for tensor in tensors]


def values_and_gradients(inputs, backend, weights, **options):
    y, state = selective_scan(
        *inputs[:5], initial_state=inputs[5], return_state=True, backend=backend, **options
    )
    total = (y * weights[0]).sum() + (state * weights[1]).sum()
    return y, state, *torch.autograd.grad(total, inputs)


def draw_weights(b, t, d, n):
    return torch.randn(b, t, d, dtype=torch.float64), torch.randn(b, d, n, dtype=torch.float64)


# ------------------------------------------------------------------ parity
# Around the eight lanes of a vector, the sixteen states known at compile time, the 64 channels of a
# group and the 32 frames of a chunk.
@pytest.mark.parametrize(
    ("t", "d", "n"),
    [(1, 1, 1), (2, 7, 16), (31, 8, 3), (32, 9, 16), (33, 64, 4), (65, 65, 16), (70, 130, 2)],
)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_it_agrees_with_the_reference(compiled, t, d, n, discretization, with_reset):
    inputs = make(t=t, d=d, n=n, requires_grad=True)
    weights = draw_weights(2, t, d, n)
    options = {
        "discretization": discretization,
        "reset": torch.rand(2, t) < 0.2 if with_reset else None,
    }
    one = values_and_gradients(inputs, compiled, weights, **options)
    other = values_and_gradients(inputs, "reference", weights, **options)
    for ours, theirs in zip(one, other, strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_gradcheck(compiled, discretization):
    def run(*inputs):
        return selective_scan(
            *inputs[:5],
            initial_state=inputs[5],
            discretization=discretization,
            return_state=True,
            backend=compiled,
        )

    torch.autograd.gradcheck(run, make(1, 5, 2, 2, requires_grad=True))


@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0, 20.0, None])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_fp32_is_accurate_from_tiny_to_huge_steps(compiled, discretization, step):
    """`None` spreads the steps over 1e-6..20."""
    inputs = make(t=64)[:5]
    if step is None:
        inputs[1] = torch.rand_like(inputs[1]).mul(math.log(2e7)).exp() * 1e-6
    else:
        inputs[1] = torch.full_like(inputs[1], step)
    weight = torch.randn(2, 64, 5, dtype=torch.float64)
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, compiled)):
        typed = [v.to(dtype).requires_grad_() for v in inputs]
        y = selective_scan(*typed, discretization=discretization, backend=backend)
        found.append((y, *torch.autograd.grad((y * weight.to(dtype)).sum(), typed)))
    for name, exact, single in zip(("y", "x", "delta", "A", "B", "C"), *found, strict=True):
        # Measured 5e-7 at most: no gradient subtracts nearly equal numbers.
        assert (single - exact).abs().max() <= 2e-6 * exact.abs().max(), name


# ------------------------------------------------------------------ laws, to the bit
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("cuts", [range(1, 11), [4], [1, 9]])
@pytest.mark.parametrize("n", [3, 16])
def test_pieces_with_a_carried_state_give_the_same_bits(compiled, discretization, dtype, cuts, n):
    x, delta, A, B, C, h = make(dtype=dtype, n=n)
    args = {"discretization": discretization, "backend": compiled, "return_state": True}
    whole, final = selective_scan(x, delta, A, B, C, initial_state=h, **args)
    pieces = []
    for start, end in itertools.pairwise([0, *cuts, 11]):
        x_, delta_, B_, C_ = (v[:, start:end] for v in (x, delta, B, C))
        piece, h = selective_scan(x_, delta_, A, B_, C_, initial_state=h, **args)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(h, final)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("frames", [[0, 1, 2, 3], [5, 6, 7], [2, 5, 10]])
def test_a_masked_frame_does_not_exist(compiled, discretization, frames):
    inputs = make(requires_grad=True)
    x, delta, A, B, C, h = inputs
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, frames] = True
    args = {"discretization": discretization, "backend": compiled, "return_state": True}
    x_, delta_, B_, C_ = (v[:, frames] for v in (x, delta, B, C))
    y, state = selective_scan(x_, delta_, A, B_, C_, initial_state=h, **args)
    expected = torch.autograd.grad(y.square().sum() + state.sum(), inputs)
    spoilt = [v.detach().masked_fill(~mask[..., None], math.nan) for v in (x, delta, B, C)]
    x_, delta_, B_, C_ = (v.requires_grad_() for v in spoilt)
    y_, state_ = selective_scan(x_, delta_, A, B_, C_, initial_state=h, mask=mask, **args)
    assert torch.equal(y_[:, frames], y)
    assert torch.equal(state_, state)
    assert not y_[~mask].any()
    grads = torch.autograd.grad(y_.square().sum() + state_.sum(), [x_, delta_, A, B_, C_, h])
    for grad, without in zip(grads, expected, strict=True):
        assert_close(grad, without, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_packed_clips_do_not_see_each_other(compiled, discretization):
    x, delta, A, B, C, h = make(requires_grad=True)
    spoilt = x.detach().clone()
    spoilt[:, :4] = math.nan
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[:, 4] = True
    args = {"discretization": discretization, "backend": compiled, "return_state": True}
    packed, final = selective_scan(spoilt, delta, A, B, C, initial_state=h, reset=reset, **args)
    x_, delta_, B_, C_ = (v[:, 4:] for v in (x, delta, B, C))
    alone, state = selective_scan(x_, delta_, A, B_, C_, **args)
    assert torch.equal(packed[:, 4:], alone)
    assert torch.equal(final, state)
    clean, _ = selective_scan(x, delta, A, B, C, initial_state=h, reset=reset, **args)
    assert not torch.autograd.grad(clean[:, 4:].sum(), h)[0].any()


def test_nan_stays_in_its_channel_and_is_not_hidden(compiled):
    x, delta, A, B, C, h = make(d=20)
    delta[0, 3, 7] = math.nan
    y, state = selective_scan(
        x, delta, A, B, C, initial_state=h, return_state=True, backend=compiled
    )
    assert y[0, 3:, 7].isnan().all()
    assert state[0, 7].isnan().all()
    assert y.isnan().sum() == 8


def test_zero_step_freezes_the_state_and_no_frames_keep_it(compiled):
    x, delta, A, B, C, h = make()
    args = {"initial_state": h, "return_state": True, "backend": compiled}
    y, state = selective_scan(x, delta * 0, A, B, C, **args)
    assert torch.equal(state, h)
    assert_close(y, torch.einsum("bdn,btn->btd", h, C))
    x, delta, B, C = (v[:, :0] for v in (x, delta, B, C))
    y, state = selective_scan(x, delta, A, B, C, **args)
    assert tuple(y.shape) == (2, 0, 5)
    assert torch.equal(state, h)


def test_a_huge_step_reaches_the_equilibrium(compiled):
    one = torch.ones(1, 2, 1)
    for step in (1e3, 1e30, math.inf):
        y = selective_scan(one, one * step, one[0, :1] * -4.0, one, one, backend=compiled)
        assert_close(y, one / 4, rtol=0, atol=0)


# ------------------------------------------------------------------ contract
def test_it_keeps_what_every_backend_promises(compiled):
    check_scan_backend(compiled)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_empty_axes(compiled, shape):
    inputs = make(*shape, requires_grad=True)
    found = []
    for backend in (compiled, "reference"):
        y, state = selective_scan(
            *inputs[:5], initial_state=inputs[5], return_state=True, backend=backend
        )
        grads = torch.autograd.grad(y.sum() + state.sum(), inputs, allow_unused=True)
        found.append((y, state, *grads))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_the_number_of_threads_does_not_change_a_bit(compiled):
    inputs = make(3, 700, 130, 16, torch.float32, requires_grad=True)
    weights = [v.float() for v in draw_weights(3, 700, 130, 16)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(inputs, compiled, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layout_does_not_matter_and_inputs_are_left_alone(compiled):
    inputs = make(requires_grad=True)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs[:2]]
    strided += [inputs[2].t().contiguous().t(), *inputs[3:]]
    before = [v.clone() for v in inputs]
    weights = draw_weights(2, 11, 5, 3)
    # A sum hands an expanded gradient to the backward.
    y = selective_scan(*strided[:5], backend=compiled)
    expanded = torch.autograd.grad(y.sum(), inputs[:5])
    weighted = torch.autograd.grad((y_of(inputs, compiled) * torch.ones_like(y)).sum(), inputs[:5])
    assert all(torch.equal(a, b) for a, b in zip(expanded, weighted, strict=True))
    assert_close(
        values_and_gradients(inputs, compiled, weights)[0], y_of(inputs, "reference", inputs[5])
    )
    assert all(torch.equal(v, w) for v, w in zip(inputs, before, strict=True))


def y_of(inputs, backend, initial_state=None):
    return selective_scan(*inputs[:5], initial_state=initial_state, backend=backend)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("zoh", [False, True])
def test_opcheck(compiled, zoh, with_reset):
    inputs = make(requires_grad=True)
    reset = torch.rand(2, 11) < 0.3 if with_reset else None
    torch.library.opcheck(compiled_scan._OPERATOR.operator, (*inputs, reset, zoh, True))
    detached = [v.detach() for v in inputs]
    torch.library.opcheck(compiled_scan._OPERATOR.operator, (*detached, reset, zoh, False))


def test_compiles_as_one_graph(compiled):
    torch._dynamo.reset()
    inputs = make(requires_grad=True)[:5]

    def run(*v):
        return selective_scan(*v, backend=compiled)

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(whole(*inputs), run(*inputs))
    ours = torch.autograd.grad(whole(*inputs).sum(), inputs)
    assert_close(ours, torch.autograd.grad(run(*inputs).sum(), inputs))


def test_exports_with_a_free_number_of_frames(compiled):
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan(x, delta, A, B, C, backend=compiled)

    frames = {1: torch.export.Dim("t", min=2, max=100_000)}
    shapes = {"x": frames, "delta": frames, "A": None, "B": frames, "C": frames}
    program = torch.export.export(Scan(), tuple(make()[:5]), dynamic_shapes=shapes)
    longer = make(t=40)[:5]
    assert_close(program.module()(*longer), selective_scan(*longer))


def test_unused_outputs_give_no_gradient_of_their_own(compiled):
    inputs = make(requires_grad=True)
    for use in (0, 1):
        grads = []
        for backend in (compiled, "reference"):
            outputs = selective_scan(
                *inputs[:5], initial_state=inputs[5], return_state=True, backend=backend
            )
            grads.append(torch.autograd.grad(outputs[use].sum(), inputs, allow_unused=True))
        for ours, theirs in zip(*grads, strict=True):
            assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


# ------------------------------------------------------------------ building
def test_a_tensor_elsewhere_is_refused(compiled):
    inputs = [v.to("meta") for v in make()[:5]]
    with pytest.raises(ValueError, match="backend 'compiled' runs on 'cpu'; got tensors on 'meta'"):
        selective_scan(*inputs, backend=compiled)


@pytest.mark.parametrize("missing", ["my-c++", "ninja"])
def test_a_missing_tool_is_named(monkeypatch, tmp_path, missing):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(
        compiled_scan.shutil, "which", lambda tool: None if tool == missing else tool
    )
    with pytest.raises(
        MissingDependencyError, match=rf"needs .*'{missing.replace('+', '.')}'.*not"
    ):
        compiled_scan.build.__wrapped__()


def test_windows_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(compiled_scan.os, "name", "nt")
    try:
        with pytest.raises(MissingDependencyError, match=r"on Windows; take the backend 'chunked'"):
            compiled_scan._check_tools("cl")
    finally:
        monkeypatch.undo()  # pathlib looks at it too


def test_a_failed_build_shows_what_the_compiler_said_and_leaves_nothing(
    compiled, monkeypatch, tmp_path
):
    broken = tmp_path / "broken.cpp"
    broken.write_text("#error this is not a scan\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(compiled_scan, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="this is not a scan"):
        compiled_scan.build.__wrapped__()
    assert not list((tmp_path / "built").iterdir())


def test_a_later_process_needs_no_compiler(compiled):
    code = "from mmau.functional.selective_scan import SCAN_BACKENDS as table\n"
    code += "print(table.get('compiled').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "compiled\n"


def test_importing_the_module_builds_nothing():
    code = """
from mmau.scan import compiled as module
assert module.build.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = compiled_scan.other
