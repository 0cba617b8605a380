"""A video in chunks: real files made on the spot, times of the container, bounded memory."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
from video_files import SIDE, write_clip

from mmau.data.prepare import iterate_prepared, prepare_video
from mmau.data.prepared import COLUMNS
from mmau.media import FaceOptions, MediaError, iterate_audio, read_audio

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("mediapipe")


def container_times(path):
    """What the container says, read without mmau."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [float(frame.pts * frame.time_base) for frame in container.decode(stream)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory, images):
    """Twelve frames, the face hidden in frames 4 to 7."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", images)


# ---------------------------------------------------------------------- chunks
@pytest.mark.parametrize("frames_per_chunk", [1, 5, 12, 256])
def test_chunks_one_after_the_other_are_the_trial(clip, frames_per_chunk):
    trial = prepare_video(clip, crop_size=32)
    with iterate_prepared(clip, crop_size=32, frames_per_chunk=frames_per_chunk) as stream:
        chunks = list(stream)
    assert [c.first_frame for c in chunks] == list(range(0, 12, frames_per_chunk))
    for name in COLUMNS:
        joined = np.concatenate([getattr(chunk, name) for chunk in chunks])
        np.testing.assert_array_equal(joined, getattr(trial, name))
        assert joined.dtype == getattr(trial, name).dtype
    assert stream.num_frames == stream.num_frames_expected == stream.info.num_frames_announced == 12
    assert (stream.shortfall, stream.warnings) == (0, ())
    assert set(stream.seconds) == {"decode", "detect"}
    assert min(stream.seconds.values()) > 0


def test_a_frame_without_a_face_cannot_pass_for_one(clip):
    (chunk,) = iterate_prepared(clip, crop_size=32)
    hidden = np.arange(12) // 4 == 1
    np.testing.assert_array_equal(chunk.valid, ~hidden)
    assert np.isnan(chunk.landmarks[hidden]).all()
    assert np.isnan(chunk.boxes[hidden]).all()
    assert (chunk.face_ids[hidden] == -1).all()
    assert (chunk.confidence[hidden] == 0).all()
    assert chunk.face_id == 0
    assert np.isfinite(chunk.boxes[~hidden]).all()
    left, top, right, bottom = chunk.boxes[0]
    assert 0 < left < right < SIDE
    assert 0 < top < bottom < SIDE + 20


def test_a_chunk_without_anybody_has_no_face_id(clip):
    chunks = list(iterate_prepared(clip, crop_size=16, frames_per_chunk=4))
    assert [chunk.face_id for chunk in chunks] == [0, -1, 0]
    assert chunks[1].num_frames == 4


def test_memory_does_not_grow_with_the_length(tmp_path):
    """400 frames of 0.15 MB in crops; a chunk holds 16 of them."""
    wall = [np.full((64, 64, 3), 90, np.uint8)] * 400
    path = write_clip(tmp_path / "long.mp4", wall)
    tracemalloc.start()
    try:
        rows = sum(len(c.valid) for c in iterate_prepared(path, crop_size=224, frames_per_chunk=16))
        _, streamed = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        written = prepare_video(path, crop_size=224, file=tmp_path / "long.safetensors")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == written.num_frames == 400
    assert written.crops.nbytes == 400 * 224 * 224 * 3
    assert streamed < 10e6  # two chunks of 2.4 MB and change
    assert peak < 32e6  # two chunks of 64 frames, and the small columns


def test_breaking_off_closes_the_file(clip):
    stream = iterate_prepared(clip, crop_size=16, frames_per_chunk=2)
    next(stream)
    stream.close()
    assert stream.num_frames == 2
    with pytest.raises(StopIteration):
        next(stream)


# ---------------------------------------------------------------------- real files
def irregular(count):
    return np.cumsum(np.random.default_rng(1).uniform(0.01, 0.2, count))


@pytest.mark.parametrize(
    "times", [np.arange(20) / 15, irregular(20), 3.0 + np.arange(20) / 25], ids=str
)
def test_times_are_exactly_those_of_the_container(tmp_path, portrait, times):
    path = write_clip(tmp_path / "v.mp4", [portrait] * 20, times)
    trial = prepare_video(path, crop_size=16)
    assert trial.timestamps.tolist() == container_times(path)
    np.testing.assert_allclose(np.diff(trial.timestamps), np.diff(times), atol=2 / 90000)


def test_a_rotated_phone_video_is_found_upright(tmp_path, portrait):
    lying = np.rot90(portrait, -1)  # stored on its side; the container says how to turn it
    path = write_clip(tmp_path / "phone.mp4", [lying] * 3)
    data = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 0, -1 << 16, 0, 1 << 16, 0, 0, 0, 0, 1 << 30)
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = matrix
    path.write_bytes(data)
    upright = write_clip(tmp_path / "upright.mp4", [portrait] * 3)
    turned, plain = (prepare_video(p, crop_size=32) for p in (path, upright))
    assert turned.valid.all()
    np.testing.assert_allclose(turned.landmarks, plain.landmarks, atol=0.5)
    np.testing.assert_allclose(turned.boxes, plain.boxes, atol=2.5)


def test_one_frame_is_a_trial(tmp_path, portrait):
    trial = prepare_video(write_clip(tmp_path / "one.mp4", [portrait]), crop_size=32)
    assert trial.num_frames == 1
    assert trial.valid.all()


def test_without_sound_there_is_no_waveform(clip):
    trial = prepare_video(clip, crop_size=16)
    assert trial.waveform is None
    assert list(iterate_audio(clip)) == []


def test_sound_that_starts_late_keeps_its_place(tmp_path, portrait):
    sound = 0.01 * np.random.default_rng(0).standard_normal(16000)
    sound[8000] = 1.0
    path = write_clip(tmp_path / "late.mp4", [portrait] * 22, sound=sound, sound_start=0.4)
    for trial in (
        prepare_video(path, crop_size=16),
        prepare_video(path, crop_size=16, file=tmp_path / "late.safetensors"),
    ):
        assert trial.audio_start == pytest.approx(0.4, abs=0.07)  # AAC leads in by 1024 samples
        loudest = trial.audio_start + np.abs(trial.waveform).argmax() / 16000
        assert loudest == pytest.approx(0.9, abs=0.002)
        track = read_audio(path)
        np.testing.assert_array_equal(trial.waveform, track.waveform)
        assert trial.audio_start == track.start_time


def test_a_sound_and_a_mouth_that_opens_stay_within_one_frame(tmp_path, portrait):
    """Through decoding, tracking, alignment and resampling, with an irregular frame rate."""
    times = irregular(24)
    opening = 15
    mouth = portrait.copy()
    mouth[67:76, 69:90] = 30  # the lips of the portrait
    images = [portrait if i < opening else mouth for i in range(24)]
    sound = 0.01 * np.random.default_rng(0).standard_normal(round(16000 * times[-1]))
    sound[round(16000 * times[opening])] = 1.0
    path = write_clip(tmp_path / "pop.mp4", images, times, sound=sound)
    trial = prepare_video(path, crop_size=64)
    assert trial.valid.all()
    lips = trial.crops[:, 33:42, 22:43].astype(float)
    change = np.abs(np.diff(lips, axis=0)).mean(axis=(1, 2, 3))
    seen = trial.timestamps[change.argmax() + 1]
    heard = trial.audio_start + np.abs(trial.waveform).argmax() / 16000
    assert change.max() > 3 * np.sort(change)[-2]
    assert abs(seen - heard) < np.diff(times).min()


# ---------------------------------------------------------------------- damage
@pytest.fixture
def noisy(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    return write_clip(tmp_path / "noisy.mp4", list(noise), fast_start=True)


def test_a_shortfall_is_on_the_result_and_an_error_if_strict(noisy):
    data = noisy.read_bytes()
    noisy.write_bytes(data[: len(data) // 2])
    with iterate_prepared(noisy, crop_size=16) as stream:
        rows = sum(chunk.num_frames for chunk in stream)
    assert 0 < rows < 40
    assert stream.shortfall == 40 - rows
    text = f"{rows} frames decoded but the container announces 40; the file is cut or damaged: "
    assert text in stream.warnings[-1]
    trial = prepare_video(noisy, crop_size=16)
    assert (trial.shortfall, trial.warnings) == (40 - rows, stream.warnings)
    with pytest.raises(MediaError, match=rf"(a packet after frame|frames decoded).*{noisy.name}"):
        list(iterate_prepared(noisy, crop_size=16, strict=True))


def test_twenty_flipped_bytes_are_noticed(noisy):
    """Every frame still comes out of the decoder, which guesses the damaged parts."""
    data = bytearray(noisy.read_bytes())
    for position in np.random.default_rng(0).integers(len(data) // 4, len(data), 20):
        data[position] ^= 0xFF
    noisy.write_bytes(data)
    trial = prepare_video(noisy, crop_size=16)
    assert trial.num_frames >= 30
    assert any(
        f" of {trial.num_frames} frames are damaged, the decoder guessed a part of them: " in text
        for text in trial.warnings
    )
    with pytest.raises(MediaError, match=r"noisy\.mp4"):
        prepare_video(noisy, crop_size=16, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.mp4", b"this is not a video\n" * 50, "not a video or sound file that FFmpeg can"),
        ("empty.mp4", b"", r"the file is empty \(0 bytes\)"),
        ("missing.mp4", None, "no such file"),
        ("", b"", "expected a file but this is a folder"),
    ],
)
def test_what_is_not_a_video_is_said_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None and name:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=f"{message}.*{name}") as caught:
        list(iterate_prepared(path))
    assert "\n" not in str(caught.value)


def test_a_file_without_its_index_is_refused(tmp_path, portrait):
    path = write_clip(tmp_path / "no_moov.mp4", [portrait] * 5)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(MediaError, match=r"its header is damaged: .*no_moov\.mp4"):
        iterate_prepared(path)


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frames_per_chunk": 0}, ValueError, "`frames_per_chunk` must be in"),
        ({"crop_size": 4}, ValueError, "`crop_size` must be in"),
        ({"faces": FaceOptions(face="all")}, ValueError, "`face='all'` gives one trial per person"),
        (
            {"faces": FaceOptions(landmarks="mediapip")},
            LookupError,
            "no landmark extractor named 'mediapip'",
        ),
    ],
)
def test_wrong_options_are_refused_at_the_call(clip, options, error, message):
    with pytest.raises(error, match=message):
        iterate_prepared(clip, **options)


# ---------------------------------------------------------------------- precomputed
def test_boxes_of_a_table_take_the_place_of_the_detector(tmp_path, clip):
    """The table says that nobody is there after frame 3, though faces can be seen."""
    table = tmp_path / "boxes.csv"
    found = prepare_video(clip, crop_size=32)
    rows = [f"{i + 1},{','.join(f'{v:.1f}' for v in found.boxes[i])},0.5" for i in range(3)]
    table.write_text("\n".join(["frame,left,top,right,bottom,score", *rows, ""]))
    trial = prepare_video(
        clip,
        crop_size=32,
        faces=FaceOptions(detector="precomputed", detector_options={"path": table}),
    )
    assert trial.valid.tolist() == [True] * 3 + [False] * 9
    np.testing.assert_allclose(trial.landmarks[:3], found.landmarks[:3], atol=0.6)
    assert (trial.confidence[:3] <= 0.5).all()


def test_landmarks_of_a_table_are_taken_as_they_are(tmp_path, clip):
    """In the form of OpenFace's files: blanks in the header, zeros where it failed."""
    points = np.random.default_rng(0).uniform(40, 120, (12, 2, 68))
    names = [f" {axis}_{i}" for axis in "xy" for i in range(68)]
    rows = [
        f"{i + 1}, 0, {i / 15:.3f}, 0.9, {int(i != 5)}, "
        + ", ".join(f"{v if i != 6 else 0:.3f}" for v in points[i].ravel())
        for i in range(12)
    ]
    header = ", ".join(["frame", "face_id", "timestamp", "confidence", "success"])
    (tmp_path / "clip.csv").write_text("\n".join([header + "," + ",".join(names), *rows]))
    options = {"path": tmp_path}
    trial = prepare_video(
        clip,
        crop_size=32,
        faces=FaceOptions("precomputed", "precomputed", "largest", options, options),
    )
    assert np.flatnonzero(~trial.valid).tolist() == [5, 6]
    expected = np.concatenate([points.min(axis=2), points.max(axis=2)], axis=1)
    np.testing.assert_allclose(trial.boxes[trial.valid], expected[trial.valid], atol=1e-3)
    np.testing.assert_allclose(trial.confidence[trial.valid], 0.9)


