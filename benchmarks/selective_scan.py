"""Time the scan that runs by default against the loop that reads like the paper.

    python benchmarks/selective_scan.py

prints a table and writes `benchmarks/results/selective_scan.json`, stamped with the machine, the
versions and the commit. What is compared is CPU time (of all threads, of which there is one), the
smallest of several runs taken in turns within one process, so that ratios hold even on a machine
that does other things too. Times themselves are those of this machine. The loop is our reference,
whose backward is linear in the number of frames; published loops that index frame by frame are
quadratic and fall further behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mmau.functional.selective_scan import selective_scan

SIZES = {
    "the paper's batch": {"b": 16, "d": 64, "n": 16, "t": 256},
    "a minute of video": {"b": 1, "d": 64, "n": 16, "t": 1800},
}
BACKENDS = ("reference", "chunked")
RESULTS = Path(__file__).parent / "results"


def make_inputs(b: int, d: int, n: int, t: int) -> list[torch.Tensor]:
    """Draw inputs with the step sizes of a freshly initialised model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    tensors = [
        normal(b, t, d),
        F.softplus(normal(b, t, d) - 4.0),
        A,
        normal(b, t, n),
        normal(b, t, n),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def forward(inputs: list[torch.Tensor], backend: str) -> None:
    """Run once without gradients."""
    with torch.no_grad():
        selective_scan(*inputs, backend=backend)


def forward_backward(inputs: list[torch.Tensor], backend: str) -> None:
    """Run once with the gradients of everything."""
    torch.autograd.grad(selective_scan(*inputs, backend=backend).sum(), inputs)


def smallest_times(run: Callable[[str], None], repeats: int) -> dict[str, float]:
    """Return the smallest CPU time of each backend in seconds, the backends taking turns."""
    best = dict.fromkeys(BACKENDS, float("inf"))
    for backend in BACKENDS:
        run(backend)  # the first call pays for allocations
    for _ in range(repeats):
        for backend in BACKENDS:
            start = time.process_time()
            run(backend)
            best[backend] = min(best[backend], time.process_time() - start)
    return best


def stamp() -> dict[str, str | int]:
    """Return where and with what the numbers were made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": int(bool(git("status", "--porcelain", "--", "../src"))),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the smallest counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "selective_scan.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    where = stamp()
    print(
        f"{where['cpu']}, torch {where['torch']}, 1 thread, CPU time, exact zero-order hold, fp32\n"
    )
    print(f"{'':20} {'(b, d, n, t)':20} {'':10} {'loop':>10} {'chunked':>10} {'ratio':>7}")
    for name, size in SIZES.items():
        inputs = make_inputs(**size)
        for what, run in (("forward", forward), ("+ backward", forward_backward)):
            best = smallest_times(lambda backend: run(inputs, backend), arguments.repeats)  # noqa: B023
            loop, chunked = best["reference"], best["chunked"]
            ratio = loop / chunked
            rows.append({"name": name, "size": size, "what": what, "seconds": best, "ratio": ratio})
            print(
                f"{name:20} {tuple(size.values())!s:20} {what:10} {loop * 1e3:7.1f} ms "
                f"{chunked * 1e3:7.1f} ms {ratio:6.1f}x"
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arguments.output.with_suffix(".part")
    unfinished.write_text(json.dumps({"stamp": where, "rows": rows}, indent=2) + "\n")
    unfinished.replace(arguments.output)
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
