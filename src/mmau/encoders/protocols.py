"""What an encoder is, so that any module of this shape can take the place of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class VisualFeatures(NamedTuple):
    """What a visual encoder returns."""

    patch_tokens: Tensor
    """`(b, p, d)`, one token per patch in row-major order; no class or register tokens."""
    grid_size: tuple[int, int]
    """Rows and columns of the patch grid; their product is `p`."""


class AudioFeatures(NamedTuple):
    """What an audio encoder returns."""

    features: Tensor
    """`(b, s, a)`, zero where the mask is False."""
    times: Tensor
    """`(b, s)` float64, seconds after the first sample, increasing."""
    mask: Tensor
    """`(b, s)` bool, True where the whole window lies inside the waveform."""


@runtime_checkable
class VisualEncoder(Protocol):
    """Images to patch tokens; normalisation happens inside."""

    d_out: int
    """Width of a patch token."""
    patch_size: int
    """Side of a patch in pixels."""

    def __call__(self, images: Tensor) -> VisualFeatures:
        """Encode `(b, 3, h, w)` float images in [0, 1]."""
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """A waveform to features with times."""

    d_out: int
    """Width of a feature."""
    sample_rate: int
    """Samples per second that it expects."""

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Encode `(b, n)` float samples in [-1, 1]; `lengths` `(b,)` counts the real ones."""
        ...


@dataclass(frozen=True)
class PretrainedSource:
    """Where the weights of a backbone can be had again."""

    name: str
    """Name on the hub, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit, if one was asked for."""


@runtime_checkable
class SelectiveSaving(Protocol):
    """An encoder that knows which of its weights a checkpoint needs."""

    source: PretrainedSource | None
    """Where the rest comes from; `None` if the encoder was built with random weights."""

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that cannot be fetched again, under names of our own."""
        ...
