"""Small video files, made on the spot."""

from fractions import Fraction

import av
import numpy as np
import pytest

CLOCK = 90000


def write_video(
    path,
    frames,
    times,
    *,
    sound=None,
    sound_start=0.0,
    rate=44100,
    codec="libx264",
    fast_start=False,
):
    """Encode frames at the given times, and a mono waveform that starts at `sound_start`."""
    options = {"movflags": "faststart"} if fast_start else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream(codec, rate=30)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        if codec == "libx264":
            video.options = {"preset": "ultrafast", "crf": "18"}
            video.codec_context.time_base = Fraction(1, CLOCK)
        else:
            video.bit_rate = 4_000_000
        audio = None
        if sound is not None:
            audio = out.add_stream("aac", rate=rate, layout="mono")
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.time_base = video.codec_context.time_base or Fraction(1, CLOCK)
            frame.pts = round(time / frame.time_base)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for start in range(0, 0 if sound is None else len(sound), 1024):
            chunk = sound[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start + round(sound_start * rate)
            out.mux(audio.encode(frame))
        if audio is not None:
            out.mux(audio.encode())
    return path


def numbered_frames(count, height=48, width=64):
    """Frames whose grey level is 4 times their number, plus a red square in the top left corner."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:] = (4 * np.arange(count) % 200 + 20)[:, None, None, None]
    frames[:, : height // 3, : width // 3] = (230, 20, 20)
    return frames


@pytest.fixture(name="write_video")
def _write_video():
    return write_video


@pytest.fixture(name="numbered_frames")
def _numbered_frames():
    return numbered_frames


@pytest.fixture(scope="session")
def portraits():
    """Two public-domain portraits, by name, RGB."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from skimage.data import astronaut

    with get_sample_data("grace_hopper.jpg") as stream:
        hopper = np.asarray(Image.open(stream).convert("RGB")).copy()
    return {"grace_hopper": hopper, "astronaut": np.asarray(astronaut())}
