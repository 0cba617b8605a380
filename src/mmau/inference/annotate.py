"""A video with what was found drawn into it: landmarks, regions and bars, with its sound."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._files import atomic_write
from mmau._optional import require
from mmau.inference.table import AUTable
from mmau.landmarks import IBUG68
from mmau.media.errors import MediaError
from mmau.media.video import VideoReader, open_container
from mmau.progress import ProgressCallback

_SMALLEST_HEIGHT = 360  # below, names of Action Units cannot be read
_PANEL = 0.42  # width of a person's panel as a share of the height
_MOST_PANELS = 3
_LEAST_LINES = 14  # with few Action Units, lines would be too high for the width of a panel
_INK, _FAINT, _ACTIVE, _PAPER = (235, 235, 235), (120, 120, 120), (255, 170, 60), (28, 28, 28)


class FrameCanvas:
    """Draws rows of a table into the frames of its video."""

    def __init__(self, table: AUTable, height: int, width: int) -> None:
        self._cv2 = require("cv2", purpose="drawing into a video", extra="landmarks")
        self._table = table
        self._scale = max(1, -(-_SMALLEST_HEIGHT // height))
        self._size = (height * self._scale, width * self._scale)
        self.height = _even(self._size[0])
        # As many panels as there are people at once.
        _, people = np.unique(table.frames, return_counts=True)
        self._num_panels = min(int(people.max(initial=1)), _MOST_PANELS)
        self._panel = round(_PANEL * self.height)
        self.width = _even(self._size[1] + self._num_panels * self._panel)
        self._derived = IBUG68.derived_matrix().double().numpy()
        self._colours = [
            _bright(0.618 * region) for region in range(len(IBUG68.regions))
        ]  # steps of the golden ratio keep neighbours in the list apart in hue

    def draw(self, image: NDArray[np.uint8], rows: list[int]) -> NDArray[np.uint8]:
        """Draw one frame."""
        cv2 = self._cv2
        height, width = self._size
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas = np.empty((self.height, self.width, 3), dtype=np.uint8)
        canvas[:] = _PAPER
        drawing = image.copy()
        for row in rows:
            if self._table.valid[row]:
                self._draw_face(drawing, row)
        canvas[:height, :width] = drawing
        for place, row in enumerate(rows[: self._num_panels]):
            self._draw_panel(canvas, row, width + place * self._panel)
        return canvas

    def _draw_face(self, drawing: NDArray[np.uint8], row: int) -> None:
        cv2, table = self._cv2, self._table
        if table.landmarks is None:
            return
        points = table.landmarks[row].astype(np.float64) * self._scale
        everything = np.concatenate([points, self._derived @ points])
        for colour, members in zip(self._colours, IBUG68.regions.values(), strict=True):
            inside = everything[list(members)]
            low, high = _pixels(inside.min(0) - 1), _pixels(inside.max(0) + 1)
            cv2.rectangle(drawing, low, high, colour, 1, cv2.LINE_AA)
        radius = max(1, round(np.ptp(points[:, 1]) / 110))
        for point in points:
            cv2.circle(drawing, _pixels(point), radius, _INK, -1, cv2.LINE_AA)
        if table.face_id is not None and table.boxes is not None:
            left, top = (table.boxes[row, :2] * self._scale).tolist()
            self._text(
                drawing, f"{int(table.face_id[row])}", (left, max(12.0, top - 6)), 0.6, _ACTIVE
            )

    def _draw_panel(self, canvas: NDArray[np.uint8], row: int, left: int) -> None:
        table = self._table
        names = table.au_names
        line = self.height / max(len(names) + 2, _LEAST_LINES)
        size = line / 42
        title = "" if table.face_id is None else f"person {int(table.face_id[row])}  "
        heading = f"{title}{table.timestamps[row]:.2f} s"
        valid = bool(table.valid[row])
        if not valid:
            heading += "  no face"
        self._text(
            canvas, heading, (left + 0.3 * line, 0.8 * line), size, _INK if valid else _FAINT
        )
        start = left + round(2.9 * line)
        span = left + self._panel - round(0.4 * line) - start
        for c, name in enumerate(names):
            middle = (c + 1.7) * line
            active = bool(table.active[row, c])
            colour = (_ACTIVE if active else _INK) if valid else _FAINT
            self._text(canvas, name, (left + 0.3 * line, middle + 0.22 * line), size, colour)
            probability = float(np.nan_to_num(table.probability[row, c]))
            low, high = round(middle - 0.27 * line), round(middle + 0.27 * line)
            canvas[low:high, start : start + span] = (60, 60, 60)
            canvas[low:high, start : start + round(span * probability)] = colour

    def _text(
        self,
        drawing: NDArray[np.uint8],
        text: str,
        place: tuple[float, float],
        size: float,
        colour: tuple[int, int, int],
    ) -> None:
        cv2 = self._cv2
        cv2.putText(
            drawing, text, _pixels(place), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA
        )


def _pixels(point: Any) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


def _bright(hue: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _even(size: int) -> int:
    return size + size % 2


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
        unfinished = stack.enter_context(atomic_write(target))
        reader = stack.enter_context(VideoReader(video))
        source = stack.enter_context(open_container(video))
        writer = stack.enter_context(av.open(str(unfinished), "w"))
        canvas = FrameCanvas(table, reader.info.height, reader.info.width)
        encoder = _image_stream(writer, canvas, reader.info.average_rate, crf)
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
            writer.mux(encoder.encode(drawn))
            sound.write_until(frame.time)
            if progress is not None:
                progress(frame.index + 1, max(announced, frame.index + 1))
        # One person has a row in every frame; several come and go.
        if table.face_id is None and reader.num_frames != len(table):
            raise MediaError(
                f"the table has {len(table)} rows and the video {reader.num_frames} frames; it was "
                f"made from another file: {video}"
            )
        writer.mux(encoder.encode())
        sound.write_until(np.inf)
    return target


def _rows_by_frame(table: AUTable) -> dict[int, list[int]]:
    """Rows of the table for each frame, counted from 0."""
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(table.frames.tolist()):
        rows.setdefault(number - 1, []).append(row)
    return rows


def _image_stream(writer: Any, canvas: FrameCanvas, rate: float | None, crf: int) -> Any:
    # The rate is a hint for players and the encoder's budget; times are those of the frames.
    stream = writer.add_stream("libx264", rate=Fraction(rate or 25.0).limit_denominator(1000))
    stream.width, stream.height = canvas.width, canvas.height
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = _CLOCK
    stream.options = {"crf": str(crf), "preset": "veryfast"}
    return stream


class _Sound:
    """The sound track of the source, copied beside the images."""

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
        """Copy or encode the sound up to a time in seconds."""
        for packet in self._packets:
            if self._encoder is None:
                if packet.dts is None:  # the end of the stream
                    continue
                written = float(packet.dts * packet.time_base)
                packet.stream = self._target
                self._writer.mux(packet)
            else:
                written = self._encode(packet)
            if written > time:
                return
        if time == np.inf and self._encoder is not None:
            self._writer.mux(self._encoder.encode())

    def _encode(self, packet: Any) -> float:
        written = -np.inf
        try:
            frames = packet.decode()
        except self._av.error.InvalidDataError:
            return written
        for frame in frames:
            written = frame.time if frame.time is not None else written
            self._writer.mux(self._encoder.encode(frame))
        return written
