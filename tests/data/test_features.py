import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mmau.data import features
from mmau.data.features import (
    CacheError,
    PreparationError,
    PreparedTrial,
    load_trial,
    prepare_dataset,
    prepare_video,
    save_trial,
    source_fingerprint,
)
from mmau.media import MediaError

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("mediapipe")

SIZE = 160


@pytest.fixture(scope="session")
def portrait():
    from skimage.data import astronaut

    return cv2.resize(astronaut()[:330, 60:390], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def write_clip(path, images, *, sound=None, rate=16000, fps=15, fast_start=False):
    options = {"movflags": "faststart"} if fast_start else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream("libx264", rate=fps)
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "20"}
        audio = None if sound is None else out.add_stream("aac", rate=rate, layout="mono")
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for start in range(0, 0 if sound is None else len(sound), 1024):
            chunk = sound[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            out.mux(audio.encode(frame))
        if audio is not None:
            out.mux(audio.encode())
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory, portrait):
    """Twelve frames, the face hidden in frames 4 to 7, with sound."""
    grey = np.full_like(portrait, 110)
    images = [grey if 4 <= i < 8 else portrait for i in range(12)]
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
    for name in ("crops", "landmarks", "valid", "confidence", "timestamps", "waveform"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    for name in ("name", "audio_start", "num_frames_announced", "warnings"):
        assert getattr(one, name) == getattr(other, name)


# ---------------------------------------------------------------------- one video
def test_every_frame_has_a_row_and_hidden_ones_say_so(trial):
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
    trial = prepare_video(path, crop_size=32, name="nobody")
    assert trial.waveform is None
    assert trial.audio_start == 0
    assert not trial.valid.any()
    assert trial.num_frames == 3
    assert trial.name == "nobody"


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
        ({"detector": "mediapip"}, LookupError, "no face detector named 'mediapip'; did you mean"),
        ({"select": "big"}, ValueError, "`select` must be one of"),
    ],
)
def test_wrong_options_are_refused(clip, options, error, message):
    with pytest.raises(error, match=message):
        prepare_video(clip, **options)


def test_a_missing_video_is_named_before_models_are_loaded(tmp_path):
    with pytest.raises(MediaError, match=r"no such file: .*no\.mp4"):
        prepare_video(tmp_path / "no.mp4", detector="also wrong")


def test_the_arrays_of_a_trial_must_fit_together():
    with pytest.raises(ValueError, match=r"`valid` must be bool \(3\); got bool \(4,\)"):
        small_trial(valid=np.ones(4, bool))
    with pytest.raises(ValueError, match=r"`timestamps` must be float64 \(3\); got float32 \(3,\)"):
        small_trial(timestamps=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"`waveform` must be float32 \(n,\); got float64"):
        small_trial(waveform=np.zeros(3))


# ---------------------------------------------------------------------- one file
@pytest.mark.parametrize("changes", [{}, {"waveform": None}, {"num_frames_announced": None}])
def test_a_trial_comes_back_as_it_was(tmp_path, changes):
    saved = small_trial(**changes)
    path = save_trial(saved, tmp_path / "new" / "a.safetensors")
    assert_same(load_trial(path), saved)
    assert os.listdir(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("changes", [{}, {"waveform": None}])
def test_a_memory_mapped_trial_is_the_same_and_is_not_written_to(tmp_path, changes):
    path = save_trial(small_trial(**changes), tmp_path / "a.safetensors")
    before = path.read_bytes()
    mapped = load_trial(path, memory_map=True)
    assert isinstance(mapped.crops, np.memmap)
    assert_same(mapped, small_trial(**changes))
    mapped.crops[:] = 0
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_trial(small_trial(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_trial(small_trial(name="b"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 100, 900, -1])
def test_a_cut_file_is_refused(tmp_path, keep, memory_map):
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
    with pytest.raises(
        CacheError, match=r"not a prepared trial of this version .*'something else'"
    ):
        load_trial(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CacheError, match=r"no such prepared file: .*nobody"):
        load_trial(tmp_path / "nobody.safetensors")


def test_a_stale_file_is_refused_with_what_changed(tmp_path, clip):
    made = source_fingerprint(clip, crop_size=48, detector="mediapipe")
    wanted = source_fingerprint(clip, crop_size=64, detector="mediapipe")
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
    options = {"crop_size": 48, "detector": "mediapipe"}
    first = source_fingerprint(source, **options)
    assert first == source_fingerprint(source, **options)
    os.utime(source, ns=(1, 1))
    second = source_fingerprint(source, **options)
    source.write_bytes(b"three")
    os.utime(source, ns=(1, 1))
    third = source_fingerprint(source, **options)
    assert len({first, second, third}) == 3
    assert json.loads(third)["source_bytes"] == 5


# ---------------------------------------------------------------------- many videos
def test_a_second_run_does_nothing_and_a_changed_source_is_refused(tmp_path, clip, monkeypatch):
    video = tmp_path / "v.mp4"
    video.write_bytes(clip.read_bytes())
    seen = []
    files = prepare_dataset(
        {"deep/v": video}, tmp_path / "out", crop_size=16, progress=lambda *x: seen.append(x)
    )
    assert files == {"deep/v": tmp_path / "out" / "deep" / "v.safetensors"}
    assert seen == [(0, 1), (1, 1)]
    assert load_trial(files["deep/v"]).name == "deep/v"

    def refuse(*args, **options):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(features, "_prepare", refuse)
        assert prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16) == files
    os.utime(video, ns=(1, 1))
    with pytest.raises(CacheError, match=r"source_modified_ns was .*`overwrite=True` replaces it"):
        prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16)
    prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16, overwrite=True)


