"""Aligned faces of a video, a chunk of frames at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mmau.data._face_finding import FaceFinder, FaceRow
from mmau.media.video import VideoInfo, VideoReader
from mmau.progress import ProgressCallback

__all__ = ["PreparedChunk", "PreparedStream", "chunks_by_person"]


@dataclass(frozen=True)
class PreparedChunk:
    """Consecutive frames of one trial: row `i` is frame `first_frame + i`.

    A frame without a face is a row too: `valid` is False, its crop is black, and its landmarks and
    box are NaN, so that it cannot pass for a face by mistake.
    """

    crops: NDArray[np.uint8]
    """`(t, s, s, 3)`, RGB, aligned faces."""
    landmarks: NDArray[np.float32]
    """`(t, 68, 2)`, iBUG-68, in crop pixels."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found."""
    confidence: NDArray[np.float32]
    """`(t,)`, in [0, 1]; 0 where `valid` is False."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds on the clock of the container."""
    boxes: NDArray[np.float32]
    """`(t, 4)`, left, top, right, bottom of the landmarks, in pixels of the upright frame."""
    face_ids: NDArray[np.int32]
    """`(t,)`, number of the person, -1 where `valid` is False."""
    first_frame: int
    """Number of the first row's frame, counted from 0."""

    @property
    def num_frames(self) -> int:
        """Rows `t`."""
        return len(self.valid)

    @property
    def face_id(self) -> int:
        """Number of the person in most frames of the chunk, -1 if there is nobody."""
        numbers, counts = np.unique(self.face_ids[self.valid], return_counts=True)
        return int(numbers[counts.argmax()]) if len(numbers) else -1


class _Rows:
    """Arrays of one person that are filled frame by frame."""

    def __init__(self, first_frame: int, length: int, size: int) -> None:
        self.first_frame = first_frame
        self.crops = np.zeros((length, size, size, 3), dtype=np.uint8)
        self.landmarks = np.full((length, 68, 2), np.nan, dtype=np.float32)
        self.confidence = np.zeros(length, dtype=np.float32)
        self.boxes = np.full((length, 4), np.nan, dtype=np.float32)
        self.face_ids = np.full(length, -1, dtype=np.int32)

    def put(self, index: int, row: FaceRow) -> None:
        self.crops[index] = row.crop
        self.landmarks[index] = row.landmarks
        self.confidence[index] = row.confidence
        self.boxes[index] = row.box
        self.face_ids[index] = row.face_id

    def chunk(self, times: list[float]) -> PreparedChunk:
        length = len(times)
        landmarks = self.landmarks[:length]
        return PreparedChunk(
            crops=self.crops[:length],
            landmarks=landmarks,
            valid=np.asarray(np.isfinite(landmarks).all(axis=(1, 2))),
            confidence=self.confidence[:length],
            timestamps=np.asarray(times, dtype=np.float64),
            boxes=self.boxes[:length],
            face_ids=self.face_ids[:length],
            first_frame=self.first_frame,
        )


def chunks_by_person(
    reader: VideoReader,
    finder: FaceFinder,
    frames_per_chunk: int,
    progress: ProgressCallback | None = None,
    seconds: dict[str, float] | None = None,
) -> Generator[dict[int, PreparedChunk], None, None]:
    """Read a video and yield the rows of everybody who has been seen so far.

    Args:
        reader: The entered reader.
        finder: Finds the faces; is started by the caller.
        frames_per_chunk: Frames at a time.
        progress: Called after each frame.
        seconds: Wall time by stage, `"decode"` and `"faces"`, is added to it.

    Yields:
        Person to chunk; 0 is there from the start, and the only one unless everybody is kept. A
        person who first comes in a later chunk is missing from the ones before.
    """
    seconds = {} if seconds is None else seconds
    seconds.update({stage: seconds.get(stage, 0.0) for stage in ("decode", "faces")})
    announced = reader.info.num_frames_announced or 0
    size = finder.options.crop_size
    known = {0}  # also a video without a face has a row for every frame
    first = 0
    frames = iter(reader)
    ended = False
    while not ended:
        rows = {key: _Rows(first, frames_per_chunk, size) for key in known}
        times: list[float] = []
        while len(times) < frames_per_chunk:
            start = time.perf_counter()
            frame = next(frames, None)
            decoded = time.perf_counter()
            seconds["decode"] += decoded - start
            if frame is None:
                ended = True
                break
            for row in finder.find(frame):
                key = row.face_id if finder.keeps_everybody else 0
                if key not in known:
                    known.add(key)
                    rows[key] = _Rows(first, frames_per_chunk, size)
                rows[key].put(len(times), row)
            seconds["faces"] += time.perf_counter() - decoded
            times.append(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(announced, frame.index + 1))
        if times:
            yield {key: part.chunk(times) for key, part in rows.items()}
        first += len(times)


class PreparedStream(Iterator[PreparedChunk]):
    """The chunks of one video, and what is known about it meanwhile.

    Made by `iterate_prepared`. It stops its models and closes the file after the last chunk, on
    `close()`, and at the end of a `with` block.

    Args:
        path: Video file.
        finder: Finds the faces; closed with the stream.
        name: Name of the trial.
        frames_per_chunk: Frames at a time.
        strict: Whether missing frames are an error.
        progress: Called as `progress(done, total)` after each frame.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        finder: FaceFinder,
        *,
        name: str,
        frames_per_chunk: int,
        strict: bool,
        progress: ProgressCallback | None,
        num_threads: int,
    ) -> None:
        self.seconds: dict[str, float] = {}
        """Wall time so far by stage: `"decode"` and `"faces"` (find, follow, align)."""
        self._stack = ExitStack()
        self._stack.callback(finder.close)
        self._finder = finder
        try:
            finder.start(name)
            self._reader = self._stack.enter_context(
                VideoReader(path, strict=strict, num_threads=num_threads)
            )
        except BaseException:
            self._stack.close()
            raise
        self._chunks = chunks_by_person(
            self._reader, finder, frames_per_chunk, progress, self.seconds
        )
        self._ended = False

    @property
    def info(self) -> VideoInfo:
        """What the container says."""
        return self._reader.info

    @property
    def num_frames(self) -> int:
        """Frames decoded so far."""
        return self._reader.num_frames

    @property
    def num_frames_expected(self) -> int | None:
        """Frames that the container announces to be shown, or `None` if it does not say."""
        return self._reader.num_frames_expected

    @property
    def shortfall(self) -> int:
        """Announced frames that did not come, known after the last chunk; 0 before."""
        return self._reader.shortfall

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the video, complete after the last chunk."""
        return (*self._reader.warnings, *(self._finder.warnings() if self._ended else ()))

    def __next__(self) -> PreparedChunk:
        try:
            return next(self._chunks)[0]
        except StopIteration:
            self._ended = True
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the models and close the file; there are no more chunks."""
        self._chunks.close()
        self._stack.close()

    def __enter__(self) -> PreparedStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
