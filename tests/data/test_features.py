import json
import os
from dataclasses import replace

import numpy as np
import pytest
from video_files import write_clip

from mmau.data.prepare import prepare_video, source_fingerprint
from mmau.data.prepared import (
    COLUMNS,
    PreparedChunk,
    PreparedTrial,
    load_trial,
    open_trial,
    save_trial,
)
from mmau.data.store import CacheError, DiskFullError
from mmau.media import FaceOptions, MediaError

pytest.importorskip("mediapipe")


@pytest.fixture(scope="session")
def clip(tmp_path_factory, images):
    """Twelve frames, the face hidden in frames 4 to 7, with sound."""
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(12800) / 16000)
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", images, sound=tone)


@pytest.fixture(scope="session")
def trial(clip):
    return prepare_video(clip, crop_size=48)


def small_trial(**changes):
    rng = np.random.default_rng(0)
    made = PreparedTrial(
        name="a",
        crops=rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8),
        landmarks=rng.normal(size=(3, 68, 2)).astype(np.float32),
        valid=np.array([True, False, True]),
        confidence=np.array([0.9, 0, 0.8], np.float32),
        timestamps=np.array([0.0, 0.1, 0.2]),
        waveform=rng.normal(size=100).astype(np.float32),
        audio_start=0.25,
        num_frames_announced=3,
        warnings=("odd",),
    )
    return replace(made, **changes)


def assert_same(one, other):
    stored = [name for name, column in COLUMNS.items() if column.stored]
    arrays = {"crops", "landmarks", "valid", "confidence", "timestamps", "boxes", "face_ids"}
    assert set(stored) == arrays
    for name in (*stored, "waveform"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    for name in ("name", "audio_start", "num_frames_announced", "warnings"):
        assert getattr(one, name) == getattr(other, name)


# ---------------------------------------------------------------------- one video
def test_every_frame_has_a_row_also_without_a_face(trial):
    hidden = np.arange(12) // 4 == 1
    np.testing.assert_array_equal(trial.valid, ~hidden)
    assert trial.crops.shape == (12, 48, 48, 3)
    assert trial.crops[hidden].max() == 0
    assert trial.crops[~hidden].std(axis=(1, 2, 3)).min() > 20
    assert np.isnan(trial.landmarks[hidden]).all()
    assert np.isfinite(trial.landmarks[~hidden]).all()
    assert (trial.confidence[hidden] == 0).all()
    assert (trial.confidence[~hidden] > 0.5).all()
    np.testing.assert_allclose(trial.timestamps, np.arange(12) / 15, atol=1e-3)
    assert trial.num_frames_announced == 12
    assert trial.name == "clip"
    assert trial.warnings == ()


def test_the_sound_comes_along(trial):
    assert trial.waveform.dtype == np.float32
    assert len(trial.waveform) / 16000 == pytest.approx(0.8, abs=0.1)
    assert np.abs(trial.waveform).max() == pytest.approx(0.3, abs=0.1)


def test_landmarks_are_on_the_face_of_the_crop(trial):
    points = trial.landmarks[trial.valid] / 48
    np.testing.assert_allclose(points[:, 36], [[0.25, 0.225]] * 8, atol=0.04)
    np.testing.assert_allclose(points[:, 45], [[0.75, 0.225]] * 8, atol=0.04)
    assert (points[:, 8, 1] > 0.7).all()


def test_no_sound_and_no_face_are_no_errors(tmp_path):
    path = write_clip(tmp_path / "wall.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 3)
    trial = prepare_video(path, crop_size=32, name="absent")
    assert trial.waveform is None
    assert trial.audio_start == 0
    assert not trial.valid.any()
    assert trial.num_frames == 3
    assert trial.name == "absent"


def test_a_cut_video_is_prepared_as_far_as_it_goes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "cut.mp4", list(noise), fast_start=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    trial = prepare_video(path, crop_size=32)
    assert 0 < trial.num_frames < 40
    assert trial.num_frames_announced == 40
    assert "the container announces 40" in trial.warnings[-1]
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        prepare_video(path, crop_size=32, strict=True)


def test_progress_counts_frames(clip):
    seen = []
    prepare_video(clip, crop_size=16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(1, 13)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"crop_size": 2}, ValueError, "`crop_size` must be in"),
        (
            {"faces": FaceOptions("mediapip")},
            LookupError,
            "no face detector named 'mediapip'; did you mean",
        ),
        (
            {"faces": FaceOptions(face="all")},
            ValueError,
            "`face='all'` gives one trial per person, so it needs",
        ),
        (
            {"faces": FaceOptions(landmarks="dlib")},
            LookupError,
            "no landmark extractor named 'dlib'",
        ),
        (
            {"faces": FaceOptions(detector_options={"min_scor": 1})},
            TypeError,
            "face detector 'mediapipe' takes no option 'min_scor'; did you mean 'min_score'",
        ),
        (
            {"faces": FaceOptions(landmark_options={"path": "a"})},
            TypeError,
            "landmark extractor 'mediapipe' takes no option 'path'",
        ),
        ({"file": "talk.npz"}, ValueError, r"`file` must end in \.safetensors; got 'talk\.npz'"),
    ],
)
def test_wrong_options_raise(clip, options, error, message):
    with pytest.raises(error, match=message):
        prepare_video(clip, **options)


