"""The whole way: the recipe trains, the command line predicts, and bad input gets one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmau.action_units import AU_NAMES
from mmau.synthetic import SyntheticConfig, render_clip, write_movie

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "affwild2_au.py"
COLUMNS = ["frame", "timestamp", "valid", "confidence", *AU_NAMES, *(f"{n}_c" for n in AU_NAMES)]


def run_recipe(*words, check=True):
    return subprocess.run(
        [sys.executable, str(RECIPE), *map(str, words)],
        check=check,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def mmau(*words):
    return subprocess.run(
        [sys.executable, "-m", "mmau.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """A finished run of the smoke preset, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return out, run_recipe("smoke", "--out", out).stdout


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    """Three videos that were not in training: with sound, without, and with the face leaving."""
    folder = tmp_path_factory.mktemp("movies")
    clip = render_clip(987654, SyntheticConfig(num_frames=30, hidden=(0.0, 0.0)))
    sound = {"waveform": clip.waveform, "sample_rate": clip.sample_rate}
    write_movie(folder / "sound.mp4", clip.frames, fps=15.0, **sound)
    write_movie(folder / "silent.mp4", clip.frames, fps=15.0)
    frames = clip.frames.copy()
    frames[12:] = 110
    write_movie(folder / "leaving.mp4", frames, fps=15.0, **sound)
    frames[:] = 110
    write_movie(folder / "no_face.mp4", frames[:8], fps=15.0)
    return folder


