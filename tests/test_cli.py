"""The commands, called as functions: what they write, say and return."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from mmau.cli import doctor, main
from mmau.cli.completion import completion_script
from mmau.cli.console import Console, find_videos, is_single_file, run_batch
from mmau.cli.doctor import torchaudio_status
from mmau.cli.parser import build_parser
from mmau.inference import AUPredictor, read_table
from mmau.models import Component, DetectorConfig, build_detector, save_pretrained
from mmau.synthetic import SyntheticConfig, render_clip, write_movie


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = DetectorConfig(
        visual=Component("tiny"),
        audio=Component("log_mel", {"num_mels": 24}),
        d_region=32,
        num_heads=4,
        d_model=32,
        d_audio=16,
        crop_size=64,
    )
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_pretrained(build_detector(config), folder)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two films in a folder, one of them deeper, and a broken file between them."""
    folder = tmp_path_factory.mktemp("films")
    clip = render_clip(987654, SyntheticConfig(num_frames=12, hidden=(0.0, 0.0)))
    sound = {"waveform": clip.waveform, "sample_rate": clip.sample_rate}
    write_movie(folder / "one.mp4", clip.frames, fps=15.0, **sound)
    write_movie(folder / "deep" / "two.mp4", clip.frames[:9], fps=15.0)
    (folder / "broken.mp4").write_text("not a video\n" * 50)
    (folder / "notes.txt").write_text("not meant")
    (folder / "._one.mp4").write_bytes(b"junk of another system")
    return folder


def run(*words):
    return main([str(word) for word in words])


# ---------------------------------------------------------------------- predict
def test_one_broken_file_does_not_stop_the_others(films, checkpoint, tmp_path, capsys):
    out = tmp_path / "tables"
    code = run(
        "predict", films, "--checkpoint", checkpoint, "-o", out,
        "--plot", tmp_path / "plots", "--annotate", tmp_path / "annotated",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 3
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert written == [
        "annotated/deep/two.mp4", "annotated/one.mp4", "plots/deep/two.png", "plots/one.png",
        "tables/deep/two.csv", "tables/one.csv",
    ]  # fmt: skip
    assert len(read_table(out / "one.csv")) == 12
    assert len(read_table(out / "deep" / "two.csv")) == 9
    assert "2 of 3 videos done; decode" in said.out
    assert "detect" in said.out
    *_, broken, last = said.err.splitlines()
    assert broken.startswith("mmau: not a video")
    assert "broken.mp4" in broken
    assert last == "mmau: 1 of 3 files failed"
    assert f"note: {films / 'deep' / 'two.mp4'}: no sound track" in said.err


def test_processes_write_what_one_process_writes(films, checkpoint, tmp_path, capsys):
    for jobs in (1, 2):
        code = run(
            "predict", films / "one.mp4", films / "deep" / "two.mp4", "--checkpoint", checkpoint,
            "-o", tmp_path / str(jobs), "--jobs", jobs, "--log-json",
        )  # fmt: skip
        assert code == 0
    for name in ("one.csv", "two.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    said = capsys.readouterr()
    assert said.out == ""
    events = [json.loads(line) for line in said.err.splitlines()]
    assert {"time", "event", "message"} <= set(events[0])
    tables = [event["table"] for event in events if event["event"] == "done" and "table" in event]
    assert sorted(tables) == sorted(
        str(tmp_path / jobs / name) for jobs in "12" for name in ("one.csv", "two.csv")
    )
    assert set(events[-1]["stages"]) == {"decode", "detect", "encode", "sound", "temporal"}


def test_a_worker_that_cannot_start_says_why(tmp_path):
    """In a worker process; an executor would only say that it broke."""
    shown = []
    outcomes = run_batch(
        ["first", "second"],
        AUPredictor.from_pretrained,  # which refuses a folder that is not there
        tmp_path / "nowhere",
        processes=2,
        progress=lambda done, total, **numbers: shown.append((done, total)),
    )
    found = {outcome.job: outcome.reason for outcome in outcomes}
    assert set(found) == {"first", "second"}
    assert all("no such folder" in reason and "nowhere" in reason for reason in found.values())
    assert (shown[0], shown[-1]) == ((0, 2), (2, 2))


def test_one_video_says_where_the_time_goes(films, checkpoint, tmp_path, capsys):
    table = tmp_path / "t.csv"
    assert run("predict", films / "one.mp4", "--checkpoint", checkpoint, "-o", table) == 0
    first, stages = capsys.readouterr().out.splitlines()
    assert first == f"{table}: 12 frames, 12 with a face"
    for stage in ("decode", "detect", "encode", "sound", "temporal"):
        assert f"{stage} " in stages
    assert "frames/s" in stages
    assert (
        run("predict", films / "one.mp4", "--checkpoint", checkpoint, "-o", table, "--quiet") == 0
    )
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_face_all_gives_a_column(films, checkpoint, tmp_path):
    table, plot = tmp_path / "t.csv", tmp_path / "t.png"
    code = run(
        "predict", films / "one.mp4", "--checkpoint", checkpoint, "-o", table, "--face", "all",
        "--plot", plot, "--quiet",
    )  # fmt: skip
    assert code == 0
    assert read_table(table).face_id.tolist() == [0] * 12
    assert plot.exists()


def test_what_is_wrong_for_all_is_said_before_the_first(films, checkpoint, tmp_path, capsys):
    start = ("predict", films / "one.mp4", "--checkpoint", checkpoint, "-o", tmp_path / "t.csv")
    both = ("predict", films, "--checkpoint", checkpoint, "-o")
    cases = {
        (*start, "--detector", "mediapip"): "no face detector named 'mediapip'",
        (*start, "--landmarks", "dlip"): "no landmark extractor named 'dlip'",
        (*start, "--detector-option", "path"): "--detector-option takes NAME=VALUE; got 'path'",
        (*start, "--detector-option", "sise=3"): "takes no option 'sise'",
        (*start, "--detector-option", "min_score=3.5"): "`min_score` must be",
        (*start, "--annotate", tmp_path / "t.gif"): "must end in .mp4, .mkv, .mov",
        (*start, "--jobs", "0"): "--jobs",
        (*both, tmp_path / "t.csv"): "names a file; several videos need a folder",
        (*both, tmp_path / "t", "--annotate", films): "would overwrite videos that it reads",
        ("predict", films / "one.mp4", films / "x" / "one.mp4", "--checkpoint", checkpoint,
         "-o", tmp_path / "t"): "share the name 'one'",
        ("predict", tmp_path / "*.mp4", "--checkpoint", checkpoint,
         "-o", tmp_path / "t"): "no file matches",
        (*start[:4], "-o", films / "one.mp4"): "looks like a video",
    }  # fmt: skip
    for words, message in cases.items():
        assert run(*words) == 1, words
        said = capsys.readouterr().err
        assert message in said, said
        assert said.startswith("mmau: ")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_so(films, checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmau.inference.AUTable.write_csv", interrupt)
    code = run("predict", films / "one.mp4", "--checkpoint", checkpoint, "-o", tmp_path / "t.csv")
    assert code == 130
    assert "interrupted; nothing half-written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_of_the_file(films, checkpoint, tmp_path, capsys, monkeypatch):
    import errno

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmau.inference.annotate.FrameCanvas.draw", full)
    code = run(
        "predict", films / "one.mp4", films / "deep", "--checkpoint", checkpoint,
        "-o", tmp_path / "tables", "--annotate", tmp_path / "annotated", "--quiet",
    )  # fmt: skip
    assert code == 3
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*.mp4")] == []


# ---------------------------------------------------------------------- prepare
def test_prepare_lists_what_failed(films, tmp_path, capsys):
    code = run("prepare", films, "-o", tmp_path, "--crop-size", "64")
    said = capsys.readouterr()
    assert code == 3
    assert "2 trials prepared" in said.out
    assert said.err.splitlines()[-1] == "mmau: 1 of 3 files failed"
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")) == [
        "deep/two.safetensors",
        "one.safetensors",
    ]
    code = run("prepare", films / "one.mp4", "-o", tmp_path, "--crop-size", "64")
    assert code == 0
    assert "1 of them before" in capsys.readouterr().out
    assert run("prepare", films / "broken.mp4", "-o", tmp_path, "--crop-size", "64") == 1
    assert "broken.mp4" in capsys.readouterr().err


# ---------------------------------------------------------------------- which videos
def test_files_folders_and_patterns(films, monkeypatch):
    monkeypatch.chdir(films)
    assert [video.name for video in find_videos(["."])] == ["broken", "deep/two", "one"]
    assert [video.name for video in find_videos(["**/*.mp4"])] == ["broken", "two", "one"]
    assert [video.name for video in find_videos(["one.mp4", "one.mp4", "deep"])] == ["one", "two"]
    assert is_single_file(["one.mp4"])
    assert is_single_file(["nowhere.mp4"])
    for several in (["one.mp4", "deep"], ["deep"], ["*.mp4"]):
        assert not is_single_file(several)
    (films / "deep" / "odd[1].mp4").write_bytes(b"x")
    try:
        assert is_single_file(["deep/odd[1].mp4"])
        assert find_videos(["deep/odd[1].mp4"])[0].name == "odd[1]"
    finally:
        (films / "deep" / "odd[1].mp4").unlink()


# ---------------------------------------------------------------------- the rest
def test_bars_appear_after_a_second_and_know_the_rest(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Console().progress("working") as progress:
        progress(0, 100)
        now[0] += 0.5
        progress(10, 100)
        assert capsys.readouterr().err == ""
        now[0] += 1.5
        progress(24, 100)
        line = capsys.readouterr().err
        now[0] += 0.05
        progress(25, 100)  # not every step
        assert capsys.readouterr().err == ""
    assert line.startswith("\rworking:  24%|")
    assert line.endswith("| 24/100 [00:02<00:06, 12.00 frames/s]")
    assert "| 25/100 " in capsys.readouterr().err  # the last state of the bar stays
    with Console(quiet=True).progress("working") as progress:
        progress(0, 100)
        now[0] += 100
        progress(50, 100)
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_a_bar_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Console().progress("working") as progress:
        progress(40, 100)  # done before, by a cache
        for done in range(41, 81):
            now[0] += 0.5
            progress(done, 100)
    bars = [bar for bar in capsys.readouterr().err.strip().split("\r") if bar]
    assert [bar.split("| ")[1] for bar in bars] == [
        "60/100 [00:10<00:20,  2.00 frames/s]",
        "80/100 [00:20<00:10,  2.00 frames/s]",
        "80/100 [00:20<00:10,  2.00 frames/s]",
    ]


def test_a_program_gets_an_event_every_second(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Console(quiet=True, json_lines=True).progress("working") as progress:
        progress(0, 100)
        for done in range(1, 9):
            now[0] += 0.25
            progress(done, 100)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["done"] for event in events] == [4, 8]
    assert events[-1]["rate"] == 4.0
    assert events[-1]["eta_seconds"] == 23.0
    assert {event["event"] for event in events} == {"progress"}
    assert {event["unit"] for event in events} == {"frames"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_scripts_are_valid_and_complete(shell, capsys):
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert script.strip() == completion_script(build_parser(), shell)
    for word in ("predict", "prepare", "evaluate", "doctor", "annotate", "largest"):
        assert word in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mmau pre", {"predict", "prepare"}),
        ("mmau predict --fa", {"--face"}),
        ("mmau predict --face l", {"largest", "left"}),
        ("mmau completion f", {"fish"}),
        ("mmau predict on", {"one.mp4"}),
        ("mmau predict a.mp4 --checkpoint de", {"deep"}),
    ],
)
def test_bash_completes(films, line, expected):
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    script = completion_script(build_parser(), "bash")
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_mmau; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], text=True, check=True, capture_output=True, cwd=films
    )
    assert set(done.stdout.split()) == expected


def test_doctor_reports_the_installation(capsys, tmp_path):
    assert run("doctor") == 0
    said = capsys.readouterr().out
    for word in ("Python", "torch finds", "mediapipe", "torchaudio:", "scan backend:"):
        assert word in said
    assert run("doctor", tmp_path / "nowhere") == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "videos").mkdir()
    assert run("doctor", tmp_path) == 1
    said = capsys.readouterr().out
    assert "error: " in said.split("components")[1]


def test_a_torchaudio_that_does_not_load_is_explained(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "2.11.0")

    def broken(name):
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr("importlib.import_module", broken)
    said = torchaudio_status()
    assert "2.11.0 is installed but does not load (OSError: libcudart.so.13: cannot open" in said
    assert "and more" not in said
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    assert 'pip install "mmau[audio]"' in torchaudio_status()


def test_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "3 ", "130"):
        assert f"  {code}" in said
    for words in (["predict"], ["predict", "a.mp4", "--face", "top"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    np.testing.assert_equal(capsys.readouterr().err.count("usage: mmau"), 3)
