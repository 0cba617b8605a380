"""The sound track of a file as 16 kHz mono, on the same clock as the frames."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau._optional import require
from mmau.media._container import open_container
from mmau.media.errors import MediaError

__all__ = ["AudioTrack", "read_audio"]

_LARGEST_JITTER = 0.1  # seconds; containers round timestamps by less, lost packets leave more


@dataclass(frozen=True)
class AudioTrack:
    """A mono waveform with its place on the clock of the container."""

    waveform: NDArray[np.float32]
    """`(n,)`, in [-1, 1]."""
    sample_rate: int
    """Samples per second."""
    start_time: float
    """Seconds; sample `j` is at `start_time + j / sample_rate`."""

    @property
    def duration(self) -> float:
        """Seconds of sound."""
        return len(self.waveform) / self.sample_rate


def read_audio(path: str | os.PathLike[str], *, sample_rate: int = 16000) -> AudioTrack | None:
    """Decode the first sound track: the mean of its channels, resampled by libswresample.

    Where packets are missing or damaged, silence of the same length stands in, so that everything
    after them stays in step with the picture.

    Args:
        path: Video or sound file.
        sample_rate: Samples per second of the result.

    Returns:
        The track, or `None` if the file has none or not one sample of it.

    Raises:
        MediaError: If the file is missing, a folder, empty, or not a media file.

    Examples:
        ```python
        track = read_audio("talk.mp4")
        if track is not None:
            print(track.start_time, track.duration)
        ```
    """
    check_range("sample_rate", sample_rate, 1)
    with open_container(path) as container:
        if not container.streams.audio:
            return None
        chunks, start = _decode(container, sample_rate)
    if start is None or not chunks:
        return None
    waveform = np.concatenate(chunks)
    if not np.isfinite(waveform).all():
        raise MediaError(f"the sound track contains NaN or infinite samples: {path}")
    # Float codecs and resampling overshoot full scale by a little.
    return AudioTrack(np.clip(waveform, -1.0, 1.0), sample_rate, start)


def _decode(container: Any, sample_rate: int) -> tuple[list[NDArray[np.float32]], float | None]:
    """Mono chunks at the new rate, and the time of the first sample."""
    av = require("av", purpose="reading sound", extra="video")
    stream = container.streams.audio[0]
    to_float = to_rate = None
    chunks: list[NDArray[np.float32]] = []
    start: float | None = None
    rate = written = 0
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            break
        except (av.error.InvalidDataError, av.error.EOFError):
            continue  # the gap that it leaves is filled below, from the next frame's time
        for frame in frames:
            if to_float is None or to_rate is None:
                rate = frame.sample_rate
                start = frame.time or 0.0
                to_float = av.AudioResampler(format="fltp", rate=rate)
                to_rate = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
            if frame.time is not None and start is not None:
                missing = round((frame.time - start) * rate) - written
                if missing > _LARGEST_JITTER * rate:
                    silence = np.zeros(missing, dtype=np.float32)
                    chunks += _push(av, to_rate, silence, rate)
                    written += missing
            frame.pts = None  # the resamplers count for themselves
            for part in to_float.resample(frame):
                # FFmpeg's own mix to mono adds up to 3 dB, which clips loud stereo.
                samples = part.to_ndarray().mean(axis=0, dtype=np.float32)
                chunks += _push(av, to_rate, samples, rate)
                written += len(samples)
    if to_rate is not None:
        chunks += [frame.to_ndarray()[0] for frame in to_rate.resample(None)]
    return chunks, start


def _push(
    av: Any, resampler: Any, samples: NDArray[np.float32], rate: int
) -> list[NDArray[np.float32]]:
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples[None], dtype=np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = rate
    return [out.to_ndarray()[0] for out in resampler.resample(frame)]
