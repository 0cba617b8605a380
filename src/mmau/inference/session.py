"""One person of one video, from chunks of faces to logits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes
from mmau.data.prepare import chunks_by_person
from mmau.data.prepared import PreparedChunk, PreparedTrial
from mmau.media.audio import AudioSegment
from mmau.media.faces import Face, FaceFinder, FaceOptions, FaceRow
from mmau.media.video import VideoFrame, VideoReader
from mmau.models import AUDetector
from mmau.progress import ProgressCallback

STAGES = ("decode", "detect", "encode", "sound", "temporal")


@dataclass
class StageTimes:
    """Seconds spent in each stage, added up over one or more videos.

    Examples:
        >>> times = StageTimes()
        >>> times.seconds["decode"], times.num_frames = 0.5, 100
        >>> print(times.render())
        decode 200 frames/s (100 %)
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Wall time of each stage: decoding, finding faces and landmarks (with the crops), encoding
    the crops, encoding the sound, and the temporal model."""
    num_frames: int = 0
    """Frames that went through."""
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    """What `during` reads, in seconds; `time.process_time` for CPU time."""

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage.

        Args:
            stage: One of `STAGES`.

        Yields:
            Nothing.
        """
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[stage] += self.clock() - start

    def add(self, other: StageTimes) -> None:
        """Add what was measured elsewhere.

        Args:
            other: For example, of another process.
        """
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self.num_frames += other.num_frames

    def render(self) -> str:
        """Say how fast each stage was and what share of the time it took.

        Returns:
            One line, such as `decode 900 frames/s (10 %), detect 100 frames/s (90 %)`.
        """
        total = sum(self.seconds.values())
        return ", ".join(
            f"{stage} {self.num_frames / seconds:.0f} frames/s ({seconds / total:.0%})".replace(
                "%)", " %)"
            )
            for stage, seconds in self.seconds.items()
            if seconds > 0
        )


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
    """Tell how far a frame listens, in seconds."""
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


@torch.no_grad()
def encode_crops(
    detector: AUDetector,
    crops: NDArray[np.uint8],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
    *,
    frames_at_once: int = 64,
) -> Tensor:
    """Turn the frames that show a face into one vector each; the others get the learned one.

    Args:
        detector: The detector, in eval mode.
        crops: `(t, s, s, 3)`, RGB, aligned faces.
        landmarks: `(t, 68, 2)`, in crop pixels.
        valid: `(t,)`, whether there is a face.
        frames_at_once: Frames that the visual encoder sees at once; bounds the memory.

    Returns:
        `(t, d_model)`, on the detector's device.
    """
    tokens = _region_tokens(detector, crops, landmarks, np.asarray(valid), frames_at_once, None)
    return detector.merge_regions(tokens[None], _on(detector, valid)[None])[0]


