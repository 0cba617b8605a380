"""One way from faces and sound to logits, for a file, a list of frames and a camera."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau.data.prepared import PreparedChunk, PreparedTrial
from mmau.evaluation.calibration import Calibration
from mmau.inference.stream import LiveSound, LogitStream, SoundStream, encode_trial
from mmau.media.audio import cut_sound
from mmau.media.video import VideoFrame
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


class Session:
    """One face, from chunks of frames to logits; keeps nothing but the state of the model."""

    def __init__(
        self,
        detector: AUDetector,
        sound: SoundStream | LiveSound | None = None,
        stages: StageTimes | None = None,
        *,
        frames_at_once: int = 64,
    ) -> None:
        self._detector, self._sound = detector, sound
        self._stages = StageTimes() if stages is None else stages
        self._frames_at_once = frames_at_once
        self._stream = LogitStream(detector)

    @property
    def causal(self) -> bool:
        """Whether every frame is ready at once."""
        return self._stream.causal

    def push(self, chunk: PreparedChunk) -> Tensor:
        """Take the next frames; gives the logits `(u, c)`, float32 on the CPU, that are ready."""
        with self._stages.during("encode"):
            visual = self._encode(chunk)
        audio: tuple[Tensor, ...] = ()
        if self._sound is not None:
            with self._stages.during("sound"):
                audio = self._sound.align(visual, chunk.timestamps)
        with self._stages.during("temporal"):
            return self._stream.push(visual, *audio).float().cpu()

    def finish(self) -> Tensor:
        """Say that there are no more frames; gives the logits that were not ready."""
        with self._stages.during("temporal"):
            return self._stream.finish().float().cpu()

    @torch.no_grad()
    def _encode(self, chunk: PreparedChunk) -> Tensor:
        tokens = encode_trial(self._detector, chunk, frames_per_chunk=self._frames_at_once)
        valid = torch.from_numpy(np.array(chunk.valid)).to(tokens.device)
        return self._detector.merge_regions(tokens[None], valid[None])[0]


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
        frames_per_chunk: Frames that the visual encoder and the temporal model take at once; bounds
            the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, c)`, logits on the CPU.
    """
    sound = None
    if detector.audio_encoder is not None and trial.waveform is not None:
        sound = SoundStream(detector, cut_sound([trial.waveform], trial.audio_start))
    session = Session(detector, sound, frames_at_once=frames_per_chunk)
    ready = []
    for start in range(0, trial.num_frames, frames_per_chunk):
        chunk = trial.rows(start, start + frames_per_chunk)
        ready.append(session.push(chunk))
        if progress is not None:
            progress(start + chunk.num_frames, trial.num_frames)
    return torch.cat([*ready, session.finish()])


@dataclass(frozen=True)
class VideoLogits:
    """What a detector says about one face of a video, before any calibration."""

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
    """Number of the face, if all are followed."""
    notes: tuple[str, ...] = ()
    """What a reader should know about this video."""
    landmarks: NDArray[np.float32] | None = None
    """`(t, 68, 2)`, pixels of the upright frame, if asked for."""
    boxes: NDArray[np.float32] | None = None
    """`(t, 4)`, pixels of the upright frame, if asked for."""


class _FaceScores:
    """A session of one face, and of each frame what a table needs."""

    def __init__(self, session: Session, first_frame: int, *, geometry: bool) -> None:
        self._session = session
        self._first_frame = first_frame
        self._names = ["timestamps", "valid", "confidence"]
        if geometry:
            self._names += ["frame_landmarks", "boxes"]
        self._rows: list[list[NDArray[Any]]] = []
        self._logits: list[Tensor] = []

    def push(self, chunk: PreparedChunk) -> None:
        self._logits.append(self._session.push(chunk))
        # Copies: a slice would keep the whole chunk with its crops alive.
        self._rows.append([np.array(getattr(chunk, name)) for name in self._names])

    def finish(self, face_id: int, *, until_last_seen: bool) -> VideoLogits:
        logits = torch.cat([*self._logits, self._session.finish()])
        columns = [np.concatenate(parts) for parts in zip(*self._rows, strict=True)]
        if until_last_seen:
            count = int(np.flatnonzero(columns[1])[-1]) + 1
            logits, columns = logits[:count], [column[:count] for column in columns]
        timestamps, valid, confidence, *geometry = columns
        landmarks, boxes = geometry or (None, None)
        return VideoLogits(
            logits,
            timestamps,
            valid,
            confidence,
            first_frame=self._first_frame,
            face_id=face_id,
            landmarks=landmarks,
            boxes=boxes,
        )


def score_faces(
    face_chunks: Iterable[dict[int, PreparedChunk]],
    start: Callable[[], Session],
    *,
    all_faces: bool,
    geometry: bool,
) -> list[VideoLogits]:
    """Run one session per face over a video; a face of several has rows while it is there."""
    running: dict[int, _FaceScores] = {}
    finished: list[VideoLogits] = []
    before_any_face: list[NDArray[np.float64]] = []

    def finish(number: int) -> None:
        finished.append(running.pop(number).finish(number, until_last_seen=all_faces))

    for chunks in face_chunks:
        if all_faces and not running and not finished:
            before_any_face.append(chunks[0].timestamps)
        for number, chunk in chunks.items():
            if all_faces and not chunk.valid.any():
                # A whole chunk without a face is longer than a tracker remembers it.
                if number in running:
                    finish(number)
                continue
            if number not in running:
                first = int(chunk.valid.argmax()) if all_faces else 0
                chunk = chunk.rows(first, chunk.num_frames)
                running[number] = _FaceScores(start(), chunk.first_frame, geometry=geometry)
            running[number].push(chunk)
    for number in list(running):
        finish(number)
    if finished:
        return sorted(finished, key=lambda one: (one.face_id, one.first_frame))
    if not before_any_face:
        raise ValueError("there is not one frame to predict.")
    no_face = _FaceScores(start(), 0, geometry=geometry)
    first = 0
    for times in before_any_face:
        no_face.push(PreparedChunk.without_face(times, 1, first))  # crops are not looked at
        first += len(times)
    return [no_face.finish(0, until_last_seen=False)]


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


def checked_frames(frames: Iterable[tuple[NDArray[np.uint8], float]]) -> Iterator[VideoFrame]:
    """Number images with their times, and refuse what is not an image or comes too early."""
    before = -np.inf
    for index, (image, seconds) in enumerate(frames):
        check_frame(image, seconds, before)
        before = float(seconds)
        yield VideoFrame(index=index, time=before, image=image)


def check_calibration(calibration: Calibration, detector: AUDetector) -> None:
    """Refuse thresholds of other outputs, or of a posterior that cannot be computed."""
    names = tuple(detector.au_names)
    if tuple(calibration.au_names) != names:
        raise ValueError(
            f"the calibration is for {', '.join(calibration.au_names)}, "
            f"but the detector predicts {', '.join(names)}."
        )
    calibration.probability_of(torch.zeros(len(names)))  # raises if it cannot be computed


def check_frame(image: Any, time: float, before: float) -> None:
    """Refuse what is not an image, or comes at no later time than the one before."""
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
