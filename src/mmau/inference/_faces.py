"""Chunks of faces by person, from a file or from frames that arrive one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mmau.data._face_finding import FaceFinder, FaceOptions, FaceRow
from mmau.data._prepared_stream import chunks_by_person
from mmau.data.features import PreparedChunk
from mmau.inference._stages import StageTimes
from mmau.media.faces import Face
from mmau.media.video import VideoFrame, VideoReader
from mmau.progress import ProgressCallback

__all__ = ["FaceChunks", "SeenChunk", "faces_of_file", "faces_of_frames"]

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
            self._found[-1][face.face_id if self.keeps_everybody else 0] = face.landmarks
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
    """Iterate over chunks by person; `warnings` is complete after the last one.

    Args:
        source: Frames, with what a `VideoReader` knows about them.
        finder: Finds the faces, started.
        stages: Where the time of decoding and of finding is added.
        progress: Called as `progress(done, total)` in frames.
    """

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
    def everybody(self) -> bool:
        """Whether each person has chunks of their own."""
        return self._finder.keeps_everybody

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
    """Open a video file and find its faces while it is read.

    Args:
        path: The file.
        options: Which faces, and how.
        stages: Where the time is added.
        name: Name of the trial, for faces that are looked up.
        strict: Whether missing frames are an error.
        geometry: Whether to keep the landmarks of the picture.
        progress: Called as `progress(done, total)` in frames.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.

    Yields:
        The chunks.
    """
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
    """Find the faces in frames that come from anywhere.

    Args:
        frames: Pictures `(h, w, 3)`, RGB, and their times in seconds.
        options: Which faces, and how.
        stages: Where the time is added.
        name: Name of the trial, for faces that are looked up.
        geometry: Whether to keep the landmarks of the picture.
        progress: Called as `progress(done, total)` in frames.

    Yields:
        The chunks.
    """
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
        for index, (image, time) in enumerate(self._frames):
            check_frame(image, time, before)
            before = float(time)
            yield VideoFrame(index=index, time=before, image=image)


def check_frame(image: Any, time: float, before: float) -> None:
    """Refuse what is no picture, or comes at no later time than the one before.

    Args:
        image: Should be `(h, w, 3)` uint8.
        time: Seconds.
        before: Time of the frame before, in seconds.

    Raises:
        ValueError: If it is not.
    """
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
