"""The scan in C++, built by the compiler of the machine when it is asked for by name.

mmau itself stays pure Python: the source lies beside this file, and the first
`SCAN_BACKENDS.get("compiled")` compiles it, which takes a quarter of a minute, into a folder that
later processes load it from. The folder is that of PyTorch's extensions, which the environment
variable `TORCH_EXTENSIONS_DIR` moves.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmau._files import atomic_dir
from mmau.registry import MissingDependencyError
from mmau.scan.backend import ScanBackend, ScanOperator

SOURCE = Path(__file__).with_name("compiled_scan.cpp")

FRAMES_PER_CHUNK = 32
"""Frames between kept states. From 16 to 128 the time is the same within a tenth; at 32 (and 16
states) the work of a chunk takes 200 KiB, and what is kept half as much as `x`."""


@functools.cache
def build() -> Any:
    """Compile the C++ source, unless this machine has done so before, and load it.

    The name of the library holds a hash of the source, of the flags, of the PyTorch version and of
    the processor: a home folder that several machines share holds one library for each kind.
    """
    flags = _flags()
    key = "\n".join([SOURCE.read_text(encoding="utf-8"), *flags, torch.__version__, _processor()])
    name = f"mmau_compiled_scan_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / name
    if folder.exists():
        torch.ops.load_library(folder / f"{name}.so")  # type: ignore[no-untyped-call]
        return torch.ops.mmau_compiled_scan
    _check_tools(os.environ.get("CXX", "c++"))
    # Imported here because it imports setuptools, which costs more than loading the library.
    from torch.utils import cpp_extension

    # Complete or absent: an interrupted build leaves no lock that later ones would wait for.
    with atomic_dir(folder) as partial:
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"] if "-fopenmp" in flags else [],
            build_directory=str(partial),
            with_cuda=False,
            is_python_module=False,
        )
    return torch.ops.mmau_compiled_scan


def _flags() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
    flags.append("-march=native" if x86 else "-mcpu=native")
    # Apple's clang has no OpenMP of its own; without it the loop runs on one thread.
    return flags if platform.system() == "Darwin" else [*flags, "-fopenmp"]


def _processor() -> str:
    """Describe the instruction set, since `-march=native` makes code for this one only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _check_tools(compiler: str) -> None:
    """Say what is missing before PyTorch fails with a traceback of its own."""
    remedy = "install it, or take the backend 'chunked', which needs nothing."
    if os.name == "nt":
        raise MissingDependencyError(
            "the scan backend 'compiled' is written for g++ and clang++, which PyTorch does not "
            "build extensions with on Windows; take the backend 'chunked', which needs nothing."
        )
    if shutil.which(compiler) is None:
        raise MissingDependencyError(
            f"the scan backend 'compiled' needs a C++ compiler, and {compiler!r} is not on the "
            f"PATH (the environment variable CXX names another one): {remedy}",
            name=compiler,
        )
    if shutil.which("ninja") is None:
        raise MissingDependencyError(
            "the scan backend 'compiled' needs 'ninja', which is not on the PATH (pip install "
            f"ninja, and activate the environment): {remedy}",
            name="ninja",
        )


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, zoh, keep_states = inputs
    given = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    out: tuple[Tensor, Tensor, Tensor] = build().forward(*given, zoh, FRAMES_PER_CHUNK, keep_states)
    return out


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, zoh = inputs
    given = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    grads = build().backward(*given, zoh, FRAMES_PER_CHUNK)
    grad_x, grad_delta, per_clip, *per_group, grad_initial = grads
    # Slices of a sum of one thing would be views of it.
    grad_B, grad_C = (parts.sum(0) if len(parts) != 1 else parts.squeeze(0) for parts in per_group)
    return grad_x, grad_delta, per_clip.sum(0), grad_B, grad_C, grad_initial


def _kept_elements(num_clips: int, num_frames: int, d: int, n: int) -> int:
    return (num_frames + FRAMES_PER_CHUNK - 1) // FRAMES_PER_CHUNK * num_clips * d * n


_OPERATOR = ScanOperator("compiled", _forward, _backward, _kept_elements, device_types="cpu")


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """Run the scan in C++ on the CPU, on as many threads as PyTorch has.

    Differentiable once in every tensor (for second derivatives take the backend `"reference"`).
    """
    return _OPERATOR(x, delta, A, B, C, initial_state, reset, discretization=discretization)


def __getattr__(name: str) -> ScanBackend:
    """Build when the record is asked for, so that importing and documenting this file does not."""
    if name != "BACKEND":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    build()
    return _RECORD


_RECORD = ScanBackend(name="compiled", run=scan, devices=frozenset({"cpu"}))