def test_recipe_writes_everything(smoke_run):
    out, said = smoke_run
    assert "baseline: every AU in every frame" in said
    assert "cross-validated thresholds + smoothing" in said
    metrics = json.loads((out / "metrics.json").read_text())
    scores = metrics["systems"]["audio + video"]["mean_f1"]
    for way in ("raw at 0.5", "posterior at 0.5", "cross-validated thresholds"):
        interval = scores[way]["all"]
        assert 0 <= interval["low"] <= interval["high"] <= 1
    assert metrics["provenance"]["data"] == "rendered from two photographs"
    assert json.loads((out / "config.json").read_text())["data"]["render"]["num_train"] == 4
    for folder in (out / "checkpoint", out / "detector" / "best"):
        names = {p.name for p in folder.iterdir()}
        assert {"model.safetensors", "config.json"} <= names
    assert (out / "checkpoint" / "calibration.json").is_file()
    steps = [json.loads(s) for s in (out / "detector" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert not list(out.glob("*/states/*"))  # a finished run of this preset keeps no state
    assert (out / "timeline.png").stat().st_size > 10_000
    assert not list(out.rglob("*.partial*"))


def test_recipe_names_the_nearest_preset_and_key():
    run = run_recipe("dmeo", check=False)
    assert run.returncode != 0
    assert "no preset named 'dmeo'; did you mean 'demo'?" in run.stderr
    run = run_recipe("smoke", "--optim.epohcs", "3", check=False)
    assert run.returncode != 0
    assert "--optim.epochs" in run.stderr


def test_unknown_component_and_option_are_named_before_any_work(tmp_path):
    run = run_recipe(
        "smoke", "--model.audio.name", "tiny_wavlm", "--loss.name", "asll", "--out", tmp_path / "x",
        check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "audio encoder 'tiny_wavlm' takes no option 'num_mels'" in run.stderr
    assert "no loss named 'asll'; did you mean 'asl'?" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "x").exists()


def test_paper_preset_says_what_is_missing(tmp_path):
    run = run_recipe("paper", "--data.root", tmp_path, "--out", tmp_path / "run", check=False)
    assert run.returncode == 1
    assert f"no such folder: {tmp_path / 'videos'}" in run.stderr
    assert "the weights of 'facebook/dinov2-large' are not on this machine" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


def read(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("movie", "num_frames", "num_valid", "note"),
    [
        ("sound", 30, 30, None),
        ("silent", 30, 30, "no sound track"),
        ("leaving", 30, 12, "no face in 18 of 30 frames"),
        ("no_face", 8, 0, "no face was found in any frame"),
    ],
)
def test_predict_gives_one_row_per_frame(
    smoke_run, movies, tmp_path, movie, num_frames, num_valid, note
):
    table, plot = tmp_path / "out.csv", tmp_path / "out.png"
    run = mmau(
        "predict", movies / f"{movie}.mp4", "--checkpoint", smoke_run[0] / "checkpoint",
        "-o", table, "--plot", plot,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = read(table)
    assert list(rows[0]) == COLUMNS
    assert len(rows) == num_frames
    # The detector may lose or find a face one frame late at a cut, not more.
    valid = np.array([int(row["valid"]) for row in rows])
    assert abs(valid.sum() - num_valid) <= 1
    assert [int(row["frame"]) for row in rows] == list(range(1, num_frames + 1))
    times = np.array([float(row["timestamp"]) for row in rows])
    np.testing.assert_allclose(np.diff(times), 1 / 15, atol=1e-3)
    confidence = np.array([float(row["confidence"]) for row in rows])
    assert ((confidence > 0) == (valid == 1)).all()
    prob = np.array([[float(row[name]) for name in AU_NAMES] for row in rows])
    assert ((prob >= 0) & (prob <= 1)).all()
    assert {row["AU12_c"] for row in rows} <= {"0", "1"}
    assert (note or "") in run.stderr
    if note is None:
        assert "note:" not in run.stderr
    assert plot.stat().st_size > 10_000


def test_predict_equals_the_library(smoke_run, movies, tmp_path):
    from mmau.inference import AUPredictor

    table = tmp_path / "out.csv"
    checkpoint = smoke_run[0] / "checkpoint"
    assert (
        mmau("predict", movies / "sound.mp4", "--checkpoint", checkpoint, "-o", table).returncode
        == 0
    )
    predicted = AUPredictor.from_pretrained(checkpoint).predict_file(movies / "sound.mp4")
    written = np.array([[float(row[name]) for name in AU_NAMES] for row in read(table)])
    np.testing.assert_allclose(written, predicted.probability, atol=6e-6)


def test_sound_matters(smoke_run, movies):
    """The same images with and without their sound track give different probabilities."""
    from mmau.inference import AUPredictor

    predictor = AUPredictor.from_pretrained(smoke_run[0] / "checkpoint")
    audible = predictor.predict_file(movies / "sound.mp4").probability
    silent = predictor.predict_file(movies / "silent.mp4").probability
    assert np.abs(audible - silent).max() > 1e-6  # the images are the same to the bit


BAD_INPUT = {
    "missing": "no such file",
    "folder": "folder",
    "text": "not a video",
    "cut": "",
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_a_bad_video_is_one_line(smoke_run, movies, tmp_path, kind):
    video = tmp_path / "video.mp4"
    if kind == "folder":
        video.mkdir()
    elif kind == "text":
        video.write_text("this is not a video\n" * 100)
    elif kind == "cut":
        whole = (movies / "sound.mp4").read_bytes()
        video.write_bytes(whole[: len(whole) // 3])
    table = tmp_path / "out.csv"
    run = mmau("predict", video, "--checkpoint", smoke_run[0] / "checkpoint", "-o", table)
    assert "Traceback" not in run.stderr
    if run.returncode == 0:  # some frames of a cut file may be readable; then it must say so
        assert kind == "cut"
        assert "note:" in run.stderr
        return
    assert run.returncode == 1
    assert "video.mp4" in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("mmau: ")
    assert BAD_INPUT[kind] in last
    assert not list(tmp_path.glob("*out*"))


def test_a_bad_checkpoint_or_output_is_one_line(smoke_run, movies, tmp_path):
    video = movies / "sound.mp4"
    run = mmau("predict", video, "--checkpoint", tmp_path / "nowhere", "-o", tmp_path / "o.csv")
    assert run.returncode == 1
    assert "no such folder" in run.stderr
    run = mmau("predict", video, "--checkpoint", smoke_run[0] / "checkpoint", "-o", tmp_path)
    assert run.returncode == 1
    assert "is a folder; -o takes the path of the table to write" in run.stderr
    run = mmau(
        "predict", video, "--checkpoint", smoke_run[0] / "checkpoint", "-o", tmp_path / "o.csv",
        "--detector", "mediapip",
    )  # fmt: skip
    assert run.returncode == 1
    assert "no face detector named 'mediapip'; did you mean 'mediapipe'?" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_components_lists_every_registry():
    run = mmau("components")
    assert run.returncode == 0, run.stderr
    for word in ("scan backend", "chunked", "wavlm", "dinov2", "ibug68", "asl", "tcn", "mediapipe"):
        assert word in run.stdout
    assert "losses  (entry-point group mmau.losses)" in run.stdout
    assert "installed" in run.stdout


def test_wrong_usage_exits_with_two():
    run = mmau("predikt")
    assert run.returncode == 2
    assert "invalid choice: 'predikt'" in run.stderr


def test_prepare_once_then_reuse(movies, tmp_path):
    run = mmau("prepare", movies / "sound.mp4", "-o", tmp_path, "--crop-size", "64", "--quiet")
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    assert (
        mmau("prepare", movies / "sound.mp4", "-o", tmp_path, "--crop-size", "64").returncode == 0
    )
    assert file.stat().st_mtime_ns == before
    run = mmau("prepare", tmp_path / "nowhere", "-o", tmp_path)
    assert run.returncode == 1
    assert "no such file or folder" in run.stderr


def test_someone_elses_model_in_ten_lines(tmp_path):
    """The three public names in a model of one's own: train, compile, save, load."""
    from mmau import AGSSM, HGA, AsymmetricLoss

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hga, self.scan = HGA(48, 32, 4), AGSSM(32, d_audio=16)
            self.head = torch.nn.Linear(32, 12)

        def forward(self, patches, weights, audio):
            regions = self.hga(patches, weights).tokens.mean(-2)
            return self.head(self.scan(regions, audio)[0])

    model, loss = Mine(), AsymmetricLoss()
    inputs = (torch.randn(2, 9, 64, 48), torch.full((2, 9, 5, 64), 1 / 64), torch.randn(2, 9, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    loss(model(*inputs), torch.randint(-1, 2, (2, 9, 12))).backward()
    optimizer.step()
    # The tracing is what can fail; generating code would need a C++ compiler on the machine.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    again = Mine()
    again.load_state_dict(torch.load(tmp_path / "mine.pt", weights_only=True))
    torch.testing.assert_close(again(*inputs), model(*inputs))
