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
from mmau.scan.backend import ScanBackend

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


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    zoh: bool,
    chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (_contiguous(tensor) for tensor in (x, delta, A, B, C, initial_state, reset))
    out: tuple[Tensor, Tensor, Tensor] = build().forward(*tensors, zoh, chunk, keep_states)
    return out


# One node for compilers and exporters. The schema is written out because torch would evaluate
# annotations, which are strings here.
_scan_op = torch.library.custom_op(
    "mmau::selective_scan_compiled",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? initial_state, "
    "Tensor? reset, bool zoh, int chunk, bool keep_states) -> (Tensor, Tensor, Tensor)",
    device_types="cpu",
)


@_scan_op.register_fake
def _scan_shapes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    zoh: bool,
    chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_clips, num_frames, d), n = x.shape, A.shape[1]
    chunks = (num_frames + chunk - 1) // chunk if keep_states else 0
    return (
        x.new_empty(num_clips, num_frames, d),
        x.new_empty(num_clips, d, n),
        x.new_empty(chunks * num_clips * d * n),
    )


@torch.library.custom_op(
    "mmau::selective_scan_compiled_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor kept, Tensor? reset, bool zoh, int chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_types="cpu",
)
def _backward_op(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    zoh: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (_contiguous(t) for t in (grad_y, grad_state, x, delta, A, B, C, kept, reset))
    grad_x, grad_delta, per_clip, *per_group, grad_initial = build().backward(*tensors, zoh, chunk)
    # Slices of a sum of one thing would be views of it.
    grad_B, grad_C = (parts.sum(0) if len(parts) != 1 else parts.squeeze(0) for parts in per_group)
    return grad_x, grad_delta, per_clip.sum(0), grad_B, grad_C, grad_initial


@_backward_op.register_fake
def _backward_shapes(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    zoh: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, A, B, C)
    )
    grad_x, grad_delta, grad_A, grad_B, grad_C = empty
    return grad_x, grad_delta, grad_A, grad_B, grad_C, x.new_empty(x.shape[0], *A.shape)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, initial_state, reset, zoh, chunk, keep_states = inputs
    if not keep_states:
        return  # nothing asked for a gradient when the operator was called
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, delta, A, B, C, output[2], reset)
    ctx.zoh, ctx.chunk, ctx.has_state = zoh, chunk, initial_state is not None


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, kept, reset = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    *grads, grad_initial = _backward_op(
        grad_y, grad_state, x, delta, A, B, C, kept, reset, ctx.zoh, ctx.chunk
    )
    return (*grads, grad_initial if ctx.has_state else None, None, None, None, None)


_scan_op.register_autograd(_backward, setup_context=_setup)


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
    tensors = (x, delta, A, B, C, initial_state)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # The dispatcher costs more than the work of a single frame, so plain inference goes around it.
    run = _scan_op if wants_grad or torch.compiler.is_compiling() else _forward
    y, state, _ = run(*tensors, reset, discretization == "zoh", FRAMES_PER_CHUNK, wants_grad)
    return y, state


def __getattr__(name: str) -> ScanBackend:
    """Build when the record is asked for, so that importing and documenting this file does not."""
    if name != "BACKEND":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    build()
    return _RECORD


_RECORD = ScanBackend(name="compiled", run=scan, devices=frozenset({"cpu"}))
