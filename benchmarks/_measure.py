"""CPU time, peak memory, and where they were measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent

MEASURED_ALONE = {
    "OMP_NUM_THREADS": "1",
    # Every large allocation comes from the system and goes back to it. Otherwise the heap keeps
    # what was freed, and the same call has another peak from one process to the next.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Environment of a process whose peak memory is measured."""


def make_inputs(b: int, d: int, n: int, t: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Draw inputs with the step sizes of a freshly initialised model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    delta = F.softplus(normal(b, t, d) - 4.0)
    tensors = [normal(b, t, d), delta, A, normal(b, t, n), normal(b, t, n)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def once(run: Callable[..., Tensor], inputs: list[Tensor], *, backward: bool) -> None:
    """Run without gradients, or with the gradients of everything."""
    if backward:
        torch.autograd.grad(run(*inputs).sum(), inputs)
    else:
        with torch.no_grad():
            run(*inputs)


def smallest_times(
    runs: Mapping[str, Callable[[], None]], *, repeats: int, budget: float = 6.0
) -> dict[str, float]:
    """Return the smallest CPU time of each in seconds, taken in turns in this process.

    Whoever has used up `budget` seconds gets no further turn; everyone gets one.
    """
    best = dict.fromkeys(runs, float("inf"))
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, run in runs.items():
            if spent[name] > budget:
                continue
            # Short runs are repeated within a turn, so that they are not always the first after
            # something else has taken the caches.
            count = 10 if best[name] < 0.01 else 1
            for _ in range(count):
                start = time.process_time()
                run()
                taken = time.process_time() - start
                best[name] = min(best[name], taken)
                spent[name] += taken
    return best


def _high_water() -> int:
    """Largest resident size so far, in kilobytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if platform.system() == "Darwin" else peak


def measure_memory_here(run: Callable[..., Tensor], size: Mapping[str, int], backward: bool) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    torch.set_num_threads(1)
    once(run, make_inputs(**{**size, "b": 1, "t": 4}), backward=backward)
    inputs = make_inputs(**size)
    return rise_of(lambda: once(run, inputs, backward=backward))


def rise_of(run: Callable[[], object]) -> int:
    """Return by how many kilobytes a call raises the resident size of this process at its peak."""
    with contextlib.suppress(OSError):
        # Makes the mark start again at the present size; Linux only.
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    run()
    return _high_water() - before


def peak_alone(script: str, case: Mapping[str, object]) -> float:
    """Return what `script --memory-case CASE` prints, in megabytes instead of kilobytes.

    A process of its own, and the resident size, not an allocator's count, so that it holds for any
    implementation; outputs and gradients are part of it.
    """
    done = subprocess.run(
        [sys.executable, script, "--memory-case", json.dumps(case)],
        capture_output=True,
        text=True,
        env={**os.environ, **MEASURED_ALONE},
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case} failed: {done.stderr}")
    return float(done.stdout.strip().splitlines()[-1]) / 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stamp() -> dict[str, str | int]:
    """Return where and with what the numbers were made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE)
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {name: _version(name) for name in ("mambapy", "transformers")}
    return {
        "cpu": cpu,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name, version in versions.items() if version},
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": int(
            bool(git("status", "--porcelain", "--", "../src", ".", ":!results"))
        ),
    }
