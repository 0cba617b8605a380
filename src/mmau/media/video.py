"""Frames of a video file, one at a time, with the time that the container gives each of them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau._optional import require
from mmau.media.errors import MediaError, check_file


@contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file for reading with PyAV."""
    av = require("av", purpose="reading video and sound", extra="video")
    file = check_file(path)
    try:
        container = av.open(str(file), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(
            f"not a video or sound file that FFmpeg can read, or its header is damaged: {file} "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error
    with container:
        yield container


@dataclass(frozen=True)
class VideoInfo:
    """What the container says about the video, before the frames are read."""

    path: Path
    """The file."""
    width: int
    """Pixels of the upright first frame."""
    height: int
    """Pixels of the upright first frame."""
    rotation: int
    """Degrees, counter-clockwise, by which stored frames are turned to stand upright: 0 to 270."""
    average_rate: float | None
    """Frames per second on average, or `None`. For display; times come from the frames."""
    duration: float | None
    """Seconds, or `None` if the container does not say."""
    num_frames_announced: int | None
    """How many frames the container announces, or `None` if it does not say."""
    has_audio: bool
    """Whether there is a sound track."""


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame."""

    index: int
    """Position in decoding (= display) order, from 0 for the first frame that is yielded."""
    time: float
    """Seconds on the clock of the container."""
    image: NDArray[np.uint8]
    """`(h, w, 3)`, RGB, upright."""


def rotate_upright(image: NDArray[np.uint8], rotation: float) -> NDArray[np.uint8]:
    """Turn a stored frame as its container asks, by degrees counter-clockwise."""
    turns = int(rotation // 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class VideoReader:
    """Iterate over the frames of a video file.

    Memory does not grow with the length of the file. Variable frame rates, rotated phone videos and
    damaged packets are handled: times are the container's own, frames come upright, and a packet
    that cannot be decoded is left out and counted. A reader can be iterated once.

    After the last frame `num_frames` is the number of frames read, `shortfall` how many are missing
    of those that the container announces, `num_damaged_frames` in how many the decoder had to guess
    a part, and `warnings` lists what was wrong.

    Args:
        path: Video file, of any format that FFmpeg reads.
        strict: Raise instead of warn if packets or frames are damaged or missing.
        num_threads: Decoding threads, 0 for as many as FFmpeg likes.
        start: Seconds; frames before are passed over by seeking, not by decoding all of them.
        stop: Seconds; reading ends before the first frame at or after it.

    Raises:
        MediaError: If the file is missing, a folder, empty, not a video, or has no frames; while
            iterating, with `strict`, if frames are missing.
        ValueError: If `start` is not before `stop`.

    Examples:
        ```python
        with VideoReader("talk.mp4") as reader:
            for frame in reader:
                print(frame.index, frame.time, frame.image.shape)
        print(reader.num_frames, reader.warnings)
        ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        strict: bool = False,
        num_threads: int = 0,
        start: float | None = None,
        stop: float | None = None,
    ) -> None:
        check_range("num_threads", num_threads, 0)
        if start is not None and stop is not None and not start < stop:
            raise ValueError(f"`start` must be before `stop`; got {start} and {stop} seconds.")
        self.path = Path(path)
        self.strict = strict
        self.num_frames = 0
        self.num_damaged_packets = 0
        self.num_damaged_frames = 0
        self.start = start
        self.stop = stop
        self.warnings: list[str] = []
        self._num_threads = num_threads
        self._num_hidden = 0
        self._stack = ExitStack()
        self._frames: Iterator[VideoFrame] | None = None
        self._info: VideoInfo | None = None
        self._finished = False

    @property
    def info(self) -> VideoInfo:
        """What the container says; known once the reader is entered."""
        if self._info is None:
            raise RuntimeError(
                "VideoReader is a context manager: use `with VideoReader(path) as reader`."
            )
        return self._info

    @property
    def num_frames_expected(self) -> int | None:
        """Announced frames less those that an edit list hides, as far as the file was read."""
        announced = self.info.num_frames_announced
        return None if announced is None else max(0, announced - self._num_hidden)

    @property
    def shortfall(self) -> int:
        """Announced frames that did not come; 0 before the last one was read, and of a part."""
        if not self._finished or self.num_frames_expected is None or self._is_partial:
            return 0
        return max(0, self.num_frames_expected - self.num_frames)

    @property
    def _is_partial(self) -> bool:
        return self.start is not None or self.stop is not None

    @property
    def incomplete(self) -> bool:
        """Whether frames were missing or damaged, after the last one was read."""
        return bool(self.shortfall or self.num_damaged_packets or self.num_damaged_frames)

    def __enter__(self) -> VideoReader:
        with ExitStack() as stack:
            self._open(stack.enter_context(open_container(self.path)), stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._frames = iter(())
        self._stack.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        self.info  # noqa: B018  (raises outside of `with`)
        if self._frames is None:
            raise RuntimeError(f"a VideoReader is read once; open {self.path} again.")
        frames, self._frames = self._frames, None
        return frames

    def _open(self, container: Any, stack: ExitStack) -> None:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise MediaError(f"the file has no video, only {kinds}: {self.path}")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self._num_threads
        if self.start is not None:
            self._seek(container, stream, self.start)
        # The rotation is attached to frames, so the first one is decoded before `info` is known.
        frames = self._decode(container, stream)
        first = next(frames, None)
        if first is None and self._is_partial:
            raise MediaError(f"no frame between {self.start} and {self.stop} s: {self.path}")
        if first is None:
            raise MediaError(f"not one frame of the video can be decoded: {self.path}")
        height, width = first[0].image.shape[:2]
        duration: float | None
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        else:  # in FFmpeg's AV_TIME_BASE
            duration = None if container.duration is None else container.duration / 1_000_000
        self._info = VideoInfo(
            path=self.path,
            width=width,
            height=height,
            rotation=first[1] % 360,
            average_rate=float(stream.average_rate) if stream.average_rate else None,
            duration=duration,
            num_frames_announced=stream.frames or None,
            has_audio=bool(container.streams.audio),
        )
        self._frames = counted = self._counted(first[0], frames)
        # Decoding out of a closed container crashes the process: whoever still holds the iterator
        # must find it at its end.
        stack.callback(frames.close)
        stack.callback(counted.close)

    def _seek(self, container: Any, stream: Any, start: float) -> None:
        """Go to the last key frame before a time."""
        av = require("av", purpose="reading video", extra="video")
        try:
            container.seek(round(start / stream.time_base), stream=stream)
        except av.error.FFmpegError as error:
            message = f"the file does not allow jumping to {start} s: {self.path}"
            raise MediaError(message) from error

    def _decode(self, container: Any, stream: Any) -> Generator[tuple[VideoFrame, int], None, None]:
        """Frames and their rotation; a damaged packet is counted and passed over."""
        av = require("av", purpose="reading video", extra="video")
        index = 0
        # One for all frames: setting up the colour conversion costs more than doing it.
        to_rgb = av.video.reformatter.VideoReformatter()
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                self._num_hidden += packet.is_discard  # trimmed away by an edit list
                decoded = packet.decode()
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                self.num_damaged_packets += 1
                if self.strict:
                    raise MediaError(
                        f"a packet after frame {index} cannot be decoded: {self.path}"
                    ) from error
                continue
            for frame in decoded:
                time = self._time(frame, index, stream)
                if self.start is not None and time < self.start:
                    continue
                if self.stop is not None and time >= self.stop:
                    return
                self.num_damaged_frames += frame.is_corrupt
                stored = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                image = rotate_upright(stored, frame.rotation)
                yield VideoFrame(index, time, image), int(frame.rotation)
                index += 1

    def _time(self, frame: Any, index: int, stream: Any) -> float:
        if frame.time is not None:
            return float(frame.time)
        if frame.dts is not None:  # AVI stores decoding times only
            return float(frame.dts * frame.time_base)
        if self.start is not None:
            raise MediaError(
                f"the video has no timestamps, so it cannot be read from {self.start} s on: "
                f"{self.path}"
            )
        if not stream.average_rate:
            raise MediaError(f"the video has neither timestamps nor a frame rate: {self.path}")
        if not any("no timestamps" in text for text in self.warnings):
            self.warnings.append(
                f"frames have no timestamps; {float(stream.average_rate):g} per second assumed: "
                f"{self.path}"
            )
        return float(index / stream.average_rate)

    def _counted(
        self, first: VideoFrame, frames: Iterator[tuple[VideoFrame, int]]
    ) -> Generator[VideoFrame, None, None]:
        self.num_frames = 1
        yield first
        for frame, _ in frames:
            self.num_frames += 1
            yield frame
        self._finished = True
        if self.num_damaged_packets:
            self.warnings.append(
                f"{self.num_damaged_packets} damaged packet(s) left out: {self.path}"
            )
        if self.num_damaged_frames:
            self.warnings.append(
                f"{self.num_damaged_frames} of {self.num_frames} frames are damaged, the decoder "
                f"guessed a part of them: {self.path}"
            )
        if self.shortfall:
            self.warnings.append(
                f"{self.num_frames} frames decoded but the container announces "
                f"{self.num_frames_expected}; the file is cut or damaged: {self.path}"
            )
        if self.strict and self.incomplete:
            raise MediaError(self.warnings[-1])
