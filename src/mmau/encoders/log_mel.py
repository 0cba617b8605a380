"""Log-mel energies: the audio encoder that needs no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes
from mmau._optional import require_torchaudio
from mmau.encoders.protocols import AudioFeatures


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

    Feature $j$ covers the samples from `start + hop j` on; its time is the centre of its window,

    $$ t_j = \frac{\text{start} + \text{hop} \, j + (\text{window} - 1) / 2}{\text{sample rate}} $$

    unless `stamp` says otherwise.

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
        """Compose unpadded convolutions."""
        window, hop = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            window += (kernel - 1) * hop
            hop *= stride
        return cls(window, hop, sample_rate)

    def count(self, num_samples: int) -> int:
        """Count the windows that end inside a waveform."""
        return max(0, (num_samples - self.start - self.window) // self.hop + 1)

    def times(self, num_features: int, device: torch.device | None = None) -> Tensor:
        """Return the time of each feature."""
        offset = self.start + ((self.window - 1) / 2 if self.stamp is None else self.stamp)
        steps = torch.arange(num_features, dtype=torch.float64, device=device)
        return (steps * self.hop + offset) / self.sample_rate

    def label(self, features: Tensor, lengths: Tensor) -> AudioFeatures:
        """Add times and mask to features."""
        batch, num_features = features.shape[:2]
        counts = (lengths - self.start - self.window).div(self.hop, rounding_mode="floor") + 1
        steps = torch.arange(num_features, device=features.device)
        mask = steps < counts.to(features.device)[:, None]
        times = self.times(num_features, features.device).expand(batch, -1)
        return AudioFeatures(features.masked_fill(~mask[..., None], 0.0), times, mask)

    def chunks(self, num_samples: int, chunk: int, margin: int) -> Iterator[ChunkSpan]:
        """Cut a waveform into overlapping chunks whose inner parts tile its features."""
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

    def encode_in_chunks(
        self, waveform: Tensor, encode: Callable[[Tensor], Tensor], chunk: int, margin: int
    ) -> Tensor:
        """Encode a waveform in overlapping chunks, in features, and keep their inner parts."""
        parts = [
            encode(waveform[:, span.first_sample : span.last_sample])[
                :, span.keep_from : span.keep_to
            ]
            for span in self.chunks(waveform.shape[1], chunk, margin)
        ]
        return torch.cat(parts, dim=1)


def check_waveform(waveform: Tensor, lengths: Tensor | None) -> Tensor:
    """Check samples and lengths."""
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


_FEATURES_AT_ONCE = 4096


def mel_filterbank(
    num_mels: int, num_bins: int, sample_rate: int, low: float, high: float
) -> Tensor:
    """Return triangular filters that are equally spaced on O'Shaughnessy's mel scale."""

    def to_mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    points = torch.linspace(to_mel(low), to_mel(high), num_mels + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bins = torch.linspace(0, sample_rate / 2, num_bins, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


class LogMelEncoder(nn.Module):
    r"""Turn a waveform into log-mel energies, one vector every `hop` seconds.

    $$ y = \tfrac14 \log \bigl(1 + \textstyle\sum_f M_f |X_f|^2 / \epsilon \bigr) $$

    which is 0 for silence and about 4 for a full-scale tone. It has no parameters.

    With `causal`, nothing that lies after a feature's time has gone into it, nor into a linear
    interpolation between two features: windows end at their time, silence is put in front of the
    first sample, and a feature is stamped one hop after its window's end, because interpolation
    looks at the next feature.

    Args:
        num_mels: Number of mel bands, the width of a feature.
        window: Length of a window in seconds.
        hop: Time from one feature to the next in seconds.
        low: Lowest frequency in Hz.
        high: Highest frequency in Hz, at most half the sample rate.
        floor: Energy that counts as silence.
        causal: Whether a feature may only depend on samples before its time.
        sample_rate: Samples per second.
        backend: `"torch"`, or `"torchaudio"` for its spectrogram and filters: the same numbers but
            for rounding, through the library that other pipelines use.

    Raises:
        MissingDependencyError: If torchaudio is asked for and not installed, or does not load.
        ValueError: If an option is out of range.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1]
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, num_mels)`, times in seconds, mask

    Examples:
        >>> encoder = LogMelEncoder(num_mels=24)
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, features.abs().max().item(), times[0, 0].item()
        (torch.Size([1, 49, 24]), 0.0, 0.0199)
    """

    _filters: Tensor
    _taper: Tensor

    def __init__(
        self,
        *,
        num_mels: int = 64,
        window: float = 0.04,
        hop: float = 0.02,
        low: float = 60.0,
        high: float = 7600.0,
        floor: float = 1e-3,
        causal: bool = False,
        sample_rate: int = 16000,
        backend: str = "torch",
    ) -> None:
        super().__init__()
        check_range("num_mels", num_mels, 1)
        check_range("hop", hop, 1 / sample_rate)
        check_range("window", window, hop)
        check_range("low", low, 0, high, open_high=True)
        check_range("high", high, low, sample_rate / 2, open_low=True)
        check_range("floor", floor, 0, open_low=True)
        check_choice("backend", backend, ("torch", "torchaudio"))
        self.d_out = num_mels
        self.sample_rate = sample_rate
        self.floor = floor
        self.causal = causal
        self.backend = backend
        size, step = round(window * sample_rate), round(hop * sample_rate)
        self.framing = (
            Framing(size, step, sample_rate, start=-size, stamp=float(size + step))
            if causal
            else Framing(size, step, sample_rate)
        )
        # Constants: also where the weights of a model are built without memory.
        with torch.device("cpu"):
            filters = mel_filterbank(num_mels, size // 2 + 1, sample_rate, low, high)
            taper = torch.hann_window(size)
        if not bool((filters.sum(0) > 0).all()):
            raise ValueError(
                f"`num_mels` is too large for a window of {window} s: some of the {num_mels} bands "
                f"contain no frequency bin; use fewer bands or a longer window."
            )
        if backend == "torchaudio":
            torchaudio = require_torchaudio("LogMelEncoder(backend='torchaudio')")
            filters = torchaudio.functional.melscale_fbanks(
                size // 2 + 1, low, high, num_mels, sample_rate, norm=None, mel_scale="htk"
            )
        self.register_buffer("_filters", filters, persistent=False)
        self.register_buffer("_taper", taper, persistent=False)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Encode a batch of waveforms."""
        check_shapes(waveform=(waveform, "b n"), lengths=(lengths, "b"))
        counts = check_waveform(waveform, lengths)
        total = self.framing.count(waveform.shape[1])
        if not total:
            return self.framing.label(waveform.new_zeros(len(waveform), 0, self.d_out), counts)
        padded = nn.functional.pad(waveform, (-self.framing.start, 0))
        window, hop = self.framing.window, self.framing.hop
        parts = [
            self._energies(padded[:, first * hop : (last - 1) * hop + window])
            for first in range(0, total, _FEATURES_AT_ONCE)
            for last in [min(first + _FEATURES_AT_ONCE, total)]
        ]
        return self.framing.label(torch.cat(parts, dim=1), counts)

    def _energies(self, waveform: Tensor) -> Tensor:
        if self.backend == "torchaudio":
            torchaudio = require_torchaudio("LogMelEncoder(backend='torchaudio')")
            spectrum = torchaudio.functional.spectrogram(
                waveform.float(),
                pad=0,
                window=self._taper,
                n_fft=self.framing.window,
                hop_length=self.framing.hop,
                win_length=self.framing.window,
                power=2.0,
                normalized=False,
                center=False,
            ).mT
        else:
            windows = waveform.float().unfold(1, self.framing.window, self.framing.hop)
            spectrum = torch.fft.rfft(windows * self._taper).abs().square()
        energies = torch.log1p(spectrum @ self._filters.to(spectrum.dtype) / self.floor) / 4
        return energies.to(waveform.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        rate = self.sample_rate
        return (
            f"num_mels={self.d_out}, window={self.framing.window / rate}, "
            f"hop={self.framing.hop / rate}, causal={self.causal}, backend={self.backend!r}"
        )


def resample_waveform(
    waveform: Tensor, source_rate: int, target_rate: int, *, lowpass_filter_width: int = 64
) -> Tensor:
    """Change the sample rate of sound `(..., n)` that is already in memory, by torchaudio.

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
