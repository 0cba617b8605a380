import tracemalloc
import wave

import numpy as np
import pytest

from mmau.media import MediaError, iterate_audio, read_audio


def write_wav(path, samples, rate, channels=1):
    with wave.open(str(path), "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_a_click_stays_where_it_was(tmp_path, rate):
    samples = np.zeros(2 * rate)
    samples[rate + rate // 2] = 0.9
    track = read_audio(write_wav(tmp_path / "click.wav", samples, rate))
    assert track.sample_rate == 16000
    assert track.waveform.dtype == np.float32
    assert abs(track.waveform.argmax() - 24000) <= 1
    assert track.duration == pytest.approx(2, abs=0.002)
    assert track.start_time == 0


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_tone_keeps_its_pitch_and_height(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    wave_16k = read_audio(write_wav(tmp_path / "a.wav", tone, rate)).waveform[1600:-1600]
    spectrum = np.abs(np.fft.rfft(wave_16k * np.hanning(len(wave_16k))))
    assert spectrum.argmax() * 16000 / len(wave_16k) == pytest.approx(440, abs=1)
    assert wave_16k.max() == pytest.approx(0.5, abs=0.01)


def test_stereo_is_averaged(tmp_path):
    rate = 16000
    left = 0.4 * np.sin(2 * np.pi * 100 * np.arange(rate) / rate)
    stereo = np.stack([left, np.zeros(rate)], axis=1).ravel()
    track = read_audio(write_wav(tmp_path / "stereo.wav", stereo, rate, channels=2))
    assert track.waveform.max() == pytest.approx(0.2, abs=0.01)


def test_full_scale_stays_in_range(tmp_path):
    square = np.sign(np.sin(2 * np.pi * 300 * np.arange(44100) / 44100))
    track = read_audio(write_wav(tmp_path / "square.wav", square, 44100))
    assert np.abs(track.waveform).max() == 1.0


def test_sound_that_starts_late_says_so(tmp_path, write_video, numbered_frames):
    sound = np.zeros(44100)
    sound[22050] = 1.0
    path = write_video(
        tmp_path / "late.mkv", numbered_frames(45), np.arange(45) / 30, sound=sound, sound_start=0.4
    )
    track = read_audio(path)
    assert track.start_time == pytest.approx(0.4, abs=0.03)  # AAC adds up to 1024 samples of lead
    click = track.start_time + np.abs(track.waveform).argmax() / 16000
    assert click == pytest.approx(0.9, abs=0.002)


def test_a_hole_in_the_sound_becomes_silence(tmp_path, write_video, numbered_frames):
    """Packets are missing between 0.5 s and 1.5 s; the click at 1.75 s stays there."""
    import av

    sound = 0.01 * np.random.default_rng(0).standard_normal(3 * 16000)
    sound[28000] = 1.0
    whole = write_wav(tmp_path / "whole.wav", sound.clip(-1, 1), 16000)
    path = tmp_path / "hole.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        target = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.pts is None or 8000 <= packet.pts < 24000:
                continue
            packet.stream = target
            out.mux(packet)
    track = read_audio(path)
    assert track.duration == pytest.approx(3, abs=0.01)
    assert abs(np.abs(track.waveform).argmax() - 28000) <= 16  # Matroska rounds to milliseconds
    assert np.abs(track.waveform[10000:22000]).max() == 0


def test_no_sound_is_none(tmp_path, write_video, numbered_frames):
    assert read_audio(write_video(tmp_path / "mute.mp4", numbered_frames(3), [0, 0.1, 0.2])) is None


def test_what_is_no_media_file_is_refused(tmp_path):
    (tmp_path / "text.wav").write_text("hello " * 100)
    with pytest.raises(MediaError, match=r"not a video or sound file .*text\.wav"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(MediaError, match="no such file"):
        read_audio(tmp_path / "nothing.wav")


def test_a_track_with_nan_is_refused(tmp_path):
    import av

    path = tmp_path / "nan.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_f32le", rate=16000, layout="mono")
        samples = np.zeros((1, 16000), np.float32)
        samples[0, 500] = np.nan
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(MediaError, match=r"contains NaN or infinite samples: .*nan\.wav"):
        read_audio(path)


def test_a_sample_rate_is_positive(tmp_path):
    with pytest.raises(ValueError, match="`sample_rate` must be in"):
        read_audio(tmp_path / "a.wav", sample_rate=0)


# ---------------------------------------------------------------------- in segments
@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(
    ("segment", "margin"), [(20.0, 2.0), (1.0, 0.25), (0.5, 0.0), (0.3, 0.1), (3.3, 0.7)]
)
def test_owned_parts_are_the_track_sample_for_sample(tmp_path, rate, segment, margin):
    sound = 0.3 * np.random.default_rng(0).standard_normal(round(3.37 * rate)).clip(-3, 3)
    path = write_wav(tmp_path / "a.wav", sound, rate)
    track = read_audio(path)
    segments = list(iterate_audio(path, segment_seconds=segment, margin_seconds=margin))
    owned = np.concatenate([part.waveform[part.owned_samples] for part in segments])
    np.testing.assert_array_equal(owned, track.waveform)
    ends = [part.owned[1] for part in segments]
    assert [part.owned[0] for part in segments] == [track.start_time, *ends[:-1]]
    for part in segments:
        assert len(part.waveform) <= round(segment * 16000)
        first = round((part.start_time - track.start_time) * 16000)
        np.testing.assert_array_equal(
            part.waveform, track.waveform[first : first + len(part.waveform)]
        )
        # The margins are there wherever the track has sound.
        before, after = part.owned_samples.start, len(part.waveform) - part.owned_samples.stop
        last = first + len(part.waveform)
        assert before == min(round(margin * 16000), first + before)
        assert after == min(round(margin * 16000), len(track.waveform) - last + after)


def test_segments_of_a_late_track_are_on_the_clock(tmp_path, write_video, numbered_frames):
    sound = np.zeros(44100)
    sound[22050] = 1.0
    path = write_video(
        tmp_path / "late.mkv", numbered_frames(45), np.arange(45) / 30, sound=sound, sound_start=0.4
    )
    segments = list(iterate_audio(path, segment_seconds=0.3, margin_seconds=0.05))
    assert segments[0].start_time == segments[0].owned[0] == read_audio(path).start_time
    loudest = max(segments, key=lambda part: np.abs(part.waveform[part.owned_samples]).max())
    click = loudest.start_time + np.abs(loudest.waveform).argmax() / 16000
    assert click == pytest.approx(0.9, abs=0.002)
    assert loudest.owned[0] <= click < loudest.owned[1]


def test_segments_do_not_pile_up(tmp_path):
    """Two minutes are 7.7 MB as float32; a segment of two seconds is 0.13 MB."""
    path = write_wav(tmp_path / "long.wav", np.zeros(16000 * 120), 16000)
    tracemalloc.start()
    try:
        segments = iterate_audio(path, segment_seconds=2.0, margin_seconds=0.5)
        total = sum(len(part.waveform[part.owned_samples]) for part in segments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 16000 * 120
    assert peak < 1.5e6


def test_a_segment_must_be_longer_than_its_margins(tmp_path):
    with pytest.raises(ValueError, match=r"more than twice `margin_seconds`; got 4\.0 and 2\.0"):
        iterate_audio(tmp_path / "a.wav", segment_seconds=4.0, margin_seconds=2.0)
    with pytest.raises(ValueError, match="`margin_seconds` must be in"):
        iterate_audio(tmp_path / "a.wav", margin_seconds=-1.0)
    with pytest.raises(ValueError, match="`sample_rate` must be in"):
        iterate_audio(tmp_path / "a.wav", sample_rate=0)
    with pytest.raises(MediaError, match="no such file"):
        next(iterate_audio(tmp_path / "a.wav"))


def test_no_sound_has_no_segments(tmp_path, write_video, numbered_frames):
    assert not list(iterate_audio(write_video(tmp_path / "mute.mp4", numbered_frames(1), [0])))
