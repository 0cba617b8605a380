"""Kill the recipe or let it fail, give the same command again, and compare everything."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "affwild2_au.py"
STAGES = ("frame_stage", "detector")
COMMAND = (
    "demo", "--data.render.num-train", "4", "--data.render.num-validation", "2",
    "--data.render.clip.num-frames", "40", "--data.clip-frames", "24", "--data.jobs", "1",
    "--data.drop-sound", "0.2", "--frame-stage.epochs", "1", "--optim.epochs", "4",
    "--optim.batch-clips", "3", "--optim.swa-epochs", "2", "--optim.validate-every", "2",
    "--states.every", "2", "--states.keep-when-done", "--no-compare-video-only",
)  # fmt: skip
NO_DROPOUT = ("--model.dropout", "0", "--model.temporal.options.dropout", "0")
# Loaded once, by the server from which every run is forked: a run then costs about a second.
PRELOAD = [
    "torch", "accelerate", "tyro", "tqdm", "peft", "transformers.models.dinov2.modeling_dinov2",
    "mmau.encoders.vision", "mmau.evaluation", "mmau.inference", "mmau.plot", "mmau.synthetic",
    "matplotlib.pyplot",
]  # fmt: skip


class Recipe:
    """Starts, kills and restarts one run of the recipe."""

    def __init__(self, out: Path, *words: str) -> None:
        self.out, self.words = out, (*COMMAND, *words, "--out", str(out))
        self.said = out.with_suffix(".log")

    def start(
        self, num_ranks: int = 1, extra: tuple[str, ...] = (), largest_file: int | None = None
    ) -> list:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if num_ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(num_ranks)}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        ranks = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            job = {
                "said": str(self.said),
                "script": str(RECIPE),
                "words": [*self.words, *extra],
                "environment": {**environment, **place},
                "largest_file": largest_file,
            }
            arguments = {"init_globals": {"JOB": job}}
            process = context.Process(
                target=runpy.run_path, args=(str(HERE / "_recipe_process.py"),), kwargs=arguments
            )
            process.start()
            ranks.append(process)
        return ranks

    def finish(self, num_ranks: int = 1) -> None:
        ranks = self.start(num_ranks)
        for process in ranks:
            process.join(120)
        assert [p.exitcode for p in ranks] == [0] * num_ranks, self.said.read_text()[-3000:]

    def fail(self, *extra: str, num_ranks: int = 1, largest_file: int | None = None) -> str:
        """Run to an expected error message, and return what was said."""
        before = len(self.said.read_text()) if self.said.exists() else 0
        ranks = self.start(num_ranks, extra, largest_file)
        for process in ranks:
            process.join(120)
        said = self.said.read_text()[before:]
        assert [p.exitcode for p in ranks] == [1] * num_ranks, said[-3000:]
        assert "Traceback" not in said
        return said

    def kill_after(self, lines: int, num_ranks: int = 1, extra: tuple[str, ...] = ()) -> None:
        """Kill all ranks at whatever they do when that many steps are in the logs."""
        ranks = self.start(num_ranks, extra)
        deadline = time.monotonic() + 120
        while len(self.records()) < lines:
            assert all(p.is_alive() for p in ranks), self.said.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()

    def records(self) -> list[str]:
        files = [self.out / stage / "metrics.jsonl" for stage in STAGES]
        return [line for f in files if f.exists() for line in f.read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "checkpoint" / "model.safetensors")

    def last_state(self, stage: str) -> dict:
        newest = max((self.out / stage / "states").glob("*.pt"))
        state = torch.load(newest)["state"]
        del state["counters"]["seconds"]
        return state


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An uninterrupted run in one process, whose videos the others share."""
    folder = tmp_path_factory.mktemp("resume")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run = Recipe(folder / "whole")
    run.finish()
    return run


def another(prepared: Recipe, name: str, *words: str) -> Recipe:
    out = prepared.out.with_name(name)
    shutil.copytree(prepared.out / "data", out / "data")  # keeps the times of the files
    return Recipe(out, "--data.prepared", str(prepared.out / "prepared"), *words)


def assert_same(first: Recipe, second: Recipe) -> None:
    assert first.records() == second.records()
    assert_equal(first.weights(), second.weights())
    for stage in STAGES:
        assert_equal(first.last_state(stage), second.last_state(stage))