def test_aligned_crops_are_joined_by_number(tmp_path, clip):
    """Crops of frames 1 to 3 and 6, and what else lies in such folders."""
    found = prepare_video(clip, crop_size=112)
    folder = tmp_path / "cropped_aligned" / "clip"
    (folder / "thumbs").mkdir(parents=True)
    for number in (1, 2, 3, 6):
        crop = found.crops[number - 1 if number < 4 else 0]
        cv2.imwrite(str(folder / f"{number:05}.jpg"), crop[..., ::-1])
    for junk in (".DS_Store", "._00004.jpg", "00005.txt"):
        (folder / junk).write_bytes(b"junk")
    options = {"path": tmp_path / "cropped_aligned"}
    faces = FaceOptions(detector="aligned_crops", detector_options=options)
    trial = prepare_video(clip, crop_size=56, faces=faces)
    assert np.flatnonzero(trial.valid).tolist() == [0, 1, 2, 5]
    small = cv2.resize(found.crops[0], (56, 56), interpolation=cv2.INTER_AREA)
    assert np.abs(trial.crops[5].astype(int) - small).mean() < 3  # JPEG
    np.testing.assert_allclose(trial.landmarks[0], found.landmarks[0] / 2, atol=2)
    assert np.isnan(trial.boxes).all()
    (folder / "00009.jpg").write_bytes(b"")
    with pytest.raises(MediaError, match=r"not an image that can be decoded: .*00009\.jpg"):
        prepare_video(clip, faces=faces)
    with pytest.raises(MediaError, match="no folder with the aligned crops of 'other'"):
        prepare_video(clip, name="other", faces=faces)
    with pytest.raises(MediaError, match="no such folder of aligned crops"):
        prepare_video(
            clip, faces=FaceOptions("aligned_crops", detector_options={"path": os.devnull})
        )
