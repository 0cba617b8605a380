"""A video with what was found drawn into it: landmarks, regions and bars, with its sound."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mmau._files import whole_file
from mmau._optional import require
from mmau.inference._drawing import FrameCanvas
from mmau.inference._table import AUTable
from mmau.media._container import open_container
from mmau.media.errors import MediaError
from mmau.media.video import VideoReader
from mmau.progress import ProgressCallback

__all__ = ["ANNOTATED_SUFFIXES", "annotate_video"]

ANNOTATED_SUFFIXES = (".mp4", ".mkv", ".mov")
_CLOCK = Fraction(1, 90_000)
_COPIED = ("aac", "mp3", "ac3", "eac3", "opus")  # what all of these containers take as it is


def annotate_video(
    video: str | os.PathLike[str],
    table: AUTable,
    output: str | os.PathLike[str],
    *,
    crf: int = 23,
    progress: ProgressCallback | None = None,
) -> Path:
    """Draw a prediction into its video.

    Every frame keeps its time, also with a variable rate, and the sound is copied as it is (or
    encoded as AAC if the new file cannot hold its codec). A small video is enlarged so that the
    bars can be read. Memory does not grow with the length.

    Args:
        video: The file that was predicted.
        table: Its prediction, made with `geometry=True`; one or several people.
        output: File to write, `.mp4`, `.mkv` or `.mov`; complete or absent.
        crf: Constant rate factor of H.264, 0 (lossless) to 51.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        The path of the output.

    Raises:
        MediaError: If the video cannot be read, or has other frames than the table.
        ValueError: If the table has no geometry, or the output is not of these kinds.
        MissingDependencyError: If PyAV or OpenCV is not installed.

    Examples:
        ```python
        table = predictor.predict_file("talk.mp4", geometry=True)
        annotate_video("talk.mp4", table, "annotated.mp4")
        ```
    """
    av = require("av", purpose="writing video", extra="video")
    target = Path(output)
    if target.suffix.lower() not in ANNOTATED_SUFFIXES:
        raise ValueError(
            f"an annotated video ends in {', '.join(ANNOTATED_SUFFIXES)}; got {target.name!r}."
        )
    if table.landmarks is None:
        raise ValueError(
            "the table has no landmarks to draw: make it with `predict_file(..., geometry=True)`."
        )
    rows = _rows_by_frame(table)
    with ExitStack() as stack:
        unfinished = stack.enter_context(whole_file(target))
        reader = stack.enter_context(VideoReader(video))
        source = stack.enter_context(open_container(video))
        writer = stack.enter_context(av.open(str(unfinished), "w"))
        canvas = FrameCanvas(table, reader.info.height, reader.info.width)
        picture = _picture_stream(writer, canvas, reader.info.average_rate, crf)
        sound = _Sound(av, source, writer)
        last = -1
        announced = reader.info.num_frames_announced or 0
        for frame in reader:
            drawn = av.VideoFrame.from_ndarray(
                canvas.draw(frame.image, rows.get(frame.index, [])), format="rgb24"
            )
            # Two frames of one time would be refused by the encoder.
            last = max(last + 1, round(frame.time / _CLOCK))
            drawn.pts, drawn.time_base = last, _CLOCK
            writer.mux(picture.encode(drawn))
            sound.write_until(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(announced, frame.index + 1))
        # One person has a row in every frame; several come and go.
        if table.face_id is None and reader.num_frames != len(table):
            raise MediaError(
                f"the table has {len(table)} rows and the video {reader.num_frames} frames; it was "
                f"made from another file: {video}"
            )
        writer.mux(picture.encode())
        sound.write_until(np.inf)
    return target


def _rows_by_frame(table: AUTable) -> dict[int, list[int]]:
    """Rows of the table for each frame, counted from 0."""
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(table.frames.tolist()):
        rows.setdefault(number - 1, []).append(row)
    return rows


def _picture_stream(writer: Any, canvas: FrameCanvas, rate: float | None, crf: int) -> Any:
    # The rate is a hint for players and the encoder's budget; times are those of the frames.
    stream = writer.add_stream("libx264", rate=Fraction(rate or 25.0).limit_denominator(1000))
    stream.width, stream.height = canvas.width, canvas.height
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = _CLOCK
    stream.options = {"crf": str(crf), "preset": "veryfast"}
    return stream


class _Sound:
    """The sound track of the source, handed on beside the pictures."""

    def __init__(self, av: Any, source: Any, writer: Any) -> None:
        self._av, self._writer = av, writer
        self._packets: Iterator[Any] = iter(())
        self._encoder: Any = None
        if not source.streams.audio:
            return
        stream = source.streams.audio[0]
        if stream.codec_context.name in _COPIED:
            self._target = writer.add_stream_from_template(stream)
        else:
            self._target = self._encoder = writer.add_stream("aac", rate=stream.rate or 44_100)
        self._packets = self._read(source, stream)

    def _read(self, source: Any, stream: Any) -> Iterator[Any]:
        packets = source.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, self._av.error.EOFError):
                return
            except self._av.error.InvalidDataError:
                continue  # a damaged packet: what follows has its own time
            yield packet

    def write_until(self, time: float) -> None:
        """Hand on what is heard up to a time in seconds."""
        for packet in self._packets:
            if self._encoder is None:
                if packet.dts is None:  # the end of the stream
                    continue
                heard = float(packet.dts * packet.time_base)
                packet.stream = self._target
                self._writer.mux(packet)
            else:
                heard = self._encode(packet)
            if heard > time:
                return
        if time == np.inf and self._encoder is not None:
            self._writer.mux(self._encoder.encode())

    def _encode(self, packet: Any) -> float:
        heard = -np.inf
        try:
            frames = packet.decode()
        except self._av.error.InvalidDataError:
            return heard
        for frame in frames:
            heard = frame.time if frame.time is not None else heard
            self._writer.mux(self._encoder.encode(frame))
        return heard
