"""Every frame keeps its time and the sound its samples; what is drawn is where it was found."""

from fractions import Fraction

import av
import numpy as np
import pytest

from mmau.inference import AUPredictor, AUTable, annotate_video
from mmau.inference.annotate import FrameCanvas
from mmau.media import MediaError, read_audio
from mmau.media.video import VideoReader


def table_of(t, *, people=1, valid=True):
    rows = t * people
    points = np.stack(np.meshgrid(np.linspace(40, 90, 17), np.linspace(50, 95, 4)), -1)
    return AUTable(
        au_names=("AU1", "AU12"),
        timestamps=np.tile(np.arange(t) / 10, people),
        valid=np.full(rows, valid),
        confidence=np.ones(rows),
        probability=np.tile([[0.25, 0.9]], (rows, 1)),
        active=np.tile([[False, True]], (rows, 1)),
        frames=np.tile(np.arange(1, t + 1), people),
        face_id=None if people == 1 else np.repeat(np.arange(people), t),
        landmarks=np.tile(points.reshape(1, 68, 2), (rows, 1, 1)).astype(np.float32),
        boxes=np.tile([[40, 50, 90, 95]], (rows, 1)).astype(np.float32),
    )


def write_odd_film(path, *, codec, times, sound_start=0.0, height=120):
    """Frames at uneven times, and a sound that starts when it likes."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10)
        video.height, video.width = height, 160
        video.codec_context.time_base = Fraction(1, 1000)
        audio = out.add_stream(codec, rate=16000)
        audio.layout = "mono"
        for time in times:
            pixels = rng.integers(0, 255, (height, 160, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for block in range(12):
            tone = 0.3 * np.sin(np.arange(block * 1024, (block + 1) * 1024) / 5)
            frame = av.AudioFrame.from_ndarray(
                (32767 * tone[None]).astype(np.int16), format="s16", layout="mono"
            )
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = round(sound_start * 16000) + block * 1024
            for part in av.AudioResampler(format=audio.format.name).resample(frame):
                out.mux(audio.encode(part))
        out.mux(audio.encode())
    return path


TIMES = (0.0, 0.1, 0.13, 0.3, 0.52, 0.6)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_times_and_sound_are_kept(tmp_path, suffix):
    film = write_odd_film(tmp_path / "odd.mp4", codec="aac", times=TIMES, sound_start=0.4)
    seen = []
    out = annotate_video(
        film, table_of(6), tmp_path / f"out{suffix}", progress=lambda *c: seen.append(c)
    )
    assert seen[-1] == (6, 6)
    with VideoReader(out) as reader:
        assert not reader.info.width % 2
        assert reader.info.height == 360  # enlarged three times
        np.testing.assert_allclose([frame.time for frame in reader], TIMES, atol=2e-3)
    before, after = read_audio(film), read_audio(out)
    assert after.start_time == pytest.approx(before.start_time, abs=2e-3)
    count = min(len(before.waveform), len(after.waveform))
    assert count > 11_000
    np.testing.assert_allclose(before.waveform[:count], after.waveform[:count], atol=1e-4)


def test_sound_that_the_container_cannot_hold_is_encoded(tmp_path):
    film = write_odd_film(tmp_path / "odd.mkv", codec="pcm_s16le", times=TIMES)
    out = annotate_video(film, table_of(6), tmp_path / "out.mp4")
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    before, after = read_audio(film).waveform, read_audio(out).waveform
    assert abs(len(after) - len(before)) <= 2048
    count = min(len(before), len(after))
    assert np.corrcoef(before[:count], after[:count])[0, 1] > 0.98


def test_what_is_drawn_is_where_it_was_found():
    table = table_of(1)
    canvas = FrameCanvas(table, 400, 300)
    drawn = canvas.draw(np.zeros((400, 300, 3), np.uint8), [0]).astype(int)
    assert drawn.shape == (canvas.height, canvas.width, 3)
    for x, y in table.landmarks[0].round().astype(int)[:17]:
        assert drawn[y, x].min() > 150  # a light dot on black
    assert drawn[200:, :300].max() == 0  # nothing where nothing was found
    panel = drawn[:, 300:]
    # The bar of the active one: nine tenths of the span, in its colour.
    orange, empty = (panel == (255, 170, 60)).all(-1), (panel == 60).all(-1)
    row = orange.sum(1).argmax()
    assert orange[row].sum() / (orange[row] | empty[row]).sum() == pytest.approx(0.9, abs=0.03)


def test_frames_without_a_face_are_left_clean():
    canvas = FrameCanvas(table_of(1, valid=False), 400, 300)
    drawn = canvas.draw(np.full((400, 300, 3), 9, np.uint8), [0])
    assert (drawn[:, :300] == 9).all()
    assert drawn[:, 300:].max() > 100  # the bars are there, dimmed


def test_a_panel_for_each_of_two_people():
    one, two = FrameCanvas(table_of(3), 400, 300), FrameCanvas(table_of(3, people=2), 400, 300)
    assert two.width - 300 == 2 * (one.width - 300)


def test_a_real_film(small_detector, film, tmp_path):
    table = AUPredictor(small_detector(), crop_size=64).predict_file(film, geometry=True)
    out = annotate_video(film, table, tmp_path / "out.mp4")
    with VideoReader(out) as reader:
        times = [frame.time for frame in reader]
    np.testing.assert_allclose(times, table.timestamps, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_what_does_not_fit_is_refused(tmp_path, film):
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"ends in \.mp4, \.mkv, \.mov; got 'out\.gif'"):
        annotate_video(film, table_of(40), tmp_path / "out.gif")
    with pytest.raises(ValueError, match="no landmarks to draw"):
        annotate_video(film, replace(table_of(40), landmarks=None), tmp_path / "out.mp4")
    with pytest.raises(MediaError, match="39 rows and the video 40 frames; it was made from"):
        annotate_video(film, table_of(39), tmp_path / "out.mp4")
    with pytest.raises(MediaError, match="no such file"):
        annotate_video(tmp_path / "none.mp4", table_of(3), tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []
