"""`mmau evaluate` prints the numbers of the library, from a checkpoint and from tables."""

import json

import numpy as np
import pytest
import torch

from mmau.action_units import AU_NAMES
from mmau.cli import main
from mmau.evaluation import AUCounts, Calibration
from mmau.inference import AUPredictor, AUTable
from mmau.media.faces import FaceOptions
from mmau.models import Component, DetectorConfig, build_detector, save_pretrained
from mmau.synthetic import SyntheticConfig, render_clip, write_movie

NAMES = ("AU1", "AU12")


def run(*words):
    return main([str(word) for word in words])


def write_annotation(path, labels, names=NAMES):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(",".join(map(str, row)) for row in np.asarray(labels).tolist())
    path.write_text(",".join(names) + "\n" + rows + "\n")


@pytest.fixture
def tables(tmp_path):
    """Six tables and annotations; one table has a frame more than there are rows."""
    rng = np.random.default_rng(0)
    counts = AUCounts(NAMES)
    for number in range(6):
        t = 40
        labels = (rng.random((t, 2)) < 0.3).astype(np.int8)
        labels[:5] = -1
        prob = np.clip(0.4 * labels + rng.uniform(0, 0.6, (t, 2)), 0, 1).round(5)
        active = prob >= 0.45
        extra = int(number == 0)
        table = AUTable(
            NAMES,
            np.arange(t + extra) / 25,
            np.arange(t + extra) % 4 > 0,
            np.ones(t + extra),
            np.concatenate([prob, np.full((extra, 2), 0.5)]),
            np.concatenate([active, np.ones((extra, 2), bool)]),
        )
        name = f"video{number // 2}_{('left', 'right')[number % 2]}"
        table.write_csv(tmp_path / "predictions" / f"{name}.csv")
        write_annotation(tmp_path / "annotations" / f"{name}.txt", labels)
        counts.update(torch.from_numpy(active).double(), torch.from_numpy(labels).long())
    return tmp_path, counts


def test_tables_against_annotations(tables, capsys):
    folder, counts = tables
    record = folder / "report.json"
    code = run(
        "evaluate", "--predictions", folder / "predictions", "--annotations",
        folder / "annotations", "--json", record, "--resamples", "100",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "6 trials (3 videos)" in said.out  # left and right of a video stay together
    assert "cross-validated thresholds + smoothing" in said.out
    assert f"with the decisions in the tables: mean F1 {counts.mean_f1():.3f}" in said.out
    assert "41 frames and 40 annotation rows: 1 frames have no row" in said.err
    written = json.loads(record.read_text())
    assert written["decisions"]["mean_f1"] == pytest.approx(counts.mean_f1())
    assert written["num_videos"] == 3
    assert 0 < written["mean_f1"]["raw at 0.5"]["seen"]["estimate"] < 1


def test_a_bad_table_is_listed_and_the_others_count(tables, capsys):
    folder, _ = tables
    (folder / "predictions" / "video0_left.csv").write_text("frame\n1\n")
    code = run(
        "evaluate", "--predictions", folder / "predictions", "--annotations",
        folder / "annotations", "--resamples", "100", "--no-smoothing",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 3
    assert "5 trials" in said.out
    assert "smoothing" not in said.out
    assert "video0_left.csv" in said.err
    assert said.err.splitlines()[-1] == "mmau: 1 of 6 files failed"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two videos in the layout of Aff-Wild2; the second one has two faces, the left one annotated.

    The other face is larger, so whoever forgets what `_left` means follows the wrong one.
    """
    root = tmp_path_factory.mktemp("root")
    clip = render_clip(987654, SyntheticConfig(num_frames=10, hidden=(0.0, 0.0)))
    rng = np.random.default_rng(1)
    two = np.full((10, 384, 576, 3), 110, dtype=np.uint8)
    two[:, 96:288, :192] = clip.frames
    two[:, :, 192:] = clip.frames[::-1, :, ::-1].repeat(2, axis=1).repeat(2, axis=2)
    for video, trial, frames in (("a", "a", clip.frames), ("b", "b_left", two)):
        write_movie(root / "videos" / f"{video}.mp4", frames, fps=15.0)
        labels = rng.integers(0, 2, (10, 12))
        path = root / "AU_Detection_Challenge" / "Validation_Set" / f"{trial}.txt"
        write_annotation(path, labels, AU_NAMES)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = DetectorConfig(
        visual=Component("tiny"),
        audio=None,
        d_region=32,
        num_heads=4,
        d_model=32,
        crop_size=64,
    )
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_pretrained(build_detector(config), folder)
    Calibration(AU_NAMES, (0.15,) * 12, note="chosen by hand").save(folder / "calibration.json")
    return folder


def test_a_checkpoint_on_a_data_root(root, checkpoint, tmp_path, capsys):
    code = run("evaluate", root, "--checkpoint", checkpoint, "--resamples", "100")
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "2 trials (2 videos)" in said.out
    predictor = AUPredictor.from_pretrained(checkpoint)
    counts = AUCounts(AU_NAMES)
    for video, trial in (("a", "a"), ("b", "b_left")):
        path = root / "AU_Detection_Challenge" / "Validation_Set" / f"{trial}.txt"
        labels = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)
        left = FaceOptions(face="left")
        active = predictor.predict_file(root / "videos" / f"{video}.mp4", faces=left).active
        counts.update(torch.from_numpy(active).double(), torch.from_numpy(labels))
    assert f"(chosen by hand): mean F1 {counts.mean_f1():.3f}" in said.out
    # The same from prepared trials, which stay for the next time.
    prepared = tmp_path / "prepared"
    for _ in range(2):
        code = run(
            "evaluate", root, "--checkpoint", checkpoint, "--resamples", "100",
            "--prepared", prepared,
        )  # fmt: skip
        assert code == 0
        assert capsys.readouterr().out == said.out
    assert sorted(p.name for p in prepared.iterdir()) == ["a.safetensors", "b_left.safetensors"]


def test_a_broken_video_is_listed(root, checkpoint, tmp_path, capsys):
    import shutil

    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    (copy / "videos" / "b.mp4").write_text("broken")
    for words in ((), ("--prepared", tmp_path / "prepared")):
        assert run("evaluate", copy, "--checkpoint", checkpoint, *words) == 3
        said = capsys.readouterr()
        assert "1 trials (1 videos)" in said.out
        assert "b.mp4" in said.err.splitlines()[-2]
        assert said.err.splitlines()[-1] == "mmau: 1 of 2 files failed"


def test_wrong_use_is_one_line(tables, root, checkpoint, capsys):
    folder, _ = tables
    cases = {
        (): "give either --checkpoint with a data root, or --predictions",
        ("--checkpoint", checkpoint): "--checkpoint goes with a data root",
        ("--predictions", folder): "--predictions goes with --annotations",
        (root, "--checkpoint", checkpoint, "--predictions", folder): "give either",
        (root, "--checkpoint", checkpoint, "--split", "train"): "Train_Set",
        ("--predictions", folder / "no", "--annotations", folder): "no such file or folder",
        ("--predictions", folder, "--annotations", folder / "no"): "no such folder",
        ("--predictions", folder / "predictions", "--annotations", folder): "no table in",
    }
    for words, sentence in cases.items():
        assert run("evaluate", *words) == 1
        said = capsys.readouterr().err
        assert sentence in said, said
        assert len(said.splitlines()) == 1
