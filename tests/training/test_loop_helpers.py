"""The small parts of the loop: log, best score, seeds, settings, finite numbers, learning rates."""

import json
import random

import numpy as np
import pytest
import torch

from mmau.progress import progress_bar
from mmau.training import (
    BestSoFar,
    MetricsLog,
    NotFiniteError,
    check_finite,
    differing_settings,
    seed_everything,
    set_learning_rates,
)
from mmau.training.log import read_metrics


def draws():
    return (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002


def test_seeds_depend_on_every_number_and_on_nothing_before():
    seen = set()
    for numbers in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        seed_everything(*numbers)
        first = draws()
        draws()
        seed_everything(*numbers)
        assert draws() == first
        seen |= set(first)
    assert len(seen) == 12
    with pytest.raises(ValueError, match="at least one number"):
        seed_everything()
    with pytest.raises(ValueError, match="`numbers`"):
        seed_everything(0, -1)


def test_a_resumed_log_has_no_gap_no_repeat_and_no_half_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 3})
    whole = path.read_text()
    path.write_text(whole + '{"step": 6, "lo')  # what a kill leaves
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsLog(path, step=3) as log:
        for step in (4, 5):
            log.write({"step": step, "loss": step / 3})
    assert path.read_text() == whole
    with MetricsLog(path, active=False) as log:  # another process than the first
        log.write({"step": 9})
    assert path.read_text() == whole
    with MetricsLog(path) as log, pytest.raises(ValueError, match="must hold 'step'; got loss"):
        log.write({"loss": 1.0})
    assert read_metrics(tmp_path / "absent") == []


def test_best_so_far_survives_a_restart_and_a_nan():
    best = BestSoFar(patience=3)
    assert best.update(0.5)
    assert not best.update(float("nan"))
    again = BestSoFar(patience=3)
    again.load_state_dict(best.state_dict())
    assert [again.update(0.4), again.exhausted, again.update(0.5), again.exhausted] == [
        False, False, False, True,
    ]  # fmt: skip
    assert not BestSoFar().exhausted
    with pytest.raises(ValueError, match=r"`patience` must be in \[1, inf\); got 0"):
        BestSoFar(patience=0)


def test_differing_settings(tmp_path):
    record = tmp_path / "config.json"
    assert differing_settings(record, {"a": 1}) == []
    record.write_text(json.dumps({"a": {"b": [1, 2], "c": 1}, "gone": None, "e": {}}))
    assert differing_settings(record, {"a": {"b": (1, 2), "c": 1}, "gone": None, "e": {}}) == []
    assert differing_settings(record, {"a": {"b": (1, 3), "c": 2}, "new": "x", "e": {}}) == [
        "a.b: [1, 2] there, [1, 3] here",
        "a.c: 1 there, 2 here",
        "gone: null there, nothing here",
        'new: nothing there, "x" here',
    ]
    assert differing_settings(record, {"e": {}}, ignore=["a", "gone"]) == []
    record.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        differing_settings(record, {})
    record.write_text("[]")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        differing_settings(record, {})


def test_not_finite_is_named():
    check_finite("step 1", loss=0.0, gradient=1e30)
    with pytest.raises(NotFiniteError, match="the norm of the gradient is inf at step 7, on a"):
        check_finite("step 7, on a", loss=0.0, norm_of_the_gradient=float("inf"))


def test_learning_rates_follow_the_step_alone():
    weights = [torch.zeros(1), torch.zeros(1)]
    groups = [{"params": weights[:1], "lr": 0.2, "name": "new"}, {"params": weights[1:], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25):
        rates = set_learning_rates(optimizer, factor)
    assert rates == {"new": 0.05, "1": 0.025}
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]
    restored = torch.optim.SGD(groups)
    restored.load_state_dict(optimizer.state_dict())
    assert set_learning_rates(restored, 1.0) == {"new": 0.2, "1": 0.1}
    with pytest.raises(ValueError, match="`factor`"):
        set_learning_rates(optimizer, -1.0)


def test_bar_shows_loss_score_and_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar("train", unit="steps") as progress:
        progress(2, 4)
        now[0] += 20
        progress(3, 4, loss=0.123456, f1=None)
        first = capsys.readouterr().err
        progress(4, 4, loss=0.1, f1=0.5)
    assert "3/4 [00:20<00:20" in first  # the steps of an earlier process took no time of this one
    assert "loss=0.123" in first
    assert "f1" not in first
    said = capsys.readouterr().err
    assert "4/4" in said
    assert "loss=0.1" in said
    assert "f1=0.5" in said


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "metrics.jsonl", step=4, tensorboard=True) as log:
        log.write({"step": 5, "epoch": 0, "loss": 0.5, "lr": {"new": 0.1}, "items": [1, 2]})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr/new"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
