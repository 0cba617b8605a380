"""One person of one video, from chunks of faces to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau.data.features import PreparedChunk
from mmau.inference._encode import encode_crops
from mmau.inference._faces import SeenChunk
from mmau.inference._sound import SoundStream
from mmau.inference._stages import StageTimes
from mmau.inference._stream import LogitStream
from mmau.models import AUDetector

__all__ = ["PersonStream", "VideoLogits", "increasing", "score_people"]


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
    """Which person, if everybody is followed."""
    notes: tuple[str, ...] = ()
    """What a reader should know about this video."""
    landmarks: NDArray[np.float32] | None = None
    """`(t, 68, 2)`, pixels of the upright frame, if asked for."""
    boxes: NDArray[np.float32] | None = None
    """`(t, 4)`, pixels of the upright frame, if asked for."""


class PersonStream:
    """Chunks in, logits out at the end; only what a table needs is kept.

    Args:
        detector: The detector, in eval mode.
        sound: The sound of the video, which several people share; `None` without.
        stages: Where to add the time of each stage.
        frames_at_once: Frames that the visual encoder sees at once.
    """

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
        """Take the next frames.

        Args:
            seen: The frames after those of the last call.
        """
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
        """Say that there are no more frames.

        Returns:
            Everything about this person.
        """
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
    everybody: bool,
) -> list[VideoLogits]:
    """Run one stream per person over a video.

    Args:
        faces: Times of the next frames, and the chunk of each person.
        start: Makes the stream of a new person.
        everybody: Whether people come and go; their rows then reach from the first to the last
            frame that shows them. If nobody ever comes, one person has rows without a face.

    Returns:
        One record per person, by number.

    Raises:
        ValueError: If there is not one frame.
    """
    streams: dict[int, PersonStream] = {}
    finished: list[VideoLogits] = []
    all_times: list[NDArray[np.float64]] = []

    def finish(number: int) -> None:
        finished.append(_until_last_seen(replace(streams.pop(number).finish(), face_id=number)))

    for times, chunks in faces:
        if everybody and not finished and not streams:
            all_times.append(times)
        for number, chunk in chunks.items():
            if not everybody:
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
        if everybody:
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

    Args:
        times: `(t,)`, seconds.

    Returns:
        `(t,)`, strictly increasing; the same where they were.

    Examples:
        >>> increasing(np.array([0.0, 0.5, 0.5, 1.0])).round(3)
        array([0. , 0.5, 0.5, 1. ])
    """
    if len(times) < 2 or bool((np.diff(times) > 0).all()):
        return times
    steps = 1e-6 * np.arange(len(times))
    moved: NDArray[np.float64] = np.maximum.accumulate(times - steps) + steps
    return moved
