"""The Triton backend without a GPU: interpreted on the CPU, and compiled for GPUs elsewhere.

What only a GPU can show is in `tests/gpu`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmau.scan import SCAN_BACKENDS, selective_scan

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which exists for Linux only",
)


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


@needs_triton
def test_the_kernels_are_right_in_the_interpreter():
    done = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        str(HERE / "scan_triton_interpreted.py"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernels_compile_for_gpus(architecture, fused, direction, tmp_path, monkeypatch):
    """Through `ptxas`: in float32 and plain, in bfloat16 with everything fused."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this build of triton has no NVIDIA backend")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under TRITON_INTERPRET=1 there is nothing to compile")
    from mmau.scan import triton as scan_triton

    dtype = "bf16" if fused else "fp32"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(scan_triton, f"{direction}_kernel")
    options = scan_triton.launch_options(64, 16)
    compile_options = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    constants = {"CHUNK": scan_triton.CHUNK, **options, "ZOH": not fused or architecture == 80}
    flags = {"HAS_INITIAL", "HAS_FINAL", "HAS_RESET", "HAS_GATE", "SOFTPLUS", "KEEP"}
    constants |= dict.fromkeys(flags & set(kernel.arg_names), fused)
    halves = ("x_ptr", "delta_ptr", "B_ptr", "C_ptr", "gate_ptr", "y_ptr", "grad_y_ptr")
    halves += ("grad_x_ptr", "grad_delta_ptr", "grad_gate_ptr")

    def type_of(name):
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        return "*u8" if name == "reset_ptr" else f"*{dtype if name in halves else 'fp32'}"

    compiled = triton.compile(
        triton.compiler.ASTSource(
            fn=kernel,
            signature={name: type_of(name) for name in kernel.arg_names},
            constexprs=constants,
        ),
        target=compiler.GPUTarget("cuda", architecture, 32),
        options=compile_options,
    )
    assert compiled.asm["cubin"]
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    if not fused:  # copies of less than four bytes cannot run ahead
        assert "cp.async" in compiled.asm["ptx"]
    # Sums in an order that depends on who comes first would make two runs differ.
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", compiled.asm["ptx"], re.MULTILINE)


@needs_triton
@pytest.mark.parametrize(
    ("d", "n", "block"), [(64, 16, (16, 16)), (5, 3, (8, 4)), (1, 1, (1, 1)), (1536, 256, (4, 256))]
)
def test_blocks_cover_any_size(d, n, block):
    from mmau.scan import triton as scan_triton

    options = scan_triton.launch_options(d, n)
    assert (options["BLOCK_D"], options["BLOCK_N"]) == block
    assert options["num_warps"] == max(1, block[0] * block[1] // 256)


@needs_triton
def test_it_is_refused_on_the_cpu_and_in_float64():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under TRITON_INTERPRET=1 it runs on the CPU")
    one = torch.ones(1, 2, 1)
    with pytest.raises(ValueError, match="'triton' runs on 'cuda'; got tensors on 'cpu'"):
        selective_scan(one, one, -one[0, :1], one, one, backend="triton")
    record = SCAN_BACKENDS.get("triton")
    with pytest.raises(
        ValueError, match=r"'triton' computes in torch\.float32; got torch\.float64"
    ):
        record.check(discretization="zoh", device="cuda", dtype=torch.float64)


def test_without_triton_it_names_the_extra():
    done = run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "from mmau.functional.selective_scan import SCAN_BACKENDS\n"
        "SCAN_BACKENDS.get('triton')",
    )
    assert done.returncode != 0
    message = (
        "scan backend 'triton' needs 'triton', which is not installed: pip install \"mmau[gpu]\""
    )
    assert message in done.stderr


def test_the_benchmark_says_that_it_needs_a_gpu(tmp_path):
    """And ends well, so that the benchmarks after it run."""
    script = HERE.parents[1] / "benchmarks" / "selective_scan_cuda.py"
    output = tmp_path / "out.json"
    done = run_python(str(script), "--output", str(output), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "needs a CUDA device and there is none here" in done.stdout
    assert not output.exists()
