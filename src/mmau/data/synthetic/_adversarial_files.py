"""Tiny pictures, videos and sounds that say in their pixels which frame they are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmau._optional import require

__all__ = ["draw_code", "read_code", "write_coded_image", "write_coded_video"]

_CELLS = 8
_BITS = 16
_DARK, _BRIGHT = 24, 232
_SAMPLE_RATE = 16_000
_BLOCK = 1024


def draw_code(code: int, number: int, size: int) -> npt.NDArray[np.uint8]:
    """Draw two numbers as a chequered picture that survives lossy compression.

    Args:
        code: Which video or trial, 0 to 65535.
        number: Frame number, 0 to 65535.
        size: Side in pixels, a multiple of 8.

    Returns:
        `(size, size, 3)`, grey.
    """
    word = (code << _BITS) | number
    bits = [(word >> place) & 1 for place in range(2 * _BITS)]
    # The second half is the complement of the first, so that a mistaken cell is noticed.
    cells = np.array([*bits, *(1 - bit for bit in bits)], dtype=np.uint8)
    levels = np.where(cells.reshape(_CELLS, _CELLS) == 1, _BRIGHT, _DARK).astype(np.uint8)
    picture = np.kron(levels, np.ones((size // _CELLS, size // _CELLS), dtype=np.uint8))
    return np.repeat(picture[..., None], 3, axis=-1)


def read_code(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Read what `draw_code` drew.

    Args:
        image: `(h, w, 3)`, perhaps compressed and decoded since.

    Returns:
        Code and frame number.

    Raises:
        ValueError: If the picture carries no such code.

    Examples:
        >>> read_code(draw_code(7, 1234, 64))
        (7, 1234)
    """
    height, width = (side // _CELLS for side in image.shape[:2])
    cells = image[: height * _CELLS, : width * _CELLS].astype(np.float64)
    bright = cells.reshape(_CELLS, height, _CELLS, width, -1).mean(axis=(1, 3, 4)).flatten() > 128
    half = 2 * _BITS
    if (bright[:half] == bright[half:]).any():
        raise ValueError("the picture carries no code, or is damaged.")
    word = sum(1 << place for place in range(half) if bright[place])
    return word >> _BITS, word & ((1 << _BITS) - 1)


def write_coded_image(path: Path, code: int, number: int, *, size: int) -> None:
    """Write one JPEG.

    Args:
        path: Where to.
        code: Which trial.
        number: Frame number that the pixels tell.
        size: Side in pixels.
    """
    av = require("av", purpose="writing images", extra="video")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width = encoder.height = size
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(draw_code(code, number, size), format="rgb24")
    picture = picture.reformat(format="yuvj420p")
    picture.pts = 0
    packets = [*encoder.encode(picture), *encoder.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def write_coded_video(
    path: Path,
    code: int,
    milliseconds: Sequence[int],
    *,
    size: int,
    average_rate: int,
    sound: tuple[float, float] | None,
) -> None:
    """Write a video whose frame i says i + 1, as MPEG-4 in AVI or as H.264 in MP4.

    Args:
        path: Where to; its suffix chooses the format.
        code: Which video.
        milliseconds: When each frame is shown. AVI knows constant rates only: there, frame i is
            shown at `i / average_rate` whatever this says.
        size: Side in pixels.
        average_rate: Frames per second that the container announces.
        sound: Start and length in seconds, or `None` for a file without sound.
    """
    av = require("av", purpose="writing videos", extra="video")
    is_avi = path.suffix.lower() == ".avi"
    with av.open(str(path), "w", format="avi" if is_avi else "mp4") as container:
        video = container.add_stream("mpeg4" if is_avi else "libx264", rate=average_rate)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.bit_rate = 2_000_000
        clock = Fraction(1, average_rate) if is_avi else Fraction(1, 1000)
        if not is_avi:
            # Frames that are stored in another order than they are shown.
            video.options = {"preset": "ultrafast", "x264-params": "threads=1:bframes=2"}
            video.codec_context.time_base = clock
        track = None
        if sound is not None:
            track = container.add_stream("pcm_s16le" if is_avi else "aac", rate=_SAMPLE_RATE)
            track.layout = "mono"
        for index, moment in enumerate(milliseconds):
            picture = av.VideoFrame.from_ndarray(draw_code(code, index + 1, size), format="rgb24")
            picture.pts, picture.time_base = index if is_avi else moment, clock
            container.mux(video.encode(picture))
        container.mux(video.encode())
        if track is not None and sound is not None:
            _write_sound(av, container, track, *sound)


def _write_sound(av: Any, container: Any, track: Any, start: float, seconds: float) -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(-3000, 3000, (1, round(seconds * _SAMPLE_RATE)), dtype=np.int16)
    resampler = av.AudioResampler(format=track.format.name, layout="mono", rate=_SAMPLE_RATE)
    for begin in range(0, samples.shape[1], _BLOCK):
        block = np.ascontiguousarray(samples[:, begin : begin + _BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
        frame.sample_rate, frame.time_base = _SAMPLE_RATE, Fraction(1, _SAMPLE_RATE)
        frame.pts = round(start * _SAMPLE_RATE) + begin
        for ready in resampler.resample(frame):
            container.mux(track.encode(ready))
    container.mux(track.encode())