def test_one_broken_video_does_not_stop_the_others(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("no video " * 99)
    videos = {"text": tmp_path / "text.mp4", "gone": tmp_path / "gone.mp4", "good": clip}
    with pytest.raises(PreparationError, match=r"^2 of 3 videos could not be prepared: ") as caught:
        prepare_dataset(videos, tmp_path / "out", crop_size=16)
    assert set(caught.value.failures) == {"text", "gone"}
    assert "no such file" in caught.value.failures["gone"]
    assert list(caught.value.prepared) == ["good"]
    assert os.listdir(tmp_path / "out") == ["good.safetensors"]


def test_several_processes_are_spawned_and_give_the_same_files(tmp_path, clip, monkeypatch):
    """A forked MediaPipe hangs, so the start method is not left to the platform."""
    started = []
    monkeypatch.setattr(
        features,
        "get_context",
        lambda kind: started.append(kind) or multiprocessing.get_context(kind),
    )
    videos = dict.fromkeys("abc", clip)
    one = prepare_dataset(videos, tmp_path / "one", crop_size=16, jobs=1)
    assert started == []
    two = prepare_dataset(videos, tmp_path / "two", crop_size=16, jobs=2)
    assert started == ["spawn"]
    for name in videos:
        assert_same(load_trial(one[name]), load_trial(two[name]))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, clip):
    script = (
        "import sys; from mmau.data.features import prepare_dataset\n"
        "videos = {f'v{i:02}': sys.argv[1] for i in range(40)}\n"
        "prepare_dataset(videos, sys.argv[2], crop_size=16)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, clip, out])
    while len(list(out.glob("*.safetensors"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert 3 <= len(before) < 40
    files = prepare_dataset({f"v{i:02}": clip for i in range(40)}, out, crop_size=16)
    reference = prepare_video(clip, crop_size=16)
    for name, file in files.items():
        assert_same(load_trial(file), replace(reference, name=name))
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("name", ["../up", "/abs", ""])
def test_a_name_stays_in_the_folder(tmp_path, clip, name):
    with pytest.raises(
        ValueError, match=f"must stay inside the folder; got {re.escape(repr(name))}"
    ):
        prepare_dataset({name: clip}, tmp_path)


def test_wrong_numbers_are_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="`jobs` must be in"):
        prepare_dataset({"a": clip}, tmp_path, jobs=0)
    with pytest.raises(ValueError, match="`crop_size` must be in"):
        prepare_dataset({"a": clip}, tmp_path, crop_size=1)


def test_a_killed_worker_is_reported(monkeypatch, tmp_path, clip):
    class Broken:
        def __init__(self, *args, **options):
            pass

        def submit(self, *args):
            raise features.BrokenProcessPool("gone")

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(features, "ProcessPoolExecutor", Broken)
    with pytest.raises(RuntimeError, match=r"a worker process died, .* finished files are kept"):
        prepare_dataset({"a": clip, "b": clip}, tmp_path, jobs=2)
