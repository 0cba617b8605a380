"""Write frames and sound as one mp4 file: H.264 and AAC through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from mmau._checks import check_range
from mmau._files import atomic_write
from mmau._optional import require

_AAC_BLOCK = 1024


def write_movie(
    path: str | Path,
    frames: np.ndarray,
    *,
    fps: float,
    waveform: np.ndarray | None = None,
    sample_rate: int = 44_100,
    crf: int = 20,
) -> Path:
    """Write an mp4 file whose frame `i` is shown at `i / fps` seconds.

    The sound starts with the first frame. The same input gives the same file, byte for byte.

    Args:
        path: Where to write; the file appears only when it is complete.
        frames: `(t, h, w, 3)` uint8 RGB; `h` and `w` even.
        fps: Frames per second.
        waveform: `(n,)` float in [-1, 1], mono, or `None` for a file without a sound track.
        sample_rate: Samples of `waveform` per second, in Hz.
        crf: Constant rate factor of H.264, 0 (lossless) to 51.

    Returns:
        The path.

    Raises:
        ValueError: If a shape or type is wrong or a value is out of range.
        MissingDependencyError: If PyAV is not installed.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(
            f"`frames` must be uint8 of shape (t, h, w, 3); got {frames.dtype} {frames.shape}."
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"`frames` must have an even height and width for H.264; got {frames.shape[1:3]}."
        )
    if waveform is not None and (waveform.ndim != 1 or not len(waveform)):
        raise ValueError(f"`waveform` must have shape (n,); got {waveform.shape}.")
    check_range("fps", fps, 0, open_low=True)
    check_range("crf", crf, 0, 51)
    av = require("av", purpose="rendering clips", extra="recipes")
    rate = Fraction(fps).limit_denominator(10_000)
    with (
        atomic_write(path) as unfinished,
        av.open(str(unfinished), "w", format="mp4") as container,
    ):
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        # One thread, and no macroblock tree: x264's is not the same from run to run.
        params = "threads=1:mbtree=0"
        video.options = {"crf": str(crf), "preset": "veryfast", "x264-params": params}
        video.thread_count = 1
        sound = None
        if waveform is not None:
            sound = container.add_stream("aac", rate=sample_rate)
            sound.layout = "mono"
        sent = 0
        for index, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(video.encode(picture))
            # Sound goes in beside the pictures, so that a player need not seek.
            while sound is not None and waveform is not None and sent < len(waveform):
                if sent > (index + 1) / fps * sample_rate and index + 1 < len(frames):
                    break
                block = waveform[None, sent : sent + _AAC_BLOCK].astype(np.float32)
                samples = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = sample_rate, sent
                samples.time_base = Fraction(1, sample_rate)
                container.mux(sound.encode(samples))
                sent += block.shape[1]
        container.mux(video.encode())
        if sound is not None:
            container.mux(sound.encode())
    return Path(path)
