"""Many videos: killed and resumed, broken ones listed, one trial per person."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from video_files import SIDE, write_clip

from mmau import _pool
from mmau.data import prepare
from mmau.data.prepare import (
    PreparationError,
    PreparationReport,
    prepare_dataset,
    prepare_video,
    source_fingerprint,
)
from mmau.data.prepared import load_trial
from mmau.data.store import CacheError, DiskFullError
from mmau.media import FaceOptions

pytest.importorskip("mediapipe")

EVERY_FACE = FaceOptions(face="all")


@pytest.fixture(scope="module")
def clip(tmp_path_factory, images):
    """Twelve frames, the face hidden in frames 4 to 7."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", images)


@pytest.fixture(scope="module")
def couple(tmp_path_factory, portraits):
    """Twenty frames: one face from the start, another to its right in frames 6 to 15."""
    left, right = portraits
    grey = np.full((SIDE, SIDE, 3), 110, np.uint8)
    images = [np.concatenate([left, right if 6 <= i < 16 else grey], axis=1) for i in range(20)]
    return write_clip(tmp_path_factory.mktemp("clips") / "couple.mp4", images)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path_factory.mktemp("clips") / "cut.mp4", list(noise), fast_start=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


# ---------------------------------------------------------------------- again
def test_a_second_run_does_nothing_and_a_changed_source_is_refused(tmp_path, clip, monkeypatch):
    video = tmp_path / "v.mp4"
    video.write_bytes(clip.read_bytes())
    seen = []
    files = prepare_dataset(
        {"deep/v": video}, tmp_path / "out", crop_size=16, progress=lambda *x: seen.append(x)
    )
    assert files == {"deep/v": tmp_path / "out" / "deep" / "v.safetensors"}
    assert (files.failures, files.warnings, files.reused) == ({}, {}, ())
    assert seen == [(0, 1), (1, 1)]
    assert load_trial(files["deep/v"]).name == "deep/v"

    def refuse(*args, **options):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare_file", refuse)
        again = prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16)
    assert again == files
    assert again.reused == ("deep/v",)
    os.utime(video, ns=(1, 1))
    with pytest.raises(CacheError, match=r"source_modified_ns was .*`overwrite=True` replaces it"):
        prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16)
    prepare_dataset({"deep/v": video}, tmp_path / "out", crop_size=16, overwrite=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_resumes_where_it_stopped(tmp_path, clip):
    """kill -9 in the middle; then the same call gives the bytes of a run that was left alone."""
    names = [f"v{index:02}" for index in range(24)]
    script = (
        "import sys\n"
        "from mmau.data.prepare import prepare_dataset\n"
        "if __name__ == '__main__':\n"
        "    names = [f'v{index:02}' for index in range(24)]\n"
        "    videos = dict.fromkeys(names, sys.argv[1])\n"
        "    prepare_dataset(videos, sys.argv[2], crop_size=16, jobs=2)\n"
    )
    (tmp_path / "run.py").write_text(script)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", clip, out], start_new_session=True
    )
    while len(list(out.glob("v*.safetensors"))) < 3:
        time.sleep(0.005)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # the workers too
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("v*.safetensors")}
    assert 3 <= len(before) < len(names)
    seen = []
    files = prepare_dataset(
        dict.fromkeys(names, clip), out, crop_size=16, progress=lambda *x: seen.append(x)
    )
    assert seen[0] == (len(before), len(names))  # what was finished is not done again
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert set(files.reused) == {file.stem for file in before}
    alone = prepare_dataset(dict.fromkeys(names, clip), tmp_path / "alone", crop_size=16)
    for name in names:
        assert files[name].read_bytes() == alone[name].read_bytes()
    assert sorted(os.listdir(out)) == [f"{name}.safetensors" for name in names]  # no half files


