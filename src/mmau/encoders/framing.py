"""Where the windows of a chain of convolutions lie on a waveform, and how to cut a long one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmau.encoders.protocols import AudioFeatures

__all__ = ["ChunkSpan", "Framing", "check_waveform"]


class ChunkSpan(NamedTuple):
    """One chunk of a long waveform."""

    first_sample: int
    """First sample to encode."""
    last_sample: int
    """One past the last sample to encode."""
    keep_from: int
    """First feature of the chunk that is kept."""
    keep_to: int
    """One past the last feature of the chunk that is kept."""


@dataclass(frozen=True)
class Framing:
    r"""Windows of `window` samples, one every `hop` samples, starting at sample `start`.

    Feature $j$ sees the samples from `start + hop j` on; its time is the centre of its window,

    $$ t_j = \frac{\text{start} + \text{hop} \, j + (\text{window} - 1) / 2}{\text{sample rate}} $$

    unless `stamp` says otherwise.

    Args:
        window: Samples seen by one feature.
        hop: Samples from one feature to the next.
        sample_rate: Samples per second.
        start: First sample of the first window; negative where silence is put in front.
        stamp: Samples from the start of a window to its time; the centre if `None`.

    Examples:
        >>> wavlm = Framing.from_convolutions((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
        >>> wavlm.window, wavlm.hop, wavlm.count(16000)
        (400, 320, 49)
    """

    window: int
    hop: int
    sample_rate: int = 16000
    start: int = 0
    stamp: float | None = None

    @classmethod
    def from_convolutions(
        cls, kernels: Sequence[int], strides: Sequence[int], *, sample_rate: int = 16000
    ) -> Framing:
        """Compose unpadded convolutions.

        Args:
            kernels: Kernel sizes, first layer first.
            strides: Strides.
            sample_rate: Samples per second.

        Returns:
            The framing of the last layer's output.
        """
        window, hop = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            window += (kernel - 1) * hop
            hop *= stride
        return cls(window, hop, sample_rate)

    def count(self, num_samples: int) -> int:
        """Count the windows that end inside a waveform.

        Args:
            num_samples: Its length.

        Returns:
            Number of features; 0 if it is shorter than one window.
        """
        return max(0, (num_samples - self.start - self.window) // self.hop + 1)

    def times(self, num_features: int, device: torch.device | None = None) -> Tensor:
        """Return the time of each feature.

        Args:
            num_features: How many.
            device: Where.

        Returns:
            `(s,)` float64, in seconds after the first sample.
        """
        offset = self.start + ((self.window - 1) / 2 if self.stamp is None else self.stamp)
        steps = torch.arange(num_features, dtype=torch.float64, device=device)
        return (steps * self.hop + offset) / self.sample_rate

    def label(self, features: Tensor, lengths: Tensor) -> AudioFeatures:
        """Add times and mask to features.

        Args:
            features: `(b, s, a)`.
            lengths: `(b,)`, number of real samples of each.

        Returns:
            The features, zero where the window is not inside the real samples.
        """
        batch, num_features = features.shape[:2]
        counts = (lengths - self.start - self.window).div(self.hop, rounding_mode="floor") + 1
        steps = torch.arange(num_features, device=features.device)
        mask = steps < counts.to(features.device)[:, None]
        times = self.times(num_features, features.device).expand(batch, -1)
        return AudioFeatures(features.masked_fill(~mask[..., None], 0.0), times, mask)

    def chunks(self, num_samples: int, chunk: int, margin: int) -> Iterator[ChunkSpan]:
        """Cut a waveform into overlapping chunks whose inner parts tile its features.

        Args:
            num_samples: Length of the waveform.
            chunk: Features that are encoded at once.
            margin: Features that are thrown away where a chunk has a neighbour.

        Yields:
            Spans in order; their kept features, joined, are all features once.
        """
        total = self.count(num_samples)
        done = 0
        while done < total:
            # The last chunk is moved back rather than shortened: no feature loses context.
            first = max(0, min(done - margin, total - chunk))
            last = min(first + chunk, total)
            keep_to = last if last == total else last - margin
            start = first * self.hop
            yield ChunkSpan(
                start,
                num_samples
                if last == total
                else start + (last - first - 1) * self.hop + self.window,
                done - first,
                keep_to - first,
            )
            done = keep_to


def check_waveform(waveform: Tensor, lengths: Tensor | None) -> Tensor:
    """Check samples and lengths.

    Args:
        waveform: `(b, n)`.
        lengths: `(b,)`, or `None` for all of `n`.

    Returns:
        `(b,)` int64, number of real samples of each.

    Raises:
        TypeError: If the samples are not floating point.
        ValueError: If a real sample is NaN or infinite, or a length is out of range.
    """
    if not waveform.is_floating_point():
        raise TypeError(f"`waveform` must be float in [-1, 1]; got {waveform.dtype}.")
    batch, num_samples = waveform.shape
    # They decide shapes, so they have values even where the waveform has none.
    device = "cpu" if waveform.is_meta else waveform.device
    if lengths is None:
        counts = torch.full((batch,), num_samples, dtype=torch.long, device=device)
    else:
        counts = lengths.to(device, torch.long)
        if batch and (int(counts.min()) < 0 or int(counts.max()) > num_samples):
            raise ValueError(
                f"`lengths` must be between 0 and the {num_samples} samples of `waveform`; "
                f"got {lengths.tolist()}."
            )
    if waveform.is_meta:
        return counts
    real = torch.arange(num_samples, device=waveform.device) < counts[:, None]
    if not bool((waveform.isfinite() | ~real).all()):
        raise ValueError("`waveform` holds NaN or infinite samples.")
    return counts
