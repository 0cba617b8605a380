"""Time the scans on a GPU: the Triton kernel, mamba-ssm's kernel and the chunked scan.

    python benchmarks/selective_scan_cuda.py

prints a table and writes `benchmarks/results/selective_scan_cuda.json`, stamped with the GPU, the
versions and the commit. Without a CUDA device it says so and stops.

Each number is the median of several runs between two CUDA events, each after the second-level cache
was overwritten. Beside it stands the fraction of copy bandwidth: the bytes that no implementation
can avoid (forward: read x, delta, B, C, write y; backward: read those and the gradient of y, write
four gradients) per second, divided by what `Tensor.copy_` reaches on the same GPU in the same
process. A scan that only waited for memory would show 100 %.

What runs:
- `triton`, `chunked`, `mamba_ssm`: `selective_scan(..., backend=...)`, exact zero-order hold, with
  its checks and casts (bfloat16 inputs are cast to float32 and back);
- `triton kernel`: our kernel alone, on the inputs as they are;
- `mamba-ssm kernel`: its kernel alone, in its own layout `(b, d, t)`, which computes Euler's
  discretisation: less arithmetic than the exact one, and not the paper's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mmau.registry import MissingDependencyError
from mmau.scan import SCAN_BACKENDS, selective_scan

SIZES = {
    "the paper's batch": {"b": 16, "d": 64, "n": 16, "t": 256},
    "a middle layer": {"b": 16, "d": 512, "n": 16, "t": 2048},
    "a large language model's layer": {"b": 4, "d": 1536, "n": 16, "t": 8192},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
Run = Callable[[list[torch.Tensor]], torch.Tensor]


def make_inputs(b: int, d: int, n: int, t: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw inputs with the step sizes of a freshly initialised model; `A` stays in float32."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    A = -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1)
    tensors = [normal(b, t, d), F.softplus(normal(b, t, d) - 4.0), normal(b, t, n), normal(b, t, n)]
    x, delta, B, C = (tensor.to(dtype) for tensor in tensors)
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C)]


def competitors() -> tuple[dict[str, Run], dict[str, str]]:
    """Return what can run here, and why the others cannot."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}

    def through_api(name: str) -> Run:
        return lambda inputs: selective_scan(*inputs, backend=name)

    for name in ("triton", "mamba_ssm", "chunked"):
        try:
            SCAN_BACKENDS.get(name)
        except MissingDependencyError as error:
            absent[name] = str(error)
        else:
            runs[name] = through_api(name)
    if "triton" in runs:
        from mmau.scan import triton as scan_triton

        runs["triton kernel"] = lambda inputs: scan_triton.scan(*inputs)[0]
    if "mamba_ssm" in runs:
        from mmau.scan import mamba_ssm

        runs["mamba-ssm kernel"] = lambda inputs: mamba_ssm._Kernel.apply(*inputs)
    return runs, absent


def layout_for(name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the inputs as this competitor wants them: mamba-ssm's kernel has time innermost."""
    if name != "mamba-ssm kernel":
        return inputs
    x, delta, A, B, C = (tensor.detach() for tensor in inputs)
    x, delta, B, C = (tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C))
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C)]


def forward(run: Run, inputs: list[torch.Tensor]) -> None:
    """Run once without gradients."""
    with torch.no_grad():
        run(inputs)


def forward_backward(run: Run, inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Run once with the gradients of everything."""
    y = run(inputs)
    torch.autograd.grad(y, inputs, grad.view(y.shape))


def median_seconds(run: Callable[[], None], repeats: int, flush: torch.Tensor) -> float:
    """Return the median of `repeats` runs after three to warm up, each with a cold cache."""
    for _ in range(3):  # the first one compiles
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Also keeps the GPU busy while Python prepares the launches, so that the time between the
        # events is the GPU's own.
        flush.zero_()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def copy_bandwidth(repeats: int, flush: torch.Tensor) -> float:
    """Return bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 28, device="cuda").zero_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), repeats, flush)  # type: ignore[arg-type, return-value]
    return 2 * source.numel() * source.element_size() / seconds


def unavoidable_bytes(size: dict[str, int], dtype: torch.dtype, *, with_backward: bool) -> int:
    """Return what must cross the memory bus once, whatever the implementation."""
    wide, narrow = (size["b"] * size["t"] * size[axis] * dtype.itemsize for axis in "dn")
    forward_bytes = 3 * wide + 2 * narrow
    return forward_bytes + (5 * wide + 4 * narrow if with_backward else 0)


def stamp() -> dict[str, str | int]:
    """Return where and with what the numbers were made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return done.stdout.strip()

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "gpu": torch.cuda.get_device_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": version("triton"),
        "mamba_ssm": version("mamba-ssm"),
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": int(bool(git("status", "--porcelain", "--", "../src"))),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="runs of which the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "selective_scan_cuda.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device and there is none here, so nothing is measured.")
        return

    where = stamp()
    runs, absent = competitors()
    flush = torch.empty(1 << 26, device="cuda")  # 256 MiB, more than any second-level cache
    bandwidth = copy_bandwidth(arguments.repeats, flush)
    print(f"{where['gpu']}, torch {where['torch']}, copy {bandwidth / 1e9:.0f} GB/s")
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    rows = []
    for title, size in SIZES.items():
        for dtype_name, dtype in DTYPES.items():
            print(f"\n{title}, (b, d, n, t) = {tuple(size.values())}, {dtype_name}")
            inputs = make_inputs(**size, dtype=dtype)
            grad = torch.ones_like(inputs[0])
            for name, run in runs.items():
                own = layout_for(name, inputs)
                calls = {
                    "forward": lambda: forward(run, own),  # noqa: B023
                    "forward+backward": lambda: forward_backward(run, own, grad),  # noqa: B023
                }
                for what, call in calls.items():
                    row = {"name": title, "size": size, "dtype": dtype_name, "scan": name}
                    row["what"] = what
                    rows.append(row)
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    try:
                        seconds = median_seconds(call, arguments.repeats, flush)
                    except torch.cuda.OutOfMemoryError:
                        row["seconds"] = None
                        print(f"  {name:18} {what:17} out of memory")
                        torch.cuda.empty_cache()
                        continue
                    peak = torch.cuda.max_memory_allocated() - before
                    least = unavoidable_bytes(size, dtype, with_backward=what != "forward")
                    row |= {"seconds": seconds, "peak_bytes": peak}
                    row["fraction_of_copy"] = least / seconds / bandwidth
                    print(
                        f"  {name:18} {what:17} {seconds * 1e3:9.3f} ms "
                        f"{row['fraction_of_copy']:6.1%} of copy {peak / 2**20:8.0f} MiB"
                    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arguments.output.with_suffix(".part")
    report = {"stamp": where, "copy_bytes_per_second": bandwidth, "absent": absent, "rows": rows}
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(arguments.output)
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
