"""`mmau doctor`: what is installed, and what is wrong with a data root."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from mmau._optional import torchaudio_error
from mmau.cli.components import all_registries
from mmau.cli.console import Console, UserError

# Distribution, module and what it is for.
_LIBRARIES = (
    ("torch", "everything"),
    ("numpy", "everything"),
    ("av", "reading and writing video and sound"),
    ("mediapipe", "finding faces and landmarks"),
    ("transformers", "DINOv2 and WavLM"),
    ("peft", "LoRA on DINOv2"),
    ("matplotlib", "plots"),
    ("pandas", "tables as data frames"),
    ("pyarrow", "tables for Arrow"),
    ("uniface", "the RetinaFace detector"),
    ("onnxruntime", "the RetinaFace detector"),
    ("accelerate", "training on several devices"),
    ("mamba-ssm", "the CUDA scan of Mamba"),
    ("triton", "the Triton scan"),
)


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        parents=parents,
        help="report what is installed, and what is odd in a data root",
        description="Report what is installed and loads; with DATA_ROOT, also what is missing, "
        "odd or inconsistent in a folder laid out like Aff-Wild2. The exit code is 1 if something "
        "there is an error.",
    )
    parser.add_argument("data_root", nargs="?", metavar="DATA_ROOT", help="folder to look through")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.data_root is not None and not Path(arguments.data_root).is_dir():
        raise UserError(f"no such folder: {arguments.data_root}")
    for line in _installation():
        console.result(line)
    if arguments.data_root is None:
        return 0
    return _report_on(Path(arguments.data_root), console)


def _installation() -> list[str]:
    import torch

    lines = [
        f"mmau {_version('mmau')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch finds {_devices(torch)}; {torch.get_num_threads()} threads",
        "",
        "libraries",
    ]
    width = max(len(name) for name, _ in _LIBRARIES)
    for name, purpose in _LIBRARIES:
        lines.append(f"  {name:<{width}}  {_version(name) or 'not installed':<14}  {purpose}")
    lines += ["", f"torchaudio: {torchaudio_status()}", "", "components"]
    for registry in all_registries():
        rows = registry.describe()
        ready = [row.name for row in rows if not row.missing]
        lines.append(f"  {registry.kind}: {', '.join(ready) or 'none'}")
        lines += [f"    {row.name} {row.status}" for row in rows if row.missing]
    return lines


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices(torch: Any) -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    if torch.backends.mps.is_available():
        return "an Apple GPU (mps)"
    return "no GPU, so everything runs on the CPU"


def torchaudio_status() -> str:
    """Tell whether torchaudio loads, and if not, why not."""
    version = _version("torchaudio")
    if not version:
        return 'not installed, and nothing on the main path needs it: pip install "mmau[audio]"'
    error = torchaudio_error()
    if error is not None:
        first = str(error).strip().splitlines()[0]
        return (
            f"{version} is installed but does not load ({type(error).__name__}: {first}); its "
            "build must match torch's. It also keeps some of transformers from loading: remove it "
            "or install the matching build"
        )
    return f"{version} loads"


def _report_on(root: Path, console: Console) -> int:
    from mmau.data.affwild2_check import check_data_root

    with console.progress("looking", unit="trials") as progress:
        findings = check_data_root(root, progress=progress)
    console.result(f"\n{root}")
    counts = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in findings:
        counts[finding.severity] = counts.get(finding.severity, 0) + 1
        console.result(f"  {finding.severity}: {finding.where}: {finding.message}")
    if not findings:
        console.result("  nothing is missing, odd or inconsistent")
    console.summary(
        "  " + ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items()),
        **counts,
    )
    return 1 if counts["error"] else 0