def assert_equal(a, b, where="") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_killed_in_every_stage_with_workers_and_without(prepared):
    """Weights, averages, losses, learning rates and the order of the data, bit for bit."""
    total = len(prepared.records())
    run = another(prepared, "killed")
    run.kill_after(1)
    run.kill_after(total // 2, extra=("--data.workers", "2"))
    run.kill_after(total - 1)  # one average is taken, the other not
    run.finish()
    assert_same(prepared, run)
    assert "resumes from step" in run.said.read_text()


def test_two_processes_killed_equal_two_that_were_not(prepared):
    whole, killed = (another(prepared, name) for name in ("two", "two-killed"))
    whole.finish(2)
    killed.kill_after(len(whole.records()) // 2, 2)
    killed.finish(2)
    assert_same(whole, killed)


def test_another_number_of_processes_keeps_the_order_and_rounds_differently(prepared):
    one, both = (another(prepared, name, *NO_DROPOUT) for name in ("one", "both"))
    one.finish()
    both.kill_after(len(one.records()) // 2, 2)
    both.finish(1)
    pairs = zip(one.records(), both.records(), strict=True)
    for mine, theirs in (map(json.loads, pair) for pair in pairs):
        assert mine["items"] == theirs["items"]
        assert mine["lr"] == theirs["lr"]
        # Adam divides by the size of the gradient, so rounding grows where gradients are small.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_full_disk_loses_nothing(prepared):
    run = another(prepared, "full")
    said = run.fail(largest_file=100_000)
    assert "the state of step 2 could not be written to" in said
    assert "File too large" in said
    assert not list(run.out.rglob("*.partial*"))
    run.finish()
    assert_same(prepared, run)


def test_a_loss_that_is_not_finite_stops_with_step_clips_and_the_last_good_state(prepared):
    run = another(prepared, "wild", "--row", "hga", "--optim.lr", "1e38")
    said = run.fail()
    assert re.search(
        r"the (loss|norm of the gradient) is (nan|inf) at step \d+ \(epoch \d\) of detector, on "
        r"train_000\d frames \d+-\d+, .*The last good state: ",
        said,
    )
    step = int(re.search(r"at step (\d+)", said)[1])
    state = max((run.out / "detector" / "states").glob("*.pt"), default=None)
    if state is not None:
        assert int(state.stem[5:]) < step
        weights = torch.load(state)["state"]["model"]
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_what_cannot_start_says_why_and_touches_nothing(prepared):
    before = sorted(prepared.out.rglob("*"))
    said = prepared.fail("--optim.lr", "1e-4", "--data.jobs", "2")
    assert "holds a run with other settings (optim.lr: 0.003 there, 0.0001 here)" in said
    assert "Give another --out, or delete that folder to start over" in said
    said = prepared.fail("--optim.batch-clips", "1", num_ranks=2)
    assert "--optim.batch-clips 1 cannot be shared by 2 processes" in said
    assert sorted(prepared.out.rglob("*")) == before
    run = another(prepared, "few", "--data.clip-frames", "200", "--optim.batch-clips", "9")
    said = run.fail(num_ranks=5)
    assert "5 processes cannot share 4 training clips; start at most 4" in said


def test_a_damaged_state_is_named(prepared):
    run = another(prepared, "damaged")
    run.kill_after(len(prepared.records()) // 2)
    newest = max((run.out / "frame_stage" / "states").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert f"{newest.name} is damaged" in run.fail()
    newest.unlink()
    run.finish()
    assert_same(prepared, run)


def test_half_precision_pieces_constant_rate_and_early_stopping(prepared):
    run = another(
        prepared, "options", "--optim.precision", "bf16", "--optim.accumulate", "2",
        "--optim.swa-lr", "1e-3", "--optim.validate-every", "1", "--optim.patience", "1",
        "--optim.epochs", "30", "--optim.warmup-epochs", "0", "--optim.lr", "0.05",
        "--optim.swa-epochs", "29", "--tensorboard",
    )  # fmt: skip
    run.finish()
    steps = [json.loads(line) for line in run.records()]
    scores = [step["f1"] for step in steps if "f1" in step]
    assert len(scores) < 30  # it stopped, at the first score that was no gain
    assert scores[-1] <= max(scores[:-1])
    assert all(b > a for a, b in pairwise(scores[:-1]))
    rates = [step["lr"]["new"] for step in steps if "new" in step["lr"]][-len(scores) :]
    assert rates[-1] == pytest.approx(1e-3)
    assert list((run.out / "detector").glob("events.out.tfevents.*"))
    best = load_file(run.out / "detector" / "best" / "model.safetensors")
    assert best.keys() == run.weights().keys()
