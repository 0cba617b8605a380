"""The sound track of a file as 16 kHz mono, on the same clock as the frames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau._optional import require
from mmau.media.errors import MediaError
from mmau.media.video import open_container

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


@dataclass(frozen=True)
class AudioSegment:
    """A segment of a sound track with some of its neighbours' sound on both sides."""

    waveform: NDArray[np.float32]
    """`(n,)`, in [-1, 1], margins included."""
    sample_rate: int
    """Samples per second."""
    start_time: float
    """Seconds; sample `j` is at `start_time + j / sample_rate`."""
    owned: tuple[float, float]
    """Seconds, from and to: the part that no other segment owns. The rest is margin."""

    @property
    def owned_samples(self) -> slice:
        """Where the owned part lies in `waveform`."""
        first, last = (round((t - self.start_time) * self.sample_rate) for t in self.owned)
        return slice(first, last)


def read_audio(path: str | os.PathLike[str], *, sample_rate: int = 16000) -> AudioTrack | None:
    """Decode the first sound track: the mean of its channels, resampled by libswresample.

    Where packets are missing or damaged, silence of the same length stands in, so that everything
    after them stays in step with the frames.

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
    start: float | None = None
    chunks = []
    for start, chunk in _mono_chunks(path, sample_rate):  # noqa: B007  (the last is as the first)
        chunks.append(chunk)
    if start is None:
        return None
    return AudioTrack(np.concatenate(chunks), sample_rate, start)


def iterate_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int = 16000,
    segment_seconds: float = 20.0,
    margin_seconds: float = 2.0,
) -> Iterator[AudioSegment]:
    """Decode the first sound track in segments; memory does not grow with its length.

    The owned parts, one after the other, are the waveform of `read_audio`, sample for sample. The
    margins give an encoder with a finite receptive field the input that the whole track would.

    Args:
        path: Video or sound file.
        sample_rate: Samples per second of the result.
        segment_seconds: Length of a segment with both margins; the first and the last are shorter.
        margin_seconds: Sound on each side that belongs to a neighbour.

    Returns:
        An iterator of segments in the order of time; it is empty if the file has no sound.

    Raises:
        MediaError: While iterating, if the file is missing, a folder, empty, or not a media file.
        ValueError: If nothing of a segment is left beside its margins.

    Examples:
        ```python
        for segment in iterate_audio("talk.mp4"):
            features = encode(segment.waveform)  # then keep those inside segment.owned
        ```
    """
    return _segments(_mono_chunks(path, sample_rate), sample_rate, segment_seconds, margin_seconds)


def cut_sound(
    chunks: Iterable[NDArray[np.floating]],
    start_time: float = 0.0,
    *,
    sample_rate: int = 16000,
    segment_seconds: float = 20.0,
    margin_seconds: float = 2.0,
) -> Iterator[AudioSegment]:
    """Cut sound that is in memory, or arrives in chunks `(n,)`, as `iterate_audio` cuts a file's.

    Examples:
        >>> one = np.zeros(16000, dtype=np.float32)
        >>> [segment.owned for segment in cut_sound([one] * 50)]
        [(0.0, 16.0), (16.0, 32.0), (32.0, 48.0), (48.0, 50.0)]
    """
    timed = ((start_time, np.asarray(chunk, dtype=np.float32)) for chunk in chunks)
    return _segments(timed, sample_rate, segment_seconds, margin_seconds)


def _segments(
    chunks: Iterator[tuple[float, NDArray[np.float32]]],
    sample_rate: int,
    segment_seconds: float,
    margin_seconds: float,
) -> Iterator[AudioSegment]:
    check_range("sample_rate", sample_rate, 1)
    check_range("margin_seconds", margin_seconds, 0)
    margin = round(margin_seconds * sample_rate)
    step = round(segment_seconds * sample_rate) - 2 * margin
    if step < 1:
        raise ValueError(
            "`segment_seconds` must be more than twice `margin_seconds`; "
            f"got {segment_seconds} and {margin_seconds}."
        )
    return _cut(chunks, sample_rate, step, margin)


def _cut(
    chunks: Iterator[tuple[float, NDArray[np.float32]]], sample_rate: int, step: int, margin: int
) -> Iterator[AudioSegment]:
    track_start = 0.0
    buffer: list[NDArray[np.float32]] = []
    first = 0  # number of the first buffered sample, counted from the start of the track
    length = 0  # of the buffer
    owned = 0  # number of the first sample that no segment has owned yet

    def cut(last: int) -> AudioSegment:
        nonlocal buffer, first, length, owned
        samples = np.concatenate(buffer)
        segment = AudioSegment(
            samples[: last + margin - first],
            sample_rate,
            track_start + first / sample_rate,
            (track_start + owned / sample_rate, track_start + last / sample_rate),
        )
        drop = max(last - margin, 0) - first
        # A copy, so that the segment that was handed out can be forgotten by its user.
        buffer = [samples[drop:].copy()]
        first, length, owned = first + drop, length - drop, last
        return segment

    for track_start, chunk in chunks:  # noqa: B007  (`cut` looks it up)
        buffer.append(chunk)
        length += len(chunk)
        while first + length >= owned + step + margin:
            yield cut(owned + step)
    while first + length > owned:
        yield cut(min(owned + step, first + length))


def _mono_chunks(
    path: str | os.PathLike[str], sample_rate: int
) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Checked mono chunks at the new rate, each with the time of the track's first sample."""
    check_range("sample_rate", sample_rate, 1)
    with open_container(path) as container:
        if not container.streams.audio:
            return
        for start, chunk in _decode(container, sample_rate):
            if not np.isfinite(chunk).all():
                raise MediaError(f"the sound track contains NaN or infinite samples: {path}")
            # Float codecs and resampling overshoot full scale by a little.
            yield start, np.clip(chunk, -1.0, 1.0)