def test_a_missing_video_is_named_before_models_are_loaded(tmp_path):
    with pytest.raises(MediaError, match=r"no such file: .*no\.mp4"):
        prepare_video(tmp_path / "no.mp4", faces=FaceOptions("also wrong"))


def test_the_arrays_of_a_trial_must_fit_together():
    with pytest.raises(ValueError, match=r"`valid` must be bool \(3\); got bool \(4,\)"):
        small_trial(valid=np.ones(4, bool), face_ids=np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"`timestamps` must be float64 \(3\); got float32 \(3,\)"):
        small_trial(timestamps=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"`boxes` must be float32 \(3, 4\); got float32 \(2, 4\)"):
        small_trial(boxes=np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"`waveform` must be float32 \(n,\); got float64"):
        small_trial(waveform=np.zeros(3))


def test_columns_that_are_left_out_are_those_of_an_unknown_face():
    trial = small_trial()
    assert np.isnan(trial.boxes).all()
    assert trial.face_ids.tolist() == [0, -1, 0]
    assert trial.frame_landmarks is None
    assert trial.rows(1, 3).frame_landmarks is None


def test_frames_without_a_face_cannot_pass_for_one():
    chunk = PreparedChunk.without_face([0.5, 0.6], 8, first_frame=3)
    assert (chunk.num_frames, chunk.crop_size, chunk.face_id) == (2, 8, -1)
    assert chunk.timestamps.tolist() == [0.5, 0.6]
    assert not chunk.crops.any()
    assert not chunk.valid.any()
    assert np.isnan(chunk.landmarks).all()
    part = chunk.rows(1, 2)
    assert (part.first_frame, part.timestamps.tolist()) == (4, [0.6])