def test_a_run_killed_while_a_file_is_written_leaves_no_file_of_that_name(tmp_path, clip):
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from mmau.data.prepare import prepare_video\n"
        "def stop(done, total):\n"
        "    if done == 9:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare_video(sys.argv[1], file=sys.argv[2], crop_size=16, progress=stop)\n"
    )
    target = out / "v.safetensors"
    result = subprocess.run([sys.executable, "-c", script, clip, target], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not target.exists()
    trial = prepare_video(clip, file=target, crop_size=16)
    assert trial.num_frames == 12
    assert os.listdir(out) == ["v.safetensors"]


# ---------------------------------------------------------------------- broken videos
def test_one_broken_video_does_not_stop_the_others(tmp_path, clip, cut):
    (tmp_path / "text.mp4").write_text("no video " * 99)
    (tmp_path / "empty.mp4").touch()
    videos = {
        "text": tmp_path / "text.mp4",
        "gone": tmp_path / "gone.mp4",
        "empty": tmp_path / "empty.mp4",
        "folder": tmp_path,
        "good": clip,
        "cut": cut,
    }
    with pytest.raises(PreparationError, match=r"^4 of 6 videos could not be prepared: ") as caught:
        prepare_dataset(videos, tmp_path / "out", crop_size=16)
    report = caught.value.report
    assert isinstance(report, PreparationReport)
    assert report.failures == caught.value.failures
    assert re.match(r"not a video or sound file that FFmpeg can read", report.failures["text"])
    assert re.match(r"no such file: .*gone\.mp4", report.failures["gone"])
    assert re.match(r"the file is empty \(0 bytes\): .*empty\.mp4", report.failures["empty"])
    assert re.match("expected a file but this is a folder", report.failures["folder"])
    assert all(text in str(caught.value) for text in report.failures.values())
    assert list(report) == list(caught.value.prepared) == ["good", "cut"]
    assert list(report.warnings) == ["cut"]
    assert "the container announces 40" in report.warnings["cut"][-1]
    assert sorted(os.listdir(tmp_path / "out")) == ["cut.safetensors", "good.safetensors"]


def test_a_cut_video_counts_as_broken_if_strict_also_when_it_was_prepared_before(tmp_path, cut):
    lenient = prepare_dataset({"cut": cut}, tmp_path / "out", crop_size=16)
    assert load_trial(lenient["cut"]).shortfall > 0
    sentence = r"1 of 1 videos could not be prepared: cut: .*(the container announces 40|a packet)"
    with pytest.raises(PreparationError, match=sentence):
        prepare_dataset({"cut": cut}, tmp_path / "out", crop_size=16, strict=True)
    with pytest.raises(PreparationError, match=sentence):
        prepare_dataset({"cut": cut}, tmp_path / "new", crop_size=16, strict=True)
    assert not list(tmp_path.glob("new/*"))


def test_what_a_library_says_about_one_video_does_not_stop_the_others(tmp_path, clip, monkeypatch):
    real = prepare.prepare_file

    def stumble(path, finder, target, **options):
        if target.name == "odd":
            raise RuntimeError("an internal error of a library")
        real(path, finder, target, **options)

    monkeypatch.setattr(prepare, "prepare_file", stumble)
    with pytest.raises(PreparationError) as caught:
        prepare_dataset({"odd": clip, "good": clip}, tmp_path, crop_size=16)
    assert caught.value.failures == {"odd": "RuntimeError: an internal error of a library"}
    assert list(caught.value.prepared) == ["good"]


# ---------------------------------------------------------------------- no room
def test_a_full_disk_stops_the_batch_with_a_sentence_and_leaves_nothing(
    tmp_path, clip, monkeypatch
):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    prepare_dataset({"first": clip}, tmp_path, crop_size=16)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"^the disk is full; this file was not written: .*two"):
        prepare_dataset({"first": clip, "two": clip, "three": clip}, tmp_path, crop_size=16)
    assert os.listdir(tmp_path) == ["first.safetensors"]


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path, clip):
    """A real refusal, by a limit on the size of files."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="the disk is full; this file was not written"):
            prepare_video(clip, file=tmp_path / "out" / "a.safetensors", crop_size=224)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == []


def test_the_sentence_comes_back_from_a_worker():
    import pickle

    error = pickle.loads(pickle.dumps(DiskFullError(28, Path("a.safetensors"))))
    assert str(error) == "the disk is full; this file was not written: a.safetensors"
    assert error.errno == 28


# ---------------------------------------------------------------------- several processes
def test_several_processes_are_spawned_and_give_the_same_files(tmp_path, clip, monkeypatch):
    """A forked MediaPipe hangs, so the start method is not left to the platform."""
    started = []
    monkeypatch.setattr(
        _pool,
        "get_context",
        lambda kind: started.append(kind) or multiprocessing.get_context(kind),
    )
    (tmp_path / "text.mp4").write_text("no video " * 99)
    videos = {**dict.fromkeys("abc", clip), "text": tmp_path / "text.mp4"}
    for folder, jobs in (("one", 1), ("two", 2)):
        with pytest.raises(PreparationError, match="1 of 4 videos could not be prepared: text: "):
            prepare_dataset(videos, tmp_path / folder, crop_size=16, jobs=jobs)
        assert started == ["spawn"] * (jobs - 1)
    for name in "abc":
        one, two = (tmp_path / folder / f"{name}.safetensors" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


class Pool:
    """Stands in for a pool of processes; a job with the name `deadly` brings it down."""

    can_start = True
    deadly = ("deadly",)

    def __init__(self, *args, **options):
        self.broken = False

    def submit(self, work, *jobs):
        from concurrent.futures import Future

        future = Future()
        self.broken |= any(job in self.deadly for job in jobs) or not self.can_start
        if self.broken:
            future.set_exception(_pool.BrokenProcessPool("gone"))
        else:
            future.set_result(True if work is _pool._is_ready else None)
        return future

    def shutdown(self, **options):
        pass


def jobs_named(*names):
    target = {name: prepare.TrialTarget(Path(), name, all_faces=False) for name in names}
    return {name: prepare.PreparationJob("v.mp4", target[name], False) for name in names}


def test_a_video_that_kills_its_process_is_found_and_the_others_are_done(monkeypatch):
    monkeypatch.setattr(_pool, "ProcessPoolExecutor", Pool)
    todo = jobs_named("a", "b", "deadly", *"cdefghij")
    done = dict(prepare.run_jobs(todo, FaceOptions(), 16, 2))
    assert set(done) == set(todo)
    assert {name for name, reason in done.items() if reason is not None} == {"deadly"}
    assert re.match(r"the process that read it was killed, .*: v\.mp4", done["deadly"])


def test_processes_that_cannot_start_are_reported_once(monkeypatch):
    monkeypatch.setattr(_pool, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "can_start", False)
    with pytest.raises(RuntimeError, match=r"worker processes cannot start\. .*__main__"):
        dict(prepare.run_jobs(jobs_named(*"abc"), FaceOptions(), 16, 2))


# ---------------------------------------------------------------------- people
def test_each_face_is_a_trial_with_a_row_for_every_frame(tmp_path, couple, monkeypatch):
    monkeypatch.setattr(prepare, "_FRAMES_AT_ONCE", 5)  # the second comes in a later chunk
    files = prepare_dataset({"talk": couple}, tmp_path, crop_size=32, faces=EVERY_FACE)
    assert list(files) == ["talk_face0", "talk_face1"]
    first, second = (load_trial(file) for file in files.values())
    for number, trial in enumerate((first, second)):
        assert trial.name == f"talk_face{number}"
        assert trial.num_frames == 20
        np.testing.assert_allclose(trial.timestamps, np.arange(20) / 15, atol=1e-3)
        assert set(trial.face_ids[trial.valid]) == {number}
        assert np.isnan(trial.landmarks[~trial.valid]).all()
        assert np.isnan(trial.boxes[~trial.valid]).all()
        assert (trial.confidence[~trial.valid] == 0).all()
        assert trial.crops[~trial.valid].max(initial=0) == 0
    assert first.valid.all()
    assert (first.boxes[:, 2] < SIDE + 10).all()
    came = int(np.flatnonzero(second.valid)[0])
    assert 6 <= came < 16  # seen at the next look of the detector, at most ten frames later
    assert (second.valid == ((np.arange(20) >= came) & (np.arange(20) < 16))).all()
    assert (second.boxes[second.valid][:, 0] > SIDE - 10).all()
    # Each of them is what the same person is alone.
    one = prepare_video(couple, crop_size=32, faces=FaceOptions(face=1))
    np.testing.assert_array_equal(one.crops, second.crops)
    np.testing.assert_array_equal(one.landmarks, second.landmarks)


def test_all_faces_again_does_nothing_and_a_changed_list_is_refused(tmp_path, couple, monkeypatch):
    files = prepare_dataset({"talk": couple}, tmp_path, crop_size=16, faces=EVERY_FACE)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare_file", None)
        again = prepare_dataset({"talk": couple}, tmp_path, crop_size=16, faces=EVERY_FACE)
    assert again == files
    assert again.reused == ("talk_face0", "talk_face1")
    with pytest.raises(CacheError, match=r"stale \(crop_size was 16 and is now 32\)"):
        prepare_dataset({"talk": couple}, tmp_path, crop_size=32, faces=EVERY_FACE)
    (tmp_path / "talk.faces.json").write_text("{}")
    with pytest.raises(CacheError, match=r"not a list of people; delete it: .*talk\.faces\.json"):
        prepare_dataset({"talk": couple}, tmp_path, crop_size=16, faces=EVERY_FACE)


def test_a_video_without_a_face_is_one_trial_without_a_valid_row(tmp_path):
    wall = write_clip(tmp_path / "wall.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 3)
    files = prepare_dataset({"wall": wall}, tmp_path / "out", crop_size=16, faces=EVERY_FACE)
    assert list(files) == ["wall_face0"]
    assert load_trial(files["wall_face0"]).valid.tolist() == [False] * 3


@pytest.mark.parametrize(("face", "left"), [("left", True), ("right", False), (0, True)])
def test_one_of_two_is_chosen(tmp_path, portraits, face, left):
    both = write_clip(tmp_path / "both.mp4", [np.concatenate(portraits, axis=1)] * 3)
    trial = prepare_video(both, crop_size=32, faces=FaceOptions(face=face))
    assert trial.valid.all()
    assert ((trial.boxes[:, 0] < SIDE / 2) == left).all()


def test_a_person_who_never_comes_is_said(clip):
    trial = prepare_video(clip, crop_size=16, faces=FaceOptions(face=7))
    assert not trial.valid.any()
    assert trial.warnings == ("no face has the number 7; numbers seen: 0",)


def test_a_name_that_could_be_a_person_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="must not end in _face and a number; got 'a_face1'"):
        prepare_dataset({"a_face1": clip}, tmp_path, faces=EVERY_FACE)


# ---------------------------------------------------------------------- wrong use
@pytest.mark.parametrize("name", ["../up", "/abs", ""])
def test_a_name_stays_in_the_folder(tmp_path, clip, name):
    with pytest.raises(
        ValueError, match=f"must stay inside the folder; got {re.escape(repr(name))}"
    ):
        prepare_dataset({name: clip}, tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jobs": 0}, ValueError, "`jobs` must be in"),
        ({"crop_size": 1}, ValueError, "`crop_size` must be in"),
        (
            {"faces": FaceOptions("mediapip")},
            LookupError,
            "no face detector named 'mediapip'; did you mean",
        ),
    ],
)
def test_wrong_options_raise(tmp_path, clip, options, error, message):
    with pytest.raises(error, match=message):
        prepare_dataset({"a": clip}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_holds_every_option(tmp_path, clip):
    (tmp_path / "clip.csv").write_text("frame,left,top,right,bottom\n")
    variants = [
        (48, FaceOptions()),
        (32, FaceOptions()),
        (48, FaceOptions(detector="precomputed")),
        (48, FaceOptions(landmarks="precomputed")),
        (48, FaceOptions(face="left")),
        (48, FaceOptions(detector_options={"min_score": 0.4})),
        (48, FaceOptions(detector_options={"path": tmp_path})),
        (48, FaceOptions(landmark_options={"path": tmp_path})),
    ]

    def print_of(variant):
        return source_fingerprint(clip, crop_size=variant[0], faces=variant[1])

    prints = [print_of(variant) for variant in variants]
    assert len(set(prints)) == len(variants)
    (tmp_path / "clip.csv").write_text("frame,left,top,right,bottom\n1,0,0,9,9\n")
    assert print_of(variants[6]) != prints[6]
    assert "path of the trial" in json.loads(prints[6])["detector_options"]


def test_a_report_is_a_mapping_that_compares_like_one():
    report = PreparationReport({"a": Path("a")}, failures={"b": "no"})
    assert report == {"a": Path("a")}
    assert report.failures == {"b": "no"}
