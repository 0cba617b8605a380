"""The record of thresholds and smoothing: applied as it says, saved, loaded, refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import Calibration, smooth

FULL = Calibration(
    ("AU1", "AU2"),
    (0.25, 0.75),
    (0.0, 1.5),
    "40 clips",
    smoothing_kind="exponential",
    smoothing_unit="frames",
    max_gap=0.3,
    probability="posterior",
    posterior_options={
        "gamma_pos": 1,
        "gamma_neg": [2.0, 4.0],
        "margin": 0.05,
        "pos_weight": 2.0,
        "detach_focus": True,
    },
)


def test_every_field_survives_the_file(tmp_path):
    FULL.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == FULL
    assert loaded.posterior_options["gamma_neg"] == (2.0, 4.0)
    assert loaded.posterior_options["detach_focus"] is True
    assert hash(loaded) == hash(FULL)
    assert json.loads((tmp_path / "calibration.json").read_text())["format"].endswith("/2")


def test_a_file_of_the_first_format_still_loads(tmp_path):
    old = {
        "format": "mmau.calibration/1",
        "au_names": ["AU1", "AU2"],
        "thresholds": [0.5, 0.25],
        "smoothing": [],
        "note": "old",
    }
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(old))
    loaded = Calibration.load(path)
    assert loaded == Calibration(("AU1", "AU2"), (0.5, 0.25), (), "old")
    assert (loaded.probability, loaded.smoothing_kind) == ("raw", "mean")
    loaded.save(path)
    assert Calibration.load(path) == loaded


NEW = {
    "format": "mmau.calibration/2",
    "au_names": ["AU1"],
    "thresholds": [0.5],
    "smoothing": [],
    "note": "",
    "smoothing_kind": "mean",
    "smoothing_unit": "seconds",
    "max_gap": 0.5,
    "probability": "raw",
    "posterior_options": {},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mmau.calibration/9"}, r"has the format 'mmau.calibration/9'; .* Upgrade mmau"),
        ({"format": 2}, 'is not a calibration: it has no "format"'),
        (
            {"format": "mmau.calibration/1"},
            "unknown key 'smoothing_kind'; did you mean 'smoothing'",
        ),
        ({"thresholds": [True]}, "'thresholds' must be a list of numbers; got"),
        ({"max_gap": "0.5"}, "'max_gap' must be a number; got '0.5'"),
        ({"max_gap": 0}, "`max_gap` must be in"),
        ({"smoothing_kind": 3}, "'smoothing_kind' must be text; got 3"),
        ({"smoothing_kind": "mode"}, "`smoothing_kind` must be one of 'mean', 'median'"),
        ({"smoothing_unit": "ms"}, "`smoothing_unit` must be one of 'seconds', 'frames'"),
        ({"smoothing": [2], "smoothing_unit": "frames"}, "`smoothing` in frames must be an odd"),
        ({"probability": "logit"}, "`probability` must be one of 'raw', 'posterior'"),
        ({"posterior_options": []}, "'posterior_options' must be names with numbers"),
        ({"posterior_options": {"margin": "0"}}, "'posterior_options' must be names with numbers"),
        (
            {"posterior_options": {"margin": 0.1}},
            "describe a posterior, but `probability` is 'raw'",
        ),
    ],
)
def test_bad_files_are_refused_with_their_path(tmp_path, changes, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**NEW, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, "`posterior_options` must be one of 'gamma_pos'.*; got 'gamma'"),
        ({"margin": 1.0}, r"`margin` must be in \[0.0, 1.0\)"),
        ({"gamma_neg": (1.0, 2.0)}, "must hold one number or 12 for gamma_neg; got 2"),
        ({"gamma_neg": True}, "true or false for detach_focus and numbers for the others"),
        ({"detach_focus": 1.0}, "true or false for detach_focus"),
    ],
)
def test_bad_posterior_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Calibration(probability="posterior", posterior_options=options)


@given(seed=st.integers(0, 1000))
def test_applying_is_smoothing_then_deciding(seed):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(20, 2, generator=generator)
    times = torch.arange(20) / 25
    valid = torch.rand(20, generator=generator) < 0.8
    calibration = Calibration(("AU1", "AU2"), (0.4, 0.6), (0.0, 0.3), smoothing_kind="median")
    found = calibration.apply(prob, times, valid)
    assert torch.equal(found.prob, smooth(prob, times, (0.0, 0.3), kind="median", valid=valid))
    assert torch.equal(found.prob[:, 0], prob[:, 0])
    assert torch.equal(found.active, calibration.decide(found.prob))
    assert torch.equal(found.active, found.prob.double() >= torch.tensor([0.4, 0.6]).double())


def test_no_smoothing_gives_a_copy():
    prob = torch.rand(4, 12)
    calibration = Calibration()
    same = calibration.smooth(prob, torch.arange(4.0))
    assert torch.equal(same, prob)
    same += 1
    assert float(prob.max()) <= 1
    assert not calibration.smooths
    assert calibration.is_causal


def test_a_stream_gets_a_smoother_only_if_nothing_looks_ahead():
    assert FULL.is_causal
    prob, times = torch.rand(9, 2), torch.arange(9) / 30
    whole, smoother = FULL.smooth(prob, times), FULL.smoother()
    for i in range(9):
        assert_close(smoother.step(prob[i], float(times[i])), whole[i])
    ahead = Calibration(("AU1",), (0.5,), (1.0,))
    assert not ahead.is_causal
    with pytest.raises(ValueError, match="a mean looks ahead, so a stream cannot be smoothed"):
        ahead.smoother()
    plain = Calibration(("AU1",), (0.5,)).smoother()
    assert plain.step(torch.tensor([0.3]), 0.0).item() == pytest.approx(0.3)


def test_saved_and_loaded_is_equal_and_leaves_no_other_file(tmp_path):
    calibration = Calibration(("AU1", "AU2"), (0.25, 0.1 + 0.2), (0.0, 1.5), note="40 clips")
    path = tmp_path / "calibration.json"
    calibration.save(path)
    calibration.save(str(path))
    assert Calibration.load(path) == calibration
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    Calibration().save(path)
    before = path.read_text()

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        Calibration(note="new").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_decisions_compare_with_the_thresholds_of_their_column():
    calibration = Calibration(thresholds=[i / 12 for i in range(12)])
    decided = calibration.decide(torch.full((3, 12), 0.5))
    assert decided.tolist() == [[i / 12 <= 0.5 for i in range(12)]] * 3
    assert not calibration.decide(torch.full((12,), float("nan"))).any()


GOOD = {
    "format": "mmau.calibration/1",
    "au_names": ["AU1"],
    "thresholds": [0.5],
    "smoothing": [],
    "note": "",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a calibration"),
        ('{"format": "other"}', 'is not a calibration: it has no "format"'),
        (json.dumps({**GOOD, "treshold": 1}), "unknown key 'treshold'; did you mean 'thresholds'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "note"}), "lacks the key 'note'"),
        (
            json.dumps({**GOOD, "thresholds": 0.5}),
            "'thresholds' must be a list of numbers; got 0.5",
        ),
        (json.dumps({**GOOD, "thresholds": [2]}), r"json: `thresholds` must be in \[0, 1\]; got 2"),
        (json.dumps({**GOOD, "thresholds": [0.5, 0.5]}), "`thresholds` must be 1 numbers; got 2"),
        (json.dumps({**GOOD, "note": 3}), "'note' must be text"),
    ],
)
def test_bad_files_of_the_first_format_are_refused(tmp_path, text, message):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such calibration file: .*nothing\.json"):
        Calibration.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Calibration(("AU1", "AU1"), (0.5, 0.5)), "`au_names` must be at least one name"),
        (
            lambda: Calibration(("AU1",), (0.5,), (1.0, 2.0)),
            "`smoothing` must be 1 windows or none",
        ),
        (lambda: Calibration(("AU1",), (0.5,), (-1.0,)), "`smoothing` must be in"),
        (lambda: Calibration().decide(torch.ones(3)), "axis `c` of `prob` must be 12"),
        (
            lambda: Calibration(probability="posterior").probability_of(torch.ones(12)),
            "does not say under which loss: `posterior_options` is empty",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