def _decode(container: Any, sample_rate: int) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Mono chunks at the new rate, none of them empty, and the time of the first sample."""
    av = require("av", purpose="reading sound", extra="video")
    stream = container.streams.audio[0]
    to_float = to_rate = None
    start = 0.0
    rate = written = 0
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            break
        except av.error.FFmpegError:
            continue  # the gap that it leaves is filled below, from the next frame's time
        for frame in frames:
            if to_float is None or to_rate is None:
                rate = frame.sample_rate
                start = frame.time or 0.0
                to_float = av.AudioResampler(format="fltp", rate=rate)
                to_rate = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
            if frame.time is not None:
                missing = round((frame.time - start) * rate) - written
                if missing > _LARGEST_JITTER * rate:
                    written += missing
                    yield from ((start, out) for out in _silence(av, to_rate, missing, rate))
            frame.pts = None  # the resamplers count for themselves
            for part in to_float.resample(frame):
                # FFmpeg's own mix to mono adds up to 3 dB, which clips loud stereo.
                samples = part.to_ndarray().mean(axis=0, dtype=np.float32)
                written += len(samples)
                yield from ((start, out) for out in _push(av, to_rate, samples, rate))
    if to_rate is not None:
        yield from ((start, frame.to_ndarray()[0]) for frame in to_rate.resample(None))


def _silence(av: Any, resampler: Any, count: int, rate: int) -> Iterator[NDArray[np.float32]]:
    """One second at a time: a gap may be hours long."""
    while count:
        chunk = min(count, rate)
        yield from _push(av, resampler, np.zeros(chunk, dtype=np.float32), rate)
        count -= chunk


def _push(
    av: Any, resampler: Any, samples: NDArray[np.float32], rate: int
) -> Iterator[NDArray[np.float32]]:
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples[None], dtype=np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = rate
    for out in resampler.resample(frame):
        yield out.to_ndarray()[0]
