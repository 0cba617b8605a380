"""Small video files of public-domain faces, made on the spot."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

SIDE = 160
_CLOCK = 90000


def small_portraits():
    """Two faces `(160, 160, 3)`, RGB: an astronaut and an admiral."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from skimage.data import astronaut

    with get_sample_data("grace_hopper.jpg") as stream:
        hopper = np.asarray(Image.open(stream).convert("RGB"))
    return tuple(
        cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        for image in (astronaut()[:330, 60:390], hopper[20:480, 20:480])
    )


def write_clip(path, images, times=None, *, fps=15, sound=None, sound_start=0.0, fast_start=False):
    """A video whose frames have these times, with 16 kHz sound from `sound_start` on."""
    times = np.arange(len(images)) / fps if times is None else times
    options = {"movflags": "faststart"} if fast_start else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream("libx264", rate=fps)
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "20"}
        video.codec_context.time_base = Fraction(1, _CLOCK)
        audio = None if sound is None else out.add_stream("aac", rate=16000, layout="mono")
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, _CLOCK), round(time * _CLOCK)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for start in range(0, 0 if sound is None else len(sound), 1024):
            chunk = sound[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = start + round(sound_start * 16000)
            out.mux(audio.encode(frame))
        if audio is not None:
            out.mux(audio.encode())
    return path
