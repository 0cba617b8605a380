"""A sound and a movement of the same instant stay together all the way to the model."""

import numpy as np
import pytest
import torch

from mmau.action_units import AU_NAMES
from mmau.data.prepare import iterate_prepared, prepare_video
from mmau.inference.stream import SoundStream
from mmau.media import iterate_audio
from mmau.synthetic import render_face

av = pytest.importorskip("av")
CLOCK = 90_000


@pytest.fixture(scope="module")
def faces():
    """A closed mouth and an open one."""
    intensities = np.zeros((2, 12))
    intensities[1, [AU_NAMES.index("AU25"), AU_NAMES.index("AU26")]] = 1.0
    return render_face(intensities, size=192)[0]


def write_film(path, faces, times, instant, *, sound_start, seconds):
    """The mouth opens in the first frame at or after the instant; at the instant a click sounds."""
    from fractions import Fraction

    rate = 44_100
    wave = np.zeros(round(seconds * rate), dtype=np.float32)
    first = round((instant - sound_start) * rate)
    wave[first : first + rate // 10] = 0.5 * np.sin(np.arange(rate // 10) * 0.3)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.height, video.width = faces.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "15"}
        video.codec_context.time_base = Fraction(1, CLOCK)
        sound = out.add_stream("aac", rate=rate)
        sound.layout = "mono"
        for time in times:
            frame = av.VideoFrame.from_ndarray(faces[int(time >= instant)], format="rgb24")
            frame.pts, frame.time_base = round(CLOCK * time), Fraction(1, CLOCK)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(
                wave[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(sound_start * rate) + start
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return path


def opening(landmarks):
    """Distance of the inner lips, in eye widths."""
    return (landmarks[:, 66, 1] - landmarks[:, 62, 1]) / (landmarks[:, 45] - landmarks[:, 36])[:, 0]


def first_above_half(values):
    values = np.asarray(values, dtype=float)
    return int(np.argmax(values > (values.min() + values.max()) / 2))


FILMS = {
    "regular": (np.arange(50) / 25, 1.0, 0.0),
    "sound 0.4 s late": (np.arange(50) / 25, 1.2, 0.4),
    "picture 0.3 s late": (0.3 + np.arange(50) / 25, 1.5, 0.0),
    "uneven times": (np.cumsum(np.random.default_rng(0).uniform(0.02, 0.08, 50)), 1.3, 0.0),
    # Behind the border of two segments of sound, which are 16 s apart.
    "long": (np.arange(0, 40, 0.25), 33.0, 0.0),
}


@pytest.mark.parametrize("kind", FILMS)
def test_click_and_open_mouth_stay_within_one_frame(small_detector, faces, tmp_path, kind):
    times, instant, sound_start = FILMS[kind]
    film = write_film(
        tmp_path / "film.mp4", faces, times, instant,
        sound_start=sound_start, seconds=times[-1] - sound_start + 0.5,
    )  # fmt: skip
    detector = small_detector()
    # The features themselves, not a projection: what the model is given to listen to.
    detector.audio_projection = torch.nn.Sequential(torch.nn.Identity())
    detector.d_audio = 24
    trial = prepare_video(film, crop_size=64)
    truth = int(np.argmax(times >= instant))
    assert abs(first_above_half(opening(trial.landmarks)) - truth) <= 0

    # The waveform on the clock of the container.
    loud = np.abs(trial.waveform) > 0.1
    heard_at = trial.audio_start + np.argmax(loud) / 16000
    assert heard_at == pytest.approx(instant, abs=0.03)

    # The prepared trial, aligned at once ...
    with torch.no_grad():
        encoded = detector.encode_audio(torch.from_numpy(trial.waveform)[None])
        aligned, _ = detector.align_audio(
            torch.zeros(1, len(times), 32),
            encoded.features,
            encoded.times,
            torch.from_numpy(trial.timestamps - trial.audio_start)[None],
            encoded.mask,
        )
    assert abs(first_above_half(aligned[0].mean(-1)) - truth) <= 1

    # ... and the file, as the predictor reads it.
    stream = SoundStream(detector, iterate_audio(film))
    energy, mouth = [], []
    for chunk in iterate_prepared(film, crop_size=64, frames_per_chunk=16):
        audio, _ = stream.align(torch.zeros(len(chunk.valid), 32), chunk.timestamps)
        energy.append(audio.mean(-1))
        mouth.append(opening(chunk.landmarks))
    assert abs(first_above_half(torch.cat(energy)) - truth) <= 1
    assert first_above_half(np.concatenate(mouth)) == truth
