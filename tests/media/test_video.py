import re
import struct
import subprocess
import sys
import tracemalloc
import wave
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.media import MediaError, VideoReader
from mmau.media.errors import check_file
from mmau.media.video import rotate_upright


def read(path, **options):
    with VideoReader(path, **options) as reader:
        frames = list(reader)
    return frames, reader


def brightness(frame):
    height, width = frame.image.shape[:2]
    return float(frame.image[height // 2 :, width // 2 :].mean())


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "libx264"),
        ("clip.mkv", "libx264"),
        ("clip.avi", "mpeg4"),
        ("clip.webm", "libvpx-vp9"),
        ("clip.mkv", "ffv1"),
        ("clip.mpg", "mpeg2video"),
        ("clip.ts", "libx264"),
    ],
)
def test_every_frame_comes_once_in_order_with_its_time(
    tmp_path, write_video, numbered_frames, name, codec
):
    images = numbered_frames(30)
    path = write_video(tmp_path / name, images, np.arange(30) / 30, codec=codec)
    frames, reader = read(path)
    assert [frame.index for frame in frames] == list(range(30))
    start = frames[0].time if name.endswith("mpg") else 0.0  # whose clock does not start at zero
    times = [frame.time - start for frame in frames]
    np.testing.assert_allclose(times, np.arange(30) / 30, atol=1e-3)
    # Video levels and compression move greys by a few steps; neighbours are 4 apart.
    np.testing.assert_allclose([brightness(f) for f in frames], images[:, -1, -1, 0], atol=1.9)
    assert all(frame.image.dtype == np.uint8 for frame in frames)
    assert reader.num_frames == 30
    assert reader.shortfall == 0
    assert reader.warnings == []


def test_a_variable_frame_rate_keeps_the_times_of_the_container(
    tmp_path, write_video, numbered_frames
):
    times = np.cumsum([0, 0.02, 0.2, 0.033, 0.5, 0.01, 0.04])
    path = write_video(tmp_path / "vfr.mp4", numbered_frames(7), times)
    frames, _ = read(path)
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=1 / 90000)


def test_one_frame_is_a_video(tmp_path, write_video, numbered_frames):
    frames, reader = read(write_video(tmp_path / "one.mp4", numbered_frames(1), [0.0]))
    assert len(frames) == 1
    assert reader.info.num_frames_announced == 1


def test_the_info_says_what_the_container_says(tmp_path, write_video, numbered_frames):
    path = write_video(
        tmp_path / "a.mp4", numbered_frames(10), np.arange(10) / 25, sound=np.zeros(8000)
    )
    with VideoReader(path) as reader:
        info = reader.info
    assert (info.path, info.width, info.height, info.rotation) == (path, 64, 48, 0)
    assert info.num_frames_announced == 10
    assert info.has_audio
    assert info.average_rate == pytest.approx(25, rel=0.15)
    assert info.duration == pytest.approx(0.4, abs=0.05)


# ---------------------------------------------------------------------- rotation
def set_rotation(path, degrees):
    """Write a display matrix into the track header, as phones do; `degrees` counter-clockwise."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(
        ">9i", cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30
    )
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes after the name
    data[start : start + 36] = matrix
    path.write_bytes(data)


@pytest.mark.parametrize(("degrees", "corner"), [(0, "tl"), (90, "bl"), (180, "br"), (270, "tr")])
def test_a_rotated_file_comes_upright(tmp_path, write_video, numbered_frames, degrees, corner):
    path = write_video(tmp_path / "phone.mp4", numbered_frames(3), np.arange(3) / 30)
    set_rotation(path, degrees)
    frames, reader = read(path)
    image = frames[0].image
    assert image.shape == ((48, 64, 3) if degrees % 180 == 0 else (64, 48, 3))
    assert (reader.info.width, reader.info.height) == image.shape[1::-1]
    assert reader.info.rotation == degrees
    row, column = (4 if corner[0] == "t" else -5), (4 if corner[1] == "l" else -5)
    red = image[..., 0].astype(int) - image[..., 1]
    assert red[row, column] > 150  # the stored top left corner went where the matrix sends it
    assert (red > 100).mean() < 0.2


@given(turns=st.integers(-4, 8), more=st.integers(-4, 8))
def test_rotations_add_up(turns, more):
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    twice = rotate_upright(rotate_upright(image, 90 * turns), 90 * more)
    np.testing.assert_array_equal(twice, rotate_upright(image, 90 * (turns + more)))


# ---------------------------------------------------------------------- bad input
@pytest.fixture
def cut_file(tmp_path, write_video):
    """The first 60 % of a file whose index comes first."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "cut.mp4", noise, np.arange(60) / 30, fast_start=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    return path


