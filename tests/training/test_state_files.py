"""States on disk are complete or absent, whatever happens while they are written."""

import errno
import os

import pytest
import torch
from torch import nn

from mmau.training import Resumable, StateFileError, StateFiles
from mmau.training.state import restore_tensors, trainable_tensors


@pytest.fixture
def states(tmp_path):
    states = StateFiles(tmp_path / "states", keep=2)
    states.save(10, {"weight": torch.arange(3.0)})
    return states


def partial_of(states, step):
    return states.folder / f".step-{step:08d}.{os.getpid()}.partial.pt"


def test_the_newest_is_loaded_and_old_ones_go(states):
    for step in (20, 99_999_999, 123_456_789):
        states.save(step, {"weight": torch.tensor(float(step))})
    assert [p.name for p in states.paths()] == ["step-99999999.pt", "step-123456789.pt"]
    step, state = states.load()
    assert step == 123_456_789
    assert state["weight"] == 123_456_789.0


def test_a_full_disk_is_a_sentence_and_the_state_before_it_stays(states):
    partial_of(states, 20).symlink_to("/dev/full")  # writing there fails with ENOSPC, for real
    with pytest.raises(
        StateFileError,
        match=r"the state of step 20 could not be written to .*No space left on device.*"
        r"the run can resume from .*step-00000010\.pt",
    ) as caught:
        states.save(20, {"weight": torch.zeros(100_000)})
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert [p.name for p in states.folder.iterdir()] == ["step-00000010.pt"]
    assert states.load()[0] == 10


def test_what_a_kill_left_behind_is_no_state_and_is_removed_later(states):
    left = states.folder / ".step-00000015.999999.partial.pt"
    left.write_bytes(b"half of a state")
    assert states.newest().name == "step-00000010.pt"
    states.save(20, {})
    assert not left.exists()


def test_damage_is_named(states):
    path = states.newest()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(StateFileError, match=r"step-00000010\.pt is damaged .* delete it"):
            states.load()
    torch.save({"something": "else"}, path)
    with pytest.raises(StateFileError, match="is not a training state of mmau"):
        states.load()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no training state in"):
        states.load()


def test_a_state_cannot_run_code(states):
    class Evil:
        def __reduce__(self):
            return (os.system, ("echo ran",))

    path = states.folder / "step-00000030.pt"
    torch.save({"format": "mmau.training-state", "step": 30, "state": Evil()}, path)
    with pytest.raises(StateFileError, match="is damaged"):
        states.load()


def test_clear_removes_states_and_nothing_else(states):
    (states.folder / "notes.txt").write_text("mine")
    states.clear()
    assert [p.name for p in states.folder.iterdir()] == ["notes.txt"]
    StateFiles(states.folder / "nowhere").clear()


def test_frozen_weights_are_not_saved_and_a_wrong_state_touches_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert set(trainable_tensors(model)) == {"1.weight", "1.bias"}
    before = model[1].weight.clone()
    for change, words in (
        ({"1.bias": None}, "'1.bias' is missing"),
        ({"0.bias": torch.zeros(2)}, "'0.bias' has no place in it"),
        ({"1.weight": torch.zeros(2, 2)}, r"'1.weight' has shape \(2, 2\), not \(1, 2\)"),
    ):
        saved = {"1.weight": torch.zeros(1, 2), "1.bias": torch.zeros(1), **change}
        saved = {name: value for name, value in saved.items() if value is not None}
        with pytest.raises(ValueError, match=f"does not fit Sequential: {words}"):
            restore_tensors(model, saved)
    assert torch.equal(model[1].weight, before)


def test_statistics_of_a_trainable_norm_are_saved():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).requires_grad_(False)
    model[1].requires_grad_(True)
    statistics = {"1.num_batches_tracked", "1.running_mean", "1.running_var"}
    assert set(trainable_tensors(model)) == {"1.bias", "1.weight"} | statistics


def test_resumable_refuses_the_state_of_another_run(tmp_path):
    def run(width, **parts):
        model = nn.Linear(width, 1)
        parts["optimizer"] = torch.optim.AdamW(model.parameters())
        return Resumable(StateFiles(tmp_path), model, parts)

    run(2).save(5, {})
    with pytest.raises(StateFileError, match=r"step-00000005\.pt is of another run: .* \(1, 2\)"):
        run(3).resume()
    scaler = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(StateFileError, match="the state of optimizer; this run has optimizer, sc"):
        run(2, scaler=scaler).resume()


def test_half_steps_equal_whole_ones(tmp_path):
    """Saving and restoring in the middle changes nothing, to the bit."""

    def trained(stop_at):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        for first, last in ((0, stop_at), (stop_at, 6)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            run = Resumable(StateFiles(tmp_path / str(stop_at)), model, {"optimizer": optimizer})
            assert run.resume()[0] == first
            for step in range(first, last):
                torch.manual_seed(step)
                optimizer.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
            if first == 0:
                run.save(last, {})
                model = nn.Linear(3, 1)  # a new process has other weights until it restores
        return model.weight.detach()

    assert torch.equal(trained(2), trained(5))
