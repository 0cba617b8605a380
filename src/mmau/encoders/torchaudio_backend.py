"""What torchaudio does for us where it loads: resampling in memory, and log-mel energies.

Importing this file does not import torchaudio. Files are resampled by PyAV, so nothing on the way
from a video to a table needs it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmau._checks import check_range
from mmau.registry import MissingDependencyError


@dataclass(frozen=True)
class TorchaudioStatus:
    """Whether torchaudio can be used here."""

    loads: bool
    """Whether `import torchaudio` works."""
    version: str | None
    """The installed version, or `None`."""
    reason: str
    """Why it does not load, in one sentence; empty if it does."""


def torchaudio_status() -> TorchaudioStatus:
    """Try to load torchaudio.

    Examples:
        >>> status = torchaudio_status()
        >>> status.loads == (status.reason == "")
        True
    """
    try:
        version = importlib.metadata.version("torchaudio")
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            return TorchaudioStatus(False, None, "torchaudio is not installed.")
        return TorchaudioStatus(False, version, _what_failed(error))
    except (ImportError, OSError) as error:
        return TorchaudioStatus(False, version, _what_failed(error))
    return TorchaudioStatus(True, version, "")


def _what_failed(error: BaseException) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"torchaudio is installed but does not load beside torch {torch.__version__} "
        f"({first_line}); install the build that belongs to it, or remove it."
    )


def require_torchaudio(purpose: str) -> Any:
    """Import torchaudio, or say why that is not possible."""
    status = torchaudio_status()
    if status.loads:
        return importlib.import_module("torchaudio")
    reason = status.reason.rstrip(".")
    remedy = "" if status.version else ': pip install "mmau[audio]"'
    raise MissingDependencyError(
        f"{purpose} needs torchaudio, but {reason}{remedy}", name="torchaudio"
    )


@contextmanager
def hide_broken_torchaudio() -> Iterator[None]:
    """Let other libraries believe that a torchaudio which does not load is not there.

    transformers looks whether it is installed and then imports it, so that one that was built for
    another torch would break encoders which have nothing to do with it.
    """
    if torchaudio_status().loads:
        yield
        return
    before = sys.modules.get("torchaudio", _NOT_IMPORTED)
    sys.modules["torchaudio"] = None  # type: ignore[assignment]  # import's own word for "absent"
    try:
        yield
    finally:
        if before is _NOT_IMPORTED:
            del sys.modules["torchaudio"]
        else:
            sys.modules["torchaudio"] = before  # type: ignore[assignment]


_NOT_IMPORTED = object()


def resample_waveform(
    waveform: Tensor, source_rate: int, target_rate: int, *, lowpass_filter_width: int = 64
) -> Tensor:
    """Change the sample rate of sound that is already in memory.

    Examples:
        >>> resample_waveform(torch.ones(2, 100), 16000, 16000).shape
        torch.Size([2, 100])
    """
    check_range("source_rate", source_rate, 1)
    check_range("target_rate", target_rate, 1)
    check_range("lowpass_filter_width", lowpass_filter_width, 1)
    if not waveform.is_floating_point() or not waveform.ndim:
        raise ValueError(
            f"`waveform` must be floats (..., n); got {waveform.dtype} {tuple(waveform.shape)}."
        )
    if source_rate == target_rate:
        return waveform
    torchaudio = require_torchaudio("resampling in memory")
    resampled: Tensor = torchaudio.functional.resample(
        waveform, source_rate, target_rate, lowpass_filter_width=lowpass_filter_width
    )
    return resampled


def torchaudio_filterbank(
    num_mels: int, num_bins: int, sample_rate: int, low: float, high: float
) -> Tensor:
    """Return torchaudio's triangular filters on the same mel scale as `mel_filterbank`."""
    torchaudio = require_torchaudio("LogMelEncoder(backend='torchaudio')")
    filters: Tensor = torchaudio.functional.melscale_fbanks(
        num_bins, low, high, num_mels, sample_rate, norm=None, mel_scale="htk"
    )
    return filters


def power_spectrum(waveform: Tensor, taper: Tensor, hop: int) -> Tensor:
    """Return torchaudio's spectrogram of windows that lie inside a waveform."""
    torchaudio = require_torchaudio("LogMelEncoder(backend='torchaudio')")
    size = len(taper)
    spectrum: Tensor = torchaudio.functional.spectrogram(
        waveform,
        pad=0,
        window=taper,
        n_fft=size,
        hop_length=hop,
        win_length=size,
        power=2.0,
        normalized=False,
        center=False,
    )
    return spectrum.mT