def test_a_cut_file_gives_what_it_has_and_says_what_is_missing(cut_file):
    frames, reader = read(cut_file)
    assert 20 < len(frames) < 50
    assert reader.shortfall == 60 - len(frames)
    assert f"{len(frames)} frames decoded but the container announces 60" in reader.warnings[-1]
    assert "cut.mp4" in reader.warnings[-1]


def test_a_cut_file_is_an_error_if_strict(cut_file):
    with pytest.raises(MediaError, match=r"packet after frame|frames decoded but the container"):
        read(cut_file, strict=True)


def test_a_file_cut_before_its_first_frame_is_refused(cut_file):
    data = cut_file.read_bytes()
    cut_file.write_bytes(data[: data.index(b"mdat") + 40])
    with pytest.raises(MediaError, match=r"not one frame of the video can be decoded: .*cut\.mp4"):
        read(cut_file)


def test_a_stream_without_times_is_read_at_its_rate_and_says_so(
    tmp_path, write_video, numbered_frames
):
    path = write_video(tmp_path / "raw.h264", numbered_frames(8), np.arange(8) / 30)
    frames, reader = read(path)
    steps = np.diff([frame.time for frame in frames])
    np.testing.assert_allclose(steps, 1 / reader.info.average_rate, rtol=1e-6)
    assert "frames have no timestamps" in reader.warnings[0]


def test_without_times_and_rate_there_is_no_clock():
    frame, stream = SimpleNamespace(time=None, dts=None), SimpleNamespace(average_rate=None)
    with pytest.raises(MediaError, match=r"neither timestamps nor a frame rate: a\.mp4"):
        VideoReader("a.mp4")._time(frame, 0, stream)


def test_damaged_bytes_are_counted_and_the_rest_is_read(tmp_path, write_video):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "dirty.mkv", noise, np.arange(40) / 30)
    data = bytearray(path.read_bytes())
    for position in np.linspace(len(data) * 0.3, len(data) * 0.7, 400).astype(int):
        data[position] ^= 0xFF
    path.write_bytes(data)
    frames, reader = read(path)
    assert 10 < len(frames) <= 40
    assert reader.incomplete
    said = " ".join(reader.warnings)
    assert reader.num_damaged_packets == 0 or "damaged packet(s) left out: " in said
    assert f"{reader.num_damaged_frames} of {len(frames)} frames are damaged, the decoder" in said
    with pytest.raises(MediaError, match=r"dirty\.mkv"):
        read(path, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.mp4", b"this is not a video\n" * 50, "not a video or sound file that FFmpeg can"),
        ("empty.mp4", b"", r"the file is empty \(0 bytes\)"),
        ("missing.mp4", None, "no such file"),
    ],
)
def test_what_is_not_a_video_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=f"{message}.*{name}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(MediaError, match="this is a folder"):
        read(tmp_path)


def test_sound_without_frames_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000))
    with pytest.raises(MediaError, match=r"the file has no video, only audio: .*sound\.wav"):
        read(path)


def test_a_reader_is_used_once_and_inside_with(tmp_path, write_video, numbered_frames):
    path = write_video(tmp_path / "a.mp4", numbered_frames(2), [0, 0.1])
    with pytest.raises(RuntimeError, match="is a context manager"):
        iter(VideoReader(path))
    with VideoReader(path) as reader:
        list(reader)
        with pytest.raises(RuntimeError, match=r"is read once; open .* again"):
            iter(reader)