# ---------------------------------------------------------------------- one file
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"waveform": None},
        {"waveform": np.zeros(0, np.float32)},
        {"num_frames_announced": None},
        {"crops": np.full((3, 9, 9, 3), 7, np.uint8)},  # not a multiple of eight bytes
        {"face_ids": np.array([4, -1, 4], np.int32), "boxes": np.ones((3, 4), np.float32)},
    ],
)
def test_a_trial_comes_back_as_it_was(tmp_path, changes):
    saved = small_trial(**changes)
    path = save_trial(saved, tmp_path / "new" / "a.safetensors")
    assert_same(load_trial(path), saved)
    assert os.listdir(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize(
    "changes", [{}, {"waveform": None}, {"crops": np.full((3, 9, 9, 3), 7, np.uint8)}]
)
def test_a_memory_mapped_trial_is_the_same_and_is_not_written_to(tmp_path, changes):
    path = save_trial(small_trial(**changes), tmp_path / "a.safetensors")
    before = path.read_bytes()
    mapped = load_trial(path, memory_map=True)
    assert isinstance(mapped.crops, np.memmap)
    assert_same(mapped, small_trial(**changes))
    assert all(part.flags.aligned for part in vars(mapped).values() if isinstance(part, np.ndarray))
    mapped.crops[:] = 0
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_trial(small_trial(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(
        DiskFullError, match=r"^the disk is full; this file was not written: .*a\.safetensors$"
    ):
        save_trial(small_trial(name="b"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 100, 900, -1])
def test_a_cut_file_raises(tmp_path, keep, memory_map):
    path = save_trial(small_trial(), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"not a complete prepared file; delete it: .*a\.safet"):
        load_trial(path, memory_map=memory_map)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save_trial(small_trial(), tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="the content was altered after it was written; delete it"):
        load_trial(path)
    assert load_trial(path, verify=False).name == "a"


def test_another_safetensors_file_is_not_a_trial(tmp_path):
    import safetensors.numpy

    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(CacheError, match=r"not a prepared file of this version .*'something else'"):
        load_trial(path)


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(CacheError, match=r"no such prepared file: .*absent"):
        load_trial(tmp_path / "absent.safetensors")


def test_a_stale_file_raises_with_what_changed(tmp_path, clip):
    made = source_fingerprint(clip, crop_size=48)
    wanted = source_fingerprint(clip, crop_size=64)
    path = save_trial(small_trial(), tmp_path / "a.safetensors", fingerprint=made)
    assert load_trial(path, fingerprint=made).name == "a"
    with pytest.raises(CacheError, match=r"stale \(crop_size was 48 and is now 64\); delete it"):
        load_trial(path, fingerprint=wanted)
    unknown = save_trial(small_trial(), tmp_path / "b.safetensors")
    with pytest.raises(CacheError, match=r"stale \(no record of its source\)"):
        load_trial(unknown, fingerprint=wanted)


def test_a_fingerprint_changes_with_the_source(tmp_path):
    source = tmp_path / "a.mp4"
    source.write_bytes(b"one")
    options = {"crop_size": 48}
    first = source_fingerprint(source, **options)
    assert first == source_fingerprint(source, **options)
    os.utime(source, ns=(1, 1))
    second = source_fingerprint(source, **options)
    source.write_bytes(b"three")
    os.utime(source, ns=(1, 1))
    third = source_fingerprint(source, **options)
    assert len({first, second, third}) == 3
    assert json.loads(third)["source_bytes"] == 5


# ---------------------------------------------------------------------- one file, row by row
def test_a_video_prepared_into_a_file_is_the_one_prepared_in_memory(tmp_path, clip, trial):
    written = prepare_video(clip, crop_size=48, file=tmp_path / "talk.safetensors", name="clip")
    assert isinstance(written.crops, np.memmap)
    assert_same(written, trial)
    fingerprint = source_fingerprint(clip, crop_size=48, name="clip")
    assert_same(load_trial(tmp_path / "talk.safetensors", fingerprint=fingerprint), trial)
    # The bytes are those of save_trial, so that there is one format and not two.
    again = save_trial(trial, tmp_path / "again.safetensors", fingerprint=fingerprint)
    other = (tmp_path / "talk.safetensors").read_bytes()
    assert again.read_bytes()[1 << 16 :] == other[1 << 16 :]


def test_rows_of_a_file_must_follow_one_another(tmp_path):
    with (
        pytest.raises(ValueError, match="the next chunk must start at frame 0; got 1"),
        open_trial(tmp_path / "a.safetensors", 8) as writer,
    ):
        writer.add(small_trial().rows(1, 3))
    with (
        pytest.raises(
            ValueError, match=r"rows of .crops. must have shape \(16, 16, 3\); got \(8, 8"
        ),
        open_trial(tmp_path / "a.safetensors", 16) as writer,
    ):
        writer.add(small_trial().rows(0, 3))
    assert os.listdir(tmp_path) == []


def test_warnings_that_do_not_fit_the_header_raise(tmp_path):
    with pytest.raises(ValueError, match=r"names and warnings need \d+ bytes; there are \d+"):
        save_trial(small_trial(warnings=("x" * 70000,)), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    dead = tmp_path / ".a.12.partial.safetensors"
    dead.write_bytes(b"half")
    other = tmp_path / ".b.12.partial.safetensors"
    other.write_bytes(b"of another trial")
    with open_trial(tmp_path / "a.safetensors", 8) as living:
        held = set(os.listdir(tmp_path)) - {other.name}
        assert len(held) == 1
        assert dead.name not in held
        held.copy().pop()
        os.rename(tmp_path / next(iter(held)), dead)  # as if it belonged to another process
        with open_trial(tmp_path / "a.safetensors", 8) as second:
            assert dead.exists()
            second.finish(fingerprint="", has_sound=False, about=small_trial().about())
        os.rename(dead, tmp_path / next(iter(held)))
        living.finish(fingerprint="", has_sound=False, about=small_trial().about())
    assert sorted(os.listdir(tmp_path)) == [other.name, "a.safetensors"]
