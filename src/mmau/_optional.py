"""Libraries that are imported where they are needed, or named with the command that brings them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmau.registry import MissingDependencyError


def require(module: str, *, purpose: str, extra: str) -> Any:
    """Import an optional library, or say which extra brings it.

    Examples:
        >>> require("nothing_of_this_name", purpose="reading video", extra="video")
        Traceback (most recent call last):
        ...
        mmau.registry.MissingDependencyError: reading video needs 'nothing_of_this_name', ...
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        if error.name != top:
            raise  # the library is there but something inside it is broken: show that
        raise MissingDependencyError(
            f'{purpose} needs {top!r}, which is not installed: pip install "mmau[{extra}]"',
            name=top,
        ) from error


def torchaudio_error() -> ImportError | OSError | None:
    """Return what `import torchaudio` raises here, or `None` if it works.

    Its wheel for Linux is a CUDA build: beside a torch for CPU its import ends in an `OSError`.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError) as error:
        return error
    return None


def require_torchaudio(purpose: str) -> Any:
    """Import torchaudio, or say why that is not possible."""
    error = torchaudio_error()
    if error is None:
        return importlib.import_module("torchaudio")
    if isinstance(error, ModuleNotFoundError) and error.name == "torchaudio":
        reason = 'torchaudio is not installed: pip install "mmau[audio]"'
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = (
            f"torchaudio is installed but does not load beside torch {torch.__version__} "
            f"({lines[0]}); install the build that belongs to it, or remove it"
        )
    raise MissingDependencyError(
        f"{purpose} needs torchaudio, but {reason}", name="torchaudio"
    ) from error


@contextmanager
def hide_broken_torchaudio() -> Iterator[None]:
    """Let other libraries believe that a torchaudio which does not load is not there.

    transformers looks whether it is installed and then imports it, so that one that was built for
    another torch would break encoders which have nothing to do with it.
    """
    if torchaudio_error() is None:
        yield
        return
    absent = object()
    before: Any = sys.modules.get("torchaudio", absent)
    sys.modules["torchaudio"] = None  # type: ignore[assignment]  # import's own word for "absent"
    try:
        yield
    finally:
        if before is absent:
            del sys.modules["torchaudio"]
        else:
            sys.modules["torchaudio"] = before
