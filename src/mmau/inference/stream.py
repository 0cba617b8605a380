"""From crops and sound to features and logits, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes
from mmau.data.prepared import PreparedChunk
from mmau.encoders import AudioFeatures
from mmau.media.audio import AudioSegment
from mmau.models import AUDetector
from mmau.progress import ProgressCallback

SAMPLE_RATE = 16000
_WAVLM_HOP = 320  # samples between two features of WavLM; the hop of log-mel is the same


@torch.no_grad()
def encode_trial(
    detector: AUDetector,
    trial: PreparedChunk,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Turn every frame that shows a face into region tokens, chunk by chunk.

    Args:
        detector: The detector.
        trial: Crops, landmarks and masks of a video, or of a part of it.
        frames_per_chunk: Frames that the visual encoder encodes at once; bounds the memory.
        progress: Called as `progress(done, total)` in frames with a face.

    Returns:
        `(t, m, d)`, on the detector's device; zeros where there is no face.
    """

    def on_device(array: NDArray[np.generic]) -> Tensor:
        # A copy of what lies in a memory-mapped file.
        return torch.from_numpy(np.array(array)).to(detector.no_face.device)

    tokens = detector.no_face.new_zeros(
        (trial.num_frames, detector.num_regions, detector.d_region), dtype=torch.float32
    )
    with_face = np.flatnonzero(trial.valid)
    for start in range(0, len(with_face), frames_per_chunk):
        rows = with_face[start : start + frames_per_chunk]
        images = on_device(trial.crops[rows]).movedim(-1, 1).float() / 255
        encoded = detector.encode_frames(images, on_device(trial.landmarks[rows]))
        tokens[on_device(rows)] = encoded.to(tokens.dtype)
        if progress is not None:
            progress(start + len(rows), len(with_face))
    return tokens


def receptive_field(detector: AUDetector) -> float:
    """Tell how far from a frame its sound may be, in seconds."""
    if detector.audio_cross_attention is not None:
        return float(cast("Any", detector.audio_cross_attention).window)
    return 0.04  # the default of `interpolate_features`, which the detector leaves as it is