def test_an_iterator_that_outlives_its_reader_is_at_its_end(tmp_path, write_video, numbered_frames):
    """Decoding out of a closed container would crash the process."""
    path = write_video(tmp_path / "a.mp4", numbered_frames(30), np.arange(30) / 30)
    with VideoReader(path) as reader:
        frames = iter(reader)
        assert next(frames).index == 0
    assert list(frames) == []
    assert (reader.shortfall, reader.warnings) == (0, [])


# ---------------------------------------------------------------------- parts of a file
@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(None, 0.3, range(9)), (1.0, None, range(30, 60)), (0.51, 0.72, range(16, 22))],
)
def test_a_part_is_what_the_whole_has_there(
    tmp_path, write_video, numbered_frames, start, stop, expected
):
    path = write_video(tmp_path / "a.mp4", numbered_frames(60), np.arange(60) / 30)
    whole, _ = read(path)
    part, reader = read(path, start=start, stop=stop)
    assert [frame.time for frame in part] == [whole[i].time for i in expected]
    assert [frame.index for frame in part] == list(range(len(expected)))
    for frame, i in zip(part, expected, strict=True):
        np.testing.assert_array_equal(frame.image, whole[i].image)
    assert reader.shortfall == 0
    assert not reader.incomplete


def test_a_part_that_is_not_there_is_refused(tmp_path, write_video, numbered_frames):
    path = write_video(tmp_path / "a.mp4", numbered_frames(3), np.arange(3) / 30)
    with pytest.raises(MediaError, match=r"no frame between 5 and None s: .*a\.mp4"):
        read(path, start=5)
    with pytest.raises(ValueError, match="`start` must be before `stop`; got 2 and 1 seconds"):
        VideoReader(path, start=2, stop=1)
    raw = write_video(tmp_path / "raw.h264", numbered_frames(8), np.arange(8) / 30)
    with pytest.raises(MediaError, match=r"no timestamps, so it cannot be read|not allow jumping"):
        read(raw, start=0.1)


def test_a_file_that_does_not_allow_jumping_says_so():
    class Container:
        def seek(self, *args, **options):
            import av

            raise av.error.PermissionError(1, "Operation not permitted")

    with pytest.raises(MediaError, match=r"the file does not allow jumping to 3 s: a\.mp4"):
        VideoReader("a.mp4")._seek(Container(), SimpleNamespace(time_base=1), 3)


def test_frames_that_an_edit_list_hides_are_not_missing(tmp_path, write_video, numbered_frames):
    """A trimmed phone video: 40 frames stored, the first 15 before the start of the clock."""
    import av

    whole = write_video(tmp_path / "whole.mp4", numbered_frames(40), np.arange(40) / 30)
    path = tmp_path / "trimmed.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        stream = source.streams.video[0]
        target = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            shift = round(0.5 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
            out.mux(packet)
    frames, reader = read(path, strict=True)
    np.testing.assert_allclose([f.time for f in frames], np.arange(25) / 30, atol=1e-3)
    assert (reader.info.num_frames_announced, reader.num_frames_expected) == (40, 25)
    assert reader.shortfall == 0


def test_frames_are_not_kept(tmp_path, write_video, numbered_frames):
    """Reading 200 frames of 0.23 MB takes far less memory than their 46 MB."""
    path = write_video(tmp_path / "long.mp4", numbered_frames(200, 240, 320), np.arange(200) / 30)
    tracemalloc.start()
    try:
        with VideoReader(path) as reader:
            for _ in reader:
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.num_frames == 200
    assert peak < 4e6


def test_importing_loads_no_heavy_library():
    script = (
        "import sys, mmau.media.external, mmau.synthetic, mmau.plot;"
        "heavy = {'av', 'cv2', 'mediapipe', 'matplotlib', 'PIL'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_negative_number_of_threads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`num_threads` must be in"):
        VideoReader(tmp_path / "a.mp4", num_threads=-1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=f"^no such file: {re.escape(str(tmp_path / 'no.mp4'))}$"):
        check_file(tmp_path / "no.mp4")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(MediaError, match="expected a file but this is a folder: "):
        check_file(tmp_path)


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match=r"the file is empty \(0 bytes\): .*empty.mp4"):
        check_file(tmp_path / "empty.mp4")
