"""The sound of a video of any length, encoded in overlapping segments as its frames ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_range
from mmau.media.audio import AudioSegment
from mmau.models import AUDetector

__all__ = ["GRID", "SAMPLE_RATE", "SoundStream", "cut_sound", "reach_of"]

SAMPLE_RATE = 16000
_SEGMENT, _MARGIN = 20.0, 2.0  # seconds
GRID = 320  # samples between two features of WavLM; our log-mel hop is the same


def cut_sound(
    pieces: Iterable[NDArray[np.floating]],
    start_time: float = 0.0,
    *,
    segment_seconds: float = _SEGMENT,
    margin_seconds: float = _MARGIN,
    sample_rate: int = SAMPLE_RATE,
) -> Iterator[AudioSegment]:
    """Cut sound that is in memory, or that arrives in pieces, into overlapping segments.

    Each segment owns its middle, the first one also its beginning and the last one its end. Starts
    lie on the 20 ms grid of the features, so that a feature does not depend on how the sound was
    cut, beyond what its encoder sees around it.

    Args:
        pieces: `(n,)` each, float in [-1, 1]; joined, they are the sound.
        start_time: Time of the first sample in seconds.
        segment_seconds: Length of a segment.
        margin_seconds: Part at either end that a neighbour owns.
        sample_rate: Samples per second.

    Yields:
        Segments in order.

    Raises:
        ValueError: If a segment has no middle.

    Examples:
        >>> one = np.zeros(16000, dtype=np.float32)
        >>> [segment.owned for segment in cut_sound([one] * 50)]
        [(0.0, 18.0), (18.0, 34.0), (34.0, 50.0)]
    """
    size = round(segment_seconds * sample_rate) // GRID * GRID
    margin = round(margin_seconds * sample_rate) // GRID * GRID
    check_range("margin_seconds", margin_seconds, 0)
    if size <= 2 * margin:
        raise ValueError(
            "`segment_seconds` must be more than twice `margin_seconds`; got "
            f"{segment_seconds} and {margin_seconds}."
        )
    waiting = np.zeros(0, dtype=np.float32)
    first = owned_from = 0  # samples since the start
    for piece in pieces:
        waiting = np.concatenate([waiting, np.asarray(piece, dtype=np.float32)])
        while len(waiting) > size:
            owned_to = first + size - margin
            yield _segment(waiting[:size], first, (owned_from, owned_to), start_time, sample_rate)
            waiting = waiting[size - 2 * margin :]
            first, owned_from = first + size - 2 * margin, owned_to
    if len(waiting):
        end = first + len(waiting)
        yield _segment(waiting, first, (owned_from, end), start_time, sample_rate)


def _segment(
    waveform: NDArray[np.float32],
    first: int,
    owned: tuple[int, int],
    start_time: float,
    sample_rate: int,
) -> AudioSegment:
    return AudioSegment(
        waveform=waveform.copy(),
        sample_rate=sample_rate,
        start_time=start_time + first / sample_rate,
        owned=(start_time + owned[0] / sample_rate, start_time + owned[1] / sample_rate),
    )


def reach_of(detector: AUDetector) -> float:
    """Tell how far a frame listens, in seconds.

    Args:
        detector: The detector.

    Returns:
        The window of its cross-attention, or the largest gap of interpolation.
    """
    if detector.audio_query is not None:
        return float(cast("Any", detector.audio_query).window)
    return 0.04  # the default of `interpolate_features`, which the detector leaves as it is


class SoundStream:
    """Audio features near the frames that are asked about; older ones are forgotten.

    Args:
        detector: A detector with an audio encoder, in eval mode.
        segments: The sound in order, such as from `cut_sound` or `mmau.media.audio.iterate_audio`.
            A segment is taken only when a frame needs it.

    Examples:
        >>> from mmau.models import Component, DetectorConfig, build_detector
        >>> config = DetectorConfig(
        ...     visual=Component("tiny"), audio=Component("log_mel", {"num_mels": 24}),
        ...     d_region=32, num_heads=4, d_model=32, d_audio=16, crop_size=64,
        ... )
        >>> detector = build_detector(config).eval()
        >>> sound = SoundStream(detector, cut_sound([np.zeros(8000, dtype=np.float32)]))
        >>> audio, mask = sound.align(torch.zeros(3, 32), np.array([0.1, 0.4, 0.9]))
        >>> tuple(audio.shape), mask.tolist()
        ((3, 16), [True, True, False])
    """

    def __init__(self, detector: AUDetector, segments: Iterable[AudioSegment]) -> None:
        self.detector = detector
        # Half a second more than needed costs nothing and forgives frames out of order.
        self._reach = reach_of(detector) + 0.5
        self._segments = iter(segments)
        self._next: AudioSegment | None = next(self._segments, None)
        self._is_first = True
        self._features: Tensor | None = None  # (s, a)
        self._times = np.zeros(0)  # (s,) seconds, on the clock of the frames
        self._mask: Tensor | None = None
        self._known_until = -np.inf

    @property
    def is_empty(self) -> bool:
        """Whether there was no sound at all."""
        return self._next is None and self._features is None

    @torch.no_grad()
    def align(self, visual: Tensor, frame_times: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Bring the sound to the next frames.

        Args:
            visual: `(t, d_model)`, from `AUDetector.merge_regions`.
            frame_times: `(t,)`, seconds, on the clock of the segments.

        Returns:
            `(t, d_guide)`, and `(t)` bool, True where there is sound.
        """
        if len(frame_times):
            while self._next is not None and self._known_until < frame_times.max() + self._reach:
                self._encode(self._next)
        if self._features is None or self._mask is None or not len(frame_times):
            width = self.detector.d_guide or 0
            return (
                visual.new_zeros(len(visual), width),
                torch.zeros(len(visual), dtype=torch.bool, device=visual.device),
            )
        device = visual.device
        audio, mask = self.detector.align_audio(
            visual[None],
            self._features[None],
            torch.from_numpy(self._times)[None].to(device),
            torch.from_numpy(np.ascontiguousarray(frame_times))[None].to(device),
            self._mask[None],
        )
        self._forget(float(frame_times.min()))
        return audio[0], mask[0]

    # ------------------------------------------------------------------ inside
    def _encode(self, segment: AudioSegment) -> None:
        following = next(self._segments, None)
        device = self.detector.no_face.device
        heard = self.detector.encode_audio(torch.from_numpy(segment.waveform).to(device)[None])
        times = segment.start_time + heard.times[0].cpu().numpy()
        # A feature may be stamped a little outside of the sound: the ends own that too.
        start = -np.inf if self._is_first else segment.owned[0]
        end = np.inf if following is None else segment.owned[1]
        # A feature on the border, give or take rounding, must have one owner.
        chosen = (times >= start - 1e-6) & (times < end - 1e-6)
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(device)
        features, mask = heard.features[0, rows], heard.mask[0, rows]
        if self._features is None or self._mask is None:
            self._features, self._mask = features, mask
        else:
            self._features = torch.cat([self._features, features])
            self._mask = torch.cat([self._mask, mask])
        self._times = np.concatenate([self._times, times[chosen]])
        self._known_until = end
        self._next, self._is_first = following, False

    def _forget(self, oldest_frame: float) -> None:
        first = int(np.searchsorted(self._times, oldest_frame - self._reach))
        if first and self._features is not None and self._mask is not None:
            self._times = self._times[first:]
            self._features, self._mask = self._features[first:], self._mask[first:]