class _AudioBuffer:
    """Audio features near the frames that are asked about; older ones are forgotten."""

    def __init__(self, detector: AUDetector) -> None:
        self.detector = detector
        # Half a second more than needed costs nothing and forgives frames out of order.
        self._reach = receptive_field(detector) + 0.5
        self._times = np.zeros(0)  # (s,) seconds, on the clock of the frames
        self._features: tuple[Tensor, Tensor] | None = None  # (s, a), and (s) where they hold

    @torch.no_grad()
    def align(self, visual: Tensor, frame_times: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Bring the sound to frames: `(t, d_audio)`, and `(t)` bool, True where there is sound."""
        if len(frame_times):
            self._encode_until(frame_times.max() + self._reach)
        if self._features is None or not len(frame_times):
            width = self.detector.d_audio or 0
            no_audio = torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
            return visual.new_zeros(len(visual), width), no_audio
        features, feature_mask = self._features
        audio, mask = self.detector.align_audio(
            visual[None],
            features[None],
            torch.from_numpy(self._times)[None].to(visual.device),
            torch.from_numpy(np.ascontiguousarray(frame_times))[None].to(visual.device),
            feature_mask[None],
        )
        first = int(np.searchsorted(self._times, frame_times.min() - self._reach))
        self._times = self._times[first:]
        self._features = features[first:], feature_mask[first:]
        return audio[0], mask[0]

    def _encode_until(self, time: float) -> None:
        """Have the features up to a time, as far as there is sound."""
        raise NotImplementedError

    def _encode(
        self, waveform: NDArray[np.float32], start_time: float
    ) -> tuple[AudioFeatures, NDArray[np.floating]]:
        """Features of a waveform, and their times on the clock of the frames."""
        waveforms = torch.from_numpy(waveform).to(self.detector.no_face.device)[None]
        encoded = self.detector.encode_audio(waveforms)
        return encoded, start_time + encoded.times[0].cpu().numpy()

    def _keep(
        self, encoded: AudioFeatures, times: NDArray[np.floating], chosen: NDArray[np.bool_]
    ) -> None:
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(encoded.features.device)
        features, mask = encoded.features[0, rows], encoded.mask[0, rows]
        if self._features is not None:
            features = torch.cat([self._features[0], features])
            mask = torch.cat([self._features[1], mask])
        self._features = features, mask
        self._times = np.concatenate([self._times, times[chosen]])


class SoundStream(_AudioBuffer):
    """Features of segments in order, such as of a file; each is taken when a frame needs it."""

    def __init__(self, detector: AUDetector, segments: Iterable[AudioSegment]) -> None:
        super().__init__(detector)
        self._segments = iter(segments)
        self._next: AudioSegment | None = next(self._segments, None)
        self._known_until = -np.inf

    @property
    def is_empty(self) -> bool:
        """Whether there was no sound at all."""
        return self._next is None and self._features is None

    def _encode_until(self, time: float) -> None:
        while self._next is not None and self._known_until < time:
            segment, self._next = self._next, next(self._segments, None)
            # A feature may be stamped a little outside of the sound: the ends own that too.
            start = -np.inf if self._features is None else segment.owned[0]
            end = np.inf if self._next is None else segment.owned[1]
            # A feature on the border, give or take rounding, must have one owner.
            encoded, times = self._encode(segment.waveform, segment.start_time)
            self._keep(encoded, times, (times >= start - 1e-6) & (times < end - 1e-6))
            self._known_until = end


class LiveSound(_AudioBuffer):
    """Features of a sound that arrives with the frames, from its last seconds."""

    def __init__(self, detector: AUDetector, start: float, context: float) -> None:
        super().__init__(detector)
        self._start = start
        framing = getattr(detector.audio_encoder, "framing", None)
        # What is dropped is a whole number of hops, so that windows stay where they were.
        self._hop = _WAVLM_HOP if framing is None else int(framing.hop)
        self._context = max(1, round(context * SAMPLE_RATE / self._hop)) * self._hop
        self._waveform = np.zeros(0, dtype=np.float32)
        self._first = 0  # number of the first sample that is kept
        self._is_new = False  # whether samples came since the encoder last ran

    def add(self, samples: NDArray[np.floating]) -> None:
        """Take the next samples."""
        if samples.ndim != 1:
            raise ValueError(f"`samples` must be mono, of shape (n,); got {samples.shape}.")
        self._waveform = np.concatenate([self._waveform, np.asarray(samples, dtype=np.float32)])
        self._is_new |= len(samples) > 0

    def _encode_until(self, time: float) -> None:
        if not self._is_new:
            return
        encoded, times = self._encode(self._waveform, self._start + self._first / SAMPLE_RATE)
        complete = encoded.mask[0].cpu().numpy()
        newest = self._times[-1] if len(self._times) else -np.inf
        self._keep(encoded, times, complete & (times > newest + 1e-6))
        excess = max(0, len(self._waveform) - self._context) // self._hop * self._hop
        self._waveform = self._waveform[excess:]
        self._first += excess
        self._is_new = False


class LogitStream:
    """Classify a video chunk by chunk.

    With a causal temporal model the state is carried from chunk to chunk, every frame comes out at
    once, and the result is that of one pass over the whole video, to rounding. A causal transformer
    without `window` keeps keys and values of all frames as its state, so its memory grows.

    A model that is not causal reads overlapping windows instead and each frame is taken from the
    one window that owns it, at least `margin_frames` from both ends of it. A video of up to
    `window_frames` frames is read in one pass; in a longer one a frame depends on no more than
    its window.

    Args:
        detector: The detector, in eval mode.
        window_frames: Frames that a model which is not causal reads at once.
        margin_frames: Frames at either end of a window that another window owns.

    Raises:
        ValueError: If a window has no middle.

    Examples:
        >>> from mmau.models import Component, DetectorConfig, build_detector
        >>> config = DetectorConfig(
        ...     visual=Component("tiny"), audio=None, d_region=32, num_heads=4, d_model=32,
        ...     crop_size=64,
        ... )
        >>> stream = LogitStream(build_detector(config).eval())
        >>> ready = [stream.push(torch.zeros(n, 32)) for n in (3, 1, 5)]
        >>> [len(logits) for logits in ready], len(stream.finish())
        ([3, 1, 5], 0)
    """

    def __init__(
        self, detector: AUDetector, *, window_frames: int = 2048, margin_frames: int = 512
    ) -> None:
        check_range("margin_frames", margin_frames, 0)
        if window_frames <= 2 * margin_frames:
            raise ValueError(
                "`window_frames` must be more than twice `margin_frames`, or a window owns "
                f"nothing; got {window_frames} and {margin_frames}."
            )
        self.detector = detector
        self.causal = bool(cast("Any", detector.temporal).causal)
        self.window_frames = window_frames
        self.margin_frames = margin_frames
        self._state: Any = None
        # Frames that wait for their window: visual, and with an audio encoder audio and its mask.
        self._waiting: list[Tensor] = []
        self._left = 0  # frames at the head of those that an earlier window owned

    @torch.no_grad()
    def push(
        self, visual: Tensor, audio: Tensor | None = None, audio_mask: Tensor | None = None
    ) -> Tensor:
        """Take the next frames.

        Args:
            visual: `(t, d_model)`, from `AUDetector.merge_regions`; may be empty.
            audio: `(t, d_audio)`, from `AUDetector.align_audio`; `None` where there is no sound.
            audio_mask: `(t)` bool, where there is sound; everywhere if left out.

        Returns:
            `(u, c)`, logits of the next frames that are ready: these if the model is causal.

        Raises:
            TypeError: If the mask is not bool.
            ValueError: If a shape does not fit, or sound is given to a detector without.
        """
        if self.detector.d_audio is None and audio is not None:
            raise ValueError("this detector was built without an audio encoder; leave audio out.")
        check_shapes(
            sizes={"d": self.detector.d_model, "a": self.detector.d_audio or 0},
            visual=(visual, "t d"),
            audio=(audio, "t a"),
            audio_mask=(audio_mask, "t"),
        )
        check_mask("audio_mask", audio_mask)
        if not len(visual):
            return self._nothing(visual)
        if self.causal:
            logits, self._state = self.detector.classify(
                visual[None],
                None if audio is None else audio[None],
                audio_mask=None if audio_mask is None else audio_mask[None],
                state=self._state,
            )
            return logits[0]
        self._append(visual, audio, audio_mask)
        ready = []
        while self._num_waiting() > self.window_frames:
            ready.append(self._run_window(last=False))
        return torch.cat(ready) if ready else self._nothing(visual)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Say that there are no more frames.

        Returns:
            `(u, c)`, logits of the frames that were not ready; none if the model is causal.
        """
        if self._num_waiting() > self._left:
            return self._run_window(last=True)
        return self._nothing(self.detector.no_face)

    def _nothing(self, like: Tensor) -> Tensor:
        return like.new_zeros(0, len(self.detector.au_names))

    def _num_waiting(self) -> int:
        return len(self._waiting[0]) if self._waiting else 0

    def _append(self, visual: Tensor, audio: Tensor | None, audio_mask: Tensor | None) -> None:
        new = [visual]
        if self.detector.d_audio is not None:
            # Chunks with and without sound may share a window.
            if audio is None:
                audio = visual.new_zeros(len(visual), self.detector.d_audio)
                audio_mask = torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
            elif audio_mask is None:
                audio_mask = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
            new += [audio, audio_mask]
        if self._waiting:
            new = [torch.cat(pair) for pair in zip(self._waiting, new, strict=True)]
        self._waiting = new

    def _run_window(self, *, last: bool) -> Tensor:
        size = self._num_waiting() if last else self.window_frames
        visual, *audio = (part[None, :size] for part in self._waiting)
        audio_mask = audio.pop() if audio else None
        logits, _ = self.detector.classify(visual, *audio, audio_mask=audio_mask)
        end = size if last else size - self.margin_frames
        owned = logits[0, self._left : end]
        keep_from = end if last else end - self.margin_frames
        self._waiting = [part[keep_from:] for part in self._waiting]
        self._left = end - keep_from
        return owned
