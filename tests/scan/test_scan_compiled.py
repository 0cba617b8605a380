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


# ------------------------------------------------------------------ laws, to the bit
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("cuts", [range(1, 11), [4], [1, 9]])
def test_chunks_of_16_states_give_the_same_bits(compiled, discretization, dtype, cuts):
    x, delta, A, B, C, h = make(dtype=dtype, n=16)
    args = {"discretization": discretization, "backend": compiled, "return_state": True}
    whole, final = selective_scan(x, delta, A, B, C, initial_state=h, **args)
    chunks = []
    for start, end in itertools.pairwise([0, *cuts, 11]):
        x_, delta_, B_, C_ = (v[:, start:end] for v in (x, delta, B, C))
        chunk, h = selective_scan(x_, delta_, A, B_, C_, initial_state=h, **args)
        chunks.append(chunk)
    assert torch.equal(torch.cat(chunks, dim=1), whole)
    assert torch.equal(h, final)


def test_nan_stays_in_its_channel_and_is_not_hidden(compiled):
    x, delta, A, B, C, h = make(d=20)
    delta[0, 3, 7] = math.nan
    y, state = selective_scan(
        x, delta, A, B, C, initial_state=h, return_state=True, backend=compiled
    )
    assert y[0, 3:, 7].isnan().all()
    assert state[0, 7].isnan().all()
    assert y.isnan().sum() == 8


def test_a_huge_step_reaches_the_equilibrium(compiled):
    one = torch.ones(1, 2, 1)
    for step in (1e3, 1e30, math.inf):
        y = selective_scan(one, one * step, one[0, :1] * -4.0, one, one, backend=compiled)
        assert_close(y, one / 4, rtol=0, atol=0)


# ------------------------------------------------------------------ contract
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


def test_a_tensor_elsewhere_is_refused(compiled):
    inputs = [v.to("meta") for v in make()[:5]]
    with pytest.raises(ValueError, match="backend 'compiled' runs on 'cpu'; got tensors on 'meta'"):
        selective_scan(*inputs, backend=compiled)


# ------------------------------------------------------------------ building
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


def test_windows_is_refused(monkeypatch):
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