@torch.no_grad()
def encode_trial(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Turn every frame that shows a face into region tokens, chunk by chunk.

    Args:
        detector: The detector.
        trial: Crops, landmarks and masks of a video.
        frames_per_chunk: Frames that the visual encoder sees at once; bounds the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, m, d)`, on the detector's device; zeros where there is no face.
    """
    return _region_tokens(
        detector, trial.crops, trial.landmarks, trial.valid, frames_per_chunk, progress
    )


def detector_logits(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Run a detector over one prepared trial.

    Args:
        detector: The detector, in eval mode.
        trial: Crops, landmarks, masks, timestamps and sound of a video.
        frames_per_chunk: Frames that the visual encoder and the temporal model see at once; bounds
            the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, c)`, logits on the CPU.
    """
    stream = LogitStream(detector)
    sound = None
    if detector.audio_encoder is not None and trial.waveform is not None:
        sound = SoundStream(detector, cut_sound([trial.waveform], trial.audio_start))
    ready = []
    for rows in _slices(trial.num_frames, frames_per_chunk):
        visual = encode_crops(
            detector,
            trial.crops[rows],
            trial.landmarks[rows],
            trial.valid[rows],
            frames_at_once=frames_per_chunk,
        )
        heard = () if sound is None else sound.align(visual, trial.timestamps[rows])
        ready.append(stream.push(visual, *heard).float().cpu())
        if progress is not None:
            progress(rows.stop, trial.num_frames)
    ready.append(stream.finish().float().cpu())
    return torch.cat(ready)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _on(detector: AUDetector, array: NDArray[np.generic]) -> Tensor:
    # A copy of what lies in a memory-mapped file.
    return torch.from_numpy(np.array(array)).to(detector.no_face.device)


@torch.no_grad()
def _region_tokens(
    detector: AUDetector,
    crops: NDArray[np.uint8],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
    frames_at_once: int,
    progress: ProgressCallback | None,
) -> Tensor:
    device = detector.no_face.device
    tokens = torch.zeros(len(valid), detector.num_regions, detector.d_region, device=device)
    seen = np.flatnonzero(valid)
    for rows in (seen[part] for part in _slices(len(seen), frames_at_once)):
        images = _on(detector, crops[rows]).movedim(-1, 1).float() / 255
        encoded = detector.encode_frames(images, _on(detector, landmarks[rows]))
        tokens[torch.from_numpy(rows).to(device)] = encoded.to(tokens.dtype)
        if progress is not None:
            progress(int(np.searchsorted(seen, rows[-1])) + 1, len(seen))
    return tokens


class LogitStream:
    """Classify a video piece by piece.

    With a causal temporal model the state is carried from piece to piece, every frame comes out at
    once, and the result is that of one pass over the whole video, to rounding. A causal transformer
    without `window` keeps keys and values of all frames as its state, so its memory grows.

    A model that is not causal reads overlapping windows instead and each frame is taken from the
    one window that owns it, at least `margin_frames` from both ends of it. A video of up to
    `window_frames` frames is read in one pass; in a longer one a frame does not see further than
    its window.

    Args:
        detector: The detector, in eval mode.
        window_frames: Frames that a model which is not causal sees at once.
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
        >>> pieces = [stream.push(torch.zeros(n, 32)) for n in (3, 1, 5)]
        >>> [len(piece) for piece in pieces], len(stream.finish())
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
        # Frames that wait for their window: the two streams, and where there is sound.
        self._waiting: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._left = 0  # frames at the head of those that an earlier window owned

    @torch.no_grad()
    def push(
        self, visual: Tensor, audio: Tensor | None = None, audio_mask: Tensor | None = None
    ) -> Tensor:
        """Take the next frames.

        Args:
            visual: `(t, d_model)`, from `AUDetector.merge_regions`; may be empty.
            audio: `(t, d_guide)`, from `AUDetector.align_audio`; `None` where there is no sound.
            audio_mask: `(t)` bool, where there is sound; everywhere if left out.

        Returns:
            `(u, c)`, logits of the next frames that are ready: these if the model is causal.

        Raises:
            TypeError: If the mask is not bool.
            ValueError: If a shape does not fit, or sound is given to a detector without.
        """
        if self.detector.d_guide is None and audio is not None:
            raise ValueError("this detector was built without an audio encoder; leave sound out.")
        check_shapes(
            sizes={"d": self.detector.d_model, "a": self.detector.d_guide or 0},
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

    # ------------------------------------------------------------------ windows
    def _nothing(self, like: Tensor) -> Tensor:
        return like.new_zeros(0, len(self.detector.au_names))

    def _num_waiting(self) -> int:
        return 0 if self._waiting is None else len(self._waiting[0])

    def _append(self, visual: Tensor, audio: Tensor | None, audio_mask: Tensor | None) -> None:
        if self.detector.d_guide is not None:
            # Pieces with and without sound may share a window.
            if audio is None:
                audio = visual.new_zeros(len(visual), self.detector.d_guide)
                audio_mask = torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
            elif audio_mask is None:
                audio_mask = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        new = (visual, audio, audio_mask)
        self._waiting = (
            new if self._waiting is None else cast("Any", tuple(map(_joined, self._waiting, new)))
        )

    def _run_window(self, *, last: bool) -> Tensor:
        waiting = cast("tuple[Tensor, Tensor | None, Tensor | None]", self._waiting)
        size = self._num_waiting() if last else self.window_frames
        visual, audio, audio_mask = (
            None if part is None else part[None, :size] for part in waiting
        )
        logits, _ = self.detector.classify(cast("Tensor", visual), audio, audio_mask=audio_mask)
        end = size if last else size - self.margin_frames
        owned = logits[0, self._left : end]
        keep_from = end if last else end - self.margin_frames
        self._waiting = cast(
            "Any", tuple(None if part is None else part[keep_from:] for part in waiting)
        )
        self._left = end - keep_from
        return owned


def _joined(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    return None if before is None or after is None else torch.cat([before, after])


@dataclass(frozen=True)
class VideoLogits:
    """What a detector says about one person of a video, before any calibration."""

    logits: Tensor
    """`(t, c)`, float32, on the CPU."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found."""
    confidence: NDArray[np.float32]
    """`(t,)`, in [0, 1]; 0 without a face."""
    first_frame: int = 0
    """Number of the first row's frame, counted from 0."""
    face_id: int = 0
    """Which person, if all faces are followed."""
    notes: tuple[str, ...] = ()
    """What a reader should know about this video."""
    landmarks: NDArray[np.float32] | None = None
    """`(t, 68, 2)`, pixels of the upright frame, if asked for."""
    boxes: NDArray[np.float32] | None = None
    """`(t, 4)`, pixels of the upright frame, if asked for."""


class PersonStream:
    """Chunks in, logits out at the end; only what a table needs is kept."""

    def __init__(
        self,
        detector: AUDetector,
        sound: SoundStream | None,
        stages: StageTimes,
        *,
        frames_at_once: int = 64,
    ) -> None:
        self._detector, self._sound, self._stages = detector, sound, stages
        self._frames_at_once = frames_at_once
        self._stream = LogitStream(detector)
        self._logits: list[Tensor] = []
        self._chunks: list[tuple[NDArray[np.generic], ...]] = []
        self._first_frame: int | None = None

    def push(self, seen: SeenChunk) -> None:
        """Take the next frames."""
        chunk = seen.faces
        if self._first_frame is None:
            self._first_frame = chunk.first_frame
        with self._stages.during("encode"):
            visual = encode_crops(
                self._detector,
                chunk.crops,
                chunk.landmarks,
                chunk.valid,
                frames_at_once=self._frames_at_once,
            )
        audio = audio_mask = None
        if self._sound is not None:
            with self._stages.during("sound"):
                audio, audio_mask = self._sound.align(visual, chunk.timestamps)
        with self._stages.during("temporal"):
            self._logits.append(self._stream.push(visual, audio, audio_mask).float().cpu())
        kept: tuple[NDArray[np.generic], ...] = (chunk.timestamps, chunk.valid, chunk.confidence)
        if seen.frame_landmarks is not None:
            kept += (seen.frame_landmarks, chunk.boxes)
        # Copies: a slice would keep the whole chunk with its crops alive.
        self._chunks.append(tuple(np.array(part) for part in kept))

    def finish(self) -> VideoLogits:
        """Say that there are no more frames."""
        with self._stages.during("temporal"):
            self._logits.append(self._stream.finish().float().cpu())
        columns: list[Any] = [np.concatenate(parts) for parts in zip(*self._chunks, strict=True)]
        timestamps, valid, confidence, *geometry = columns
        landmarks, boxes = geometry or (None, None)
        return VideoLogits(
            torch.cat(self._logits),
            timestamps,
            valid,
            confidence,
            self._first_frame or 0,
            landmarks=landmarks,
            boxes=boxes,
        )


def score_people(
    faces: Iterable[tuple[NDArray[np.float64], dict[int, SeenChunk]]],
    start: Callable[[], PersonStream],
    *,
    all_faces: bool,
) -> list[VideoLogits]:
    """Run one stream per person over a video."""
    streams: dict[int, PersonStream] = {}
    finished: list[VideoLogits] = []
    all_times: list[NDArray[np.float64]] = []

    def finish(number: int) -> None:
        finished.append(_until_last_seen(replace(streams.pop(number).finish(), face_id=number)))

    for times, chunks in faces:
        if all_faces and not finished and not streams:
            all_times.append(times)
        for number, chunk in chunks.items():
            if not all_faces:
                if number not in streams:
                    streams[number] = start()
                streams[number].push(chunk)
            elif chunk.faces.valid.any():
                if number not in streams:
                    streams[number] = start()
                    chunk = _from_first_seen(chunk)
                streams[number].push(chunk)
            elif number in streams:
                # A whole chunk without them is longer than a tracker remembers anybody.
                finish(number)
    for number in list(streams):
        if all_faces:
            finish(number)
        else:
            finished.append(streams.pop(number).finish())
    if finished:
        return sorted(finished, key=lambda one: (one.face_id, one.first_frame))
    nobody = start()
    first = 0
    for times in all_times:
        nobody.push(_nobody(times, first))
        first += len(times)
    if not all_times:
        raise ValueError("there is not one frame to predict.")
    return [nobody.finish()]


def _from_first_seen(seen: SeenChunk) -> SeenChunk:
    chunk = seen.faces
    first = int(chunk.valid.argmax())
    rows: dict[str, Any] = {
        field.name: getattr(chunk, field.name)[first:]
        for field in fields(chunk)
        if isinstance(getattr(chunk, field.name), np.ndarray)
    }
    points = seen.frame_landmarks
    return SeenChunk(
        replace(chunk, first_frame=chunk.first_frame + first, **rows),
        None if points is None else points[first:],
    )


def _until_last_seen(scored: VideoLogits) -> VideoLogits:
    count = len(scored.valid) - int(scored.valid[::-1].argmax())
    rows: dict[str, Any] = {
        field.name: getattr(scored, field.name)[:count]
        for field in fields(scored)
        if isinstance(getattr(scored, field.name), (np.ndarray, Tensor))
    }
    return replace(scored, **rows)


def _nobody(times: NDArray[np.float64], first_frame: int) -> SeenChunk:
    count = len(times)
    return SeenChunk(
        PreparedChunk(
            crops=np.zeros((count, 1, 1, 3), dtype=np.uint8),  # not looked at
            landmarks=np.full((count, 68, 2), np.nan, dtype=np.float32),
            valid=np.zeros(count, dtype=bool),
            confidence=np.zeros(count, dtype=np.float32),
            timestamps=times,
            boxes=np.full((count, 4), np.nan, dtype=np.float32),
            face_ids=np.full(count, -1, dtype=np.int32),
            first_frame=first_frame,
        ),
        np.full((count, 68, 2), np.nan, dtype=np.float32),
    )


def increasing(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move times that do not come after the one before by the least that is needed.

    Examples:
        >>> increasing(np.array([0.0, 0.5, 0.5, 1.0])).round(3)
        array([0. , 0.5, 0.5, 1. ])
    """
    if len(times) < 2 or bool((np.diff(times) > 0).all()):
        return times
    steps = 1e-6 * np.arange(len(times))
    moved: NDArray[np.float64] = np.maximum.accumulate(times - steps) + steps
    return moved


FRAMES_PER_CHUNK = 256


class SeenChunk(NamedTuple):
    """Consecutive frames of one person."""

    faces: PreparedChunk
    """Crops, landmarks in their pixels, masks and times."""
    frame_landmarks: NDArray[np.float32] | None = None
    """`(t, 68, 2)`, pixels of the upright frame, if asked for."""


class _Finder(FaceFinder):
    """A finder that can keep the landmarks of the picture, which only a drawing needs."""

    def __init__(self, options: FaceOptions, *, geometry: bool) -> None:
        super().__init__(options)
        self._geometry = geometry
        self._found: list[dict[int, NDArray[np.float32]]] = []

    def find(self, frame: VideoFrame) -> list[FaceRow]:
        self._found.append({})
        return super().find(frame)

    def _cut(self, image: NDArray[np.uint8], face: Face) -> FaceRow:
        if self._geometry:
            self._found[-1][face.face_id if self.keeps_all_faces else 0] = face.landmarks
        return super()._cut(image, face)

    def take(self, chunks: dict[int, PreparedChunk]) -> dict[int, SeenChunk]:
        """Join the landmarks of the frames since the last call to their chunks."""
        found, self._found = self._found, []
        if not self._geometry:
            return {number: SeenChunk(chunk) for number, chunk in chunks.items()}
        nothing = np.full((68, 2), np.nan, dtype=np.float32)
        return {
            number: SeenChunk(chunk, np.stack([faces.get(number, nothing) for faces in found]))
            for number, chunk in chunks.items()
        }


class FaceChunks:
    """Iterate over chunks by person; `warnings` is complete after the last one."""

    def __init__(
        self,
        source: VideoReader,
        finder: _Finder,
        stages: StageTimes,
        progress: ProgressCallback | None,
    ) -> None:
        self._source, self._finder, self._stages = source, finder, stages
        self._seconds: dict[str, float] = {}
        self._times: list[float] = []
        reader = cast("VideoReader", _Timed(source, self._times))
        self._chunks = chunks_by_person(reader, finder, FRAMES_PER_CHUNK, progress, self._seconds)

    def __iter__(self) -> Iterator[tuple[NDArray[np.float64], dict[int, SeenChunk]]]:
        """Yield the times of the next frames and the chunk of each person."""
        for chunks in self._chunks:
            times = np.array(self._times, dtype=np.float64)
            self._times.clear()
            self._stages.num_frames += len(times)
            yield times, self._finder.take(chunks)
        for ours, theirs in (("decode", "decode"), ("detect", "faces")):
            self._stages.seconds[ours] += self._seconds[theirs]

    @property
    def all_faces(self) -> bool:
        """Whether each person has chunks of their own."""
        return self._finder.keeps_all_faces

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the video."""
        return (*self._source.warnings, *self._finder.warnings())


@contextmanager
def faces_of_file(
    path: str | os.PathLike[str],
    options: FaceOptions,
    stages: StageTimes,
    *,
    name: str,
    strict: bool,
    geometry: bool,
    progress: ProgressCallback | None,
    num_threads: int = 0,
) -> Iterator[FaceChunks]:
    """Open a video file and find its faces while it is read."""
    finder = _Finder(options, geometry=geometry)
    try:
        finder.start(name)
        with VideoReader(path, strict=strict, num_threads=num_threads) as reader:
            yield FaceChunks(reader, finder, stages, progress)
    finally:
        finder.close()


@contextmanager
def faces_of_frames(
    frames: Iterable[tuple[NDArray[np.uint8], float]],
    options: FaceOptions,
    stages: StageTimes,
    *,
    name: str,
    geometry: bool,
    progress: ProgressCallback | None,
) -> Iterator[FaceChunks]:
    """Find the faces in frames that come from anywhere."""
    finder = _Finder(options, geometry=geometry)
    try:
        finder.start(name)
        source = cast("VideoReader", _Frames(frames))
        yield FaceChunks(source, finder, stages, progress)
    finally:
        finder.close()


class _Timed:
    """Frames that leave their times behind, also where nobody is seen."""

    def __init__(self, source: VideoReader, times: list[float]) -> None:
        self.info = source.info
        self._source, self._times = source, times

    def __iter__(self) -> Iterator[VideoFrame]:
        for frame in self._source:
            self._times.append(frame.time)
            yield frame


class _Announcement(NamedTuple):
    num_frames_announced: int | None = None


class _Frames:
    """Frames in the place of a `VideoReader`."""

    info = _Announcement()
    warnings: tuple[str, ...] = ()

    def __init__(self, frames: Iterable[tuple[NDArray[np.uint8], float]]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[VideoFrame]:
        before = -np.inf
        for index, (image, seconds) in enumerate(self._frames):
            check_frame(image, seconds, before)
            before = float(seconds)
            yield VideoFrame(index=index, time=before, image=image)


def check_frame(image: Any, time: float, before: float) -> None:
    """Refuse what is no picture, or comes at no later time than the one before."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(f"a frame must be a uint8 array (h, w, 3), RGB; got {given}.")
    if image.shape[2] != 3:
        raise ValueError(f"a frame must be a uint8 array (h, w, 3), RGB; got {image.shape}.")
    if not time > before or not np.isfinite(time):
        raise ValueError(
            f"the time of a frame must be later than that of the frame before; got {time!r} "
            f"after {before!r}."
        )
