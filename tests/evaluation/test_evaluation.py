"""The report is what other code computes; nothing is chosen on what it scores."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.testing import assert_close

from mmau.evaluation import (
    AUCounts,
    BootstrapOptions,
    FitOptions,
    ScoredTrial,
    bootstrap_by_video,
    compare_reports,
    evaluate_trials,
    fit_calibration,
)
from mmau.evaluation.thresholds import CrossValidation
from mmau.modules.losses import AsymmetricLoss

NAMES = ("AU1", "AU2", "AU4")
ROWS = (
    "raw at 0.5",
    "posterior at 0.5",
    "cross-validated thresholds",
    "cross-validated thresholds + smoothing",
)
LOSS = AsymmetricLoss()
OPTIONS = {"gamma_pos": 1.0, "gamma_neg": 4.0, "margin": 0.05}


FEW = BootstrapOptions(num_resamples=100)


def make_trials(count=8, seed=0, skill=2.0, hidden=True, frames=120):
    generator = torch.Generator().manual_seed(seed)
    trials = []
    for i in range(count):
        labels = ((torch.arange(frames)[:, None] // 15 + torch.arange(3) + i) % 4 == 0).to(
            torch.int8
        )
        noise = torch.randn(frames, 3, generator=generator)
        logits = skill * (2 * labels - 1) - 1 + 2 * noise
        labels[torch.rand(frames, 3, generator=generator) < 0.1] = -1
        seen = torch.rand(frames, generator=generator) < (0.7 if hidden else 2)
        times = torch.arange(frames, dtype=torch.float64) / 25
        trials.append(ScoredTrial(f"t{i}", f"v{i // 2}", logits, labels, times, seen))
    return trials


def pooled_mean_f1(decisions, trials, subset):
    """The official metric by sklearn, over all labelled frames of a subset."""
    scores = []
    for c in range(3):
        target, predicted = [], []
        for trial in trials:
            keep = trial.labels[:, c] >= 0
            if subset != "all":
                keep &= trial.seen if subset == "seen" else ~trial.seen
            target.append(trial.labels[keep, c])
            predicted.append(decisions[trial.name][keep, c])
        scores.append(f1_score(torch.cat(target), torch.cat(predicted)))
    return np.mean(scores)


def test_every_row_is_the_pooled_metric_of_its_decisions():
    trials = make_trials()
    report = evaluate_trials(trials, au_names=NAMES, posterior=LOSS.posterior, bootstrap=FEW)
    assert tuple(row.name for row in report.rows) == ROWS
    assert report.subsets == ("all", "seen", "hidden")
    assert (report.num_trials, report.num_videos) == (8, 4)
    raw = {t.name: torch.sigmoid(t.logits) for t in trials}
    meant = {t.name: LOSS.posterior(t.logits) for t in trials}
    labels = {t.name: t.labels for t in trials}
    times = {t.name: t.timestamps for t in trials}
    groups = {t.name: t.group for t in trials}
    plain, smoothed = (
        CrossValidation(meant, labels, times, groups, FitOptions(smoothing=smoothing)).held_out()
        for smoothing in (False, True)
    )
    decided = {
        ROWS[0]: {n: p >= 0.5 for n, p in raw.items()},
        ROWS[1]: {n: p >= 0.5 for n, p in meant.items()},
        ROWS[2]: {n: one.decisions for n, one in plain.items()},
        ROWS[3]: {n: one.decisions for n, one in smoothed.items()},
    }
    for row, subset in itertools.product(report.rows, report.subsets):
        score = row.scores[subset]
        assert score.estimate == pytest.approx(
            pooled_mean_f1(decided[row.name], trials, subset), abs=1e-12
        )
        assert score.low <= score.estimate <= score.high
    for name, gain in report.delta_f1.items():
        difference = report.row(name).scores["all"].estimate - report.rows[0].scores["all"].estimate
        assert gain.estimate == pytest.approx(difference)
    assert not torch.equal(
        *(report.row(name).pooled("all").counts for name in ("raw at 0.5", "posterior at 0.5"))
    )


def test_intervals_resample_groups_not_trials():
    trials = make_trials()
    options = BootstrapOptions(200, seed=5)
    report = evaluate_trials(
        trials, au_names=NAMES, options=FitOptions(smoothing=False), bootstrap=options
    )
    counts = {}
    for trial in trials:
        one = counts.setdefault(trial.group, AUCounts(NAMES))
        one.update(torch.sigmoid(trial.logits), trial.labels)
    expected = bootstrap_by_video(counts, options)
    assert report.rows[0].scores["all"] == expected
    assert expected.num_videos == 4
    assert len(report.rows) == 2


def test_options_reach_what_they_name():
    trials = make_trials()
    base = {"au_names": NAMES, "bootstrap": FEW}
    default = evaluate_trials(trials, **base, posterior=LOSS.posterior)
    raw = evaluate_trials(trials, **base, options=FitOptions(windows=[0.0]))
    assert raw.row(ROWS[2]).pooled().counts.tolist() == raw.row(ROWS[3]).pooled().counts.tolist()
    assert default.row(ROWS[3]).pooled().mean_f1() > raw.row(ROWS[3]).pooled().mean_f1() + 0.02
    unshrunk, strong = (
        evaluate_trials(
            trials, **base, posterior=LOSS.posterior, options=FitOptions(shrinkage=shrinkage)
        )
        for shrinkage in (0.0, 1e9)
    )
    assert (
        strong.row(ROWS[2]).pooled().counts.tolist() == strong.row(ROWS[1]).pooled().counts.tolist()
    )
    assert (
        unshrunk.row(ROWS[2]).pooled().counts.tolist()
        != strong.row(ROWS[2]).pooled().counts.tolist()
    )


def test_a_trial_is_never_decided_with_what_was_chosen_on_it():
    """Turn the labels of one video round: its own decisions stay, through the whole evaluation."""
    trials = make_trials()
    turned = [
        replace(t, labels=(1 - t.labels).clamp(max=1).to(torch.int8)) if t.group == "v0" else t
        for t in trials
    ]

    def predicted(some):
        report = evaluate_trials(some, au_names=NAMES, bootstrap=FEW)
        return [row.counts["all"]["v0"].counts[:, :2].sum(-1) for row in report.rows[1:]]

    def without_gaps(some):
        return [replace(t, labels=t.labels.clamp(min=0)) for t in some]

    # Predicted positives do not depend on labels, once every frame is labelled.
    for before, after in zip(
        predicted(without_gaps(trials)), predicted(without_gaps(turned)), strict=True
    ):
        assert torch.equal(before, after)


def test_render_and_dict_tell_the_same_and_everything():
    trials = make_trials()
    report = evaluate_trials(trials, au_names=NAMES, posterior=LOSS.posterior, bootstrap=FEW)
    text, record = report.render(), report.as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record["mean_f1"]) == list(ROWS)
    for name in ROWS:
        for subset in report.subsets:
            interval = record["mean_f1"][name][subset]
            cell = f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
            assert cell in text
    for name in NAMES:
        entry = record["per_au"][name]
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        for score in (*entry["f1"].values(), entry["baseline"], entry["average_precision"]):
            assert f"{score:.3f}" in line
        assert f"[{entry['interval']['low']:.3f}, {entry['interval']['high']:.3f}]" in line
    for subset in report.subsets:
        assert f"{record['baselines'][subset]['all_ones']:.3f}" in text
        assert f"{record['mean_average_precision'][subset]:.3f}" in text
    assert record["delta_f1"].keys() == set(ROWS[1:])
    assert "calibration error, posterior" in text
    assert all(len(line) <= 110 for line in text.splitlines())
    mean = np.mean([entry["f1"][ROWS[0]] for entry in record["per_au"].values()])
    assert mean == pytest.approx(record["mean_f1"][ROWS[0]]["all"]["estimate"])


def test_an_action_unit_without_positives_is_named_and_not_averaged():
    trials = [
        replace(t, labels=(t.labels.clamp(min=0) * torch.tensor([1, 0, 1])).to(torch.int8))
        for t in make_trials()
    ]
    report = evaluate_trials(trials, au_names=NAMES, bootstrap=FEW)
    assert "no positive label, so no F1 and not in the mean: AU2" in report.render()
    record = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert record["per_au"]["AU2"]["f1"][ROWS[0]] is None
    assert record["per_au"]["AU2"]["positives"] == 0
    assert record["per_au"]["AU2"]["labelled"] == sum(len(t.labels) for t in trials)
    known = [record["per_au"][name]["f1"][ROWS[0]] for name in ("AU1", "AU4")]
    assert record["mean_f1"][ROWS[0]]["all"]["estimate"] == pytest.approx(np.mean(known))


def test_columns_appear_only_where_they_say_something():
    every_face = make_trials(hidden=False)
    assert evaluate_trials(every_face, au_names=NAMES, bootstrap=FEW).subsets == ("all",)
    unknown = [replace(t, seen=None) for t in every_face]
    assert evaluate_trials(unknown, au_names=NAMES, bootstrap=FEW).subsets == ("all",)
    no_face = [replace(t, seen=torch.zeros_like(t.seen)) for t in every_face]
    assert evaluate_trials(no_face, au_names=NAMES, bootstrap=FEW).subsets == ("all", "hidden")


def test_one_video_has_a_score_but_neither_interval_nor_cross_validation():
    report = evaluate_trials(make_trials(2), au_names=NAMES)
    assert [row.name for row in report.rows] == ["raw at 0.5"]
    assert np.isnan(report.rows[0].scores["all"].low)
    text = report.render()
    assert "all trials are of one video" in text
    assert "nan" not in text
    json.dumps(report.as_dict(), allow_nan=False)
    with pytest.raises(LookupError, match=r"no row named 'smoothed'\. This report has 'raw"):
        report.row("smoothed")


# ------------------------------------------------------------------------------------- comparison
def compare(first, second, resamples=100, **options):
    bootstrap = BootstrapOptions(resamples)
    reports = [
        evaluate_trials(trials, au_names=NAMES, bootstrap=bootstrap) for trials in (first, second)
    ]
    return compare_reports(*reports, **options)


def test_a_comparison_is_paired_antisymmetric_and_zero_with_itself():
    good, bad = make_trials(skill=2.0), make_trials(skill=1.5)
    there, back = compare(good, bad, 200), compare(bad, good, 200)
    for row, subset in itertools.product(there.rows, ("all", "seen", "hidden")):
        one, other = there.rows[row][subset], back.rows[row][subset]
        assert one.estimate > 0
        assert one.estimate == pytest.approx(-other.estimate)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    same = compare(good, good, 200)
    assert all(s.low == s.high == 0 for row in same.rows.values() for s in row.values())
    assert same.mean_average_precision["all"] == 0
    record = there.as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    text = compare(good, bad, 200, names=("with sound", "without")).render()
    assert "Delta mean F1: with sound - without" in text
    assert "95 % CI, bootstrap of 4 videos, the same for both" in text


def test_two_losses_have_two_posteriors():
    trials = make_trials()
    found = compare_reports(
        *(
            evaluate_trials(trials, au_names=NAMES, posterior=posterior, bootstrap=FEW)
            for posterior in (LOSS.posterior, torch.sigmoid)
        )
    )
    assert found.rows["raw at 0.5"]["all"].estimate == 0
    assert found.rows["posterior at 0.5"]["all"].estimate != 0


# -------------------------------------------------------------------------------------------- fit
def test_the_shipped_calibration_is_what_its_record_says():
    trials = make_trials()
    raw = fit_calibration(trials, au_names=NAMES)
    assert raw.probability == "raw"
    assert raw.note == "chosen on 8 trials of 4 videos"
    meant = fit_calibration(
        trials, au_names=NAMES, posterior=LOSS.posterior, posterior_options=OPTIONS, note="these"
    )
    assert (meant.probability, meant.note) == ("posterior", "these")
    assert dict(meant.posterior_options) == OPTIONS
    assert meant.smooths
    # On its own trials it scores at least what the cross-validated row does: that is the optimism.
    report = evaluate_trials(trials, au_names=NAMES, posterior=LOSS.posterior, bootstrap=FEW)
    counts = AUCounts(NAMES)
    for trial in trials:
        active = meant.apply(LOSS.posterior(trial.logits), trial.timestamps).active
        counts.update(active, trial.labels)
    assert counts.mean_f1() >= report.row(ROWS[3]).pooled().mean_f1() - 0.005
    assert counts.mean_f1() > report.row(ROWS[0]).pooled().mean_f1() + 0.05


def test_the_fit_takes_the_options_of_the_loss_and_checks_them():
    trials = make_trials(4)

    class Known(AsymmetricLoss):
        posterior_options = OPTIONS

    fitted = fit_calibration(trials, au_names=NAMES, posterior=Known().posterior)
    assert dict(fitted.posterior_options) == OPTIONS
    per_unit = AsymmetricLoss(gamma_neg=[1.0, 2.0, 4.0])
    fitted = fit_calibration(
        trials,
        au_names=NAMES,
        posterior=per_unit.posterior,
        posterior_options={**OPTIONS, "gamma_neg": per_unit.gamma_neg},
    )
    assert fitted.posterior_options["gamma_neg"] == (1.0, 2.0, 4.0)
    assert (
        fit_calibration(trials, au_names=NAMES, options=FitOptions(smoothing=False)).smoothing == ()
    )
    exponential = FitOptions(smoothing_kind="exponential", windows=[0.2])
    causal = fit_calibration(trials, au_names=NAMES, options=exponential)
    assert causal.is_causal
    assert causal.smoothing == (0.2,) * 3
    assert fit_calibration(trials[:1], au_names=NAMES).smoothing == ()


def trial(**changes):
    fields = {
        "name": "a",
        "group": "a",
        "logits": torch.zeros(3, 1),
        "labels": torch.ones(3, 1, dtype=torch.int8),
        "timestamps": torch.arange(3.0),
        "seen": None,
    }
    return ScoredTrial(**{**fields, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trial(labels=torch.ones(2, 1)), "trial 'a': axis `t` is 3 in `logits` but 2"),
        (
            lambda: trial(timestamps=torch.full((3,), float("nan"))),
            "trial 'a': `timestamps` must be finite",
        ),
        (lambda: trial(logits=torch.full((3, 1), float("nan"))), "NaN at 3 labelled entries"),
        (lambda: evaluate_trials([], au_names=["AU1"]), "at least one trial; got none"),
        (lambda: evaluate_trials([trial()] * 2, au_names=["AU1"]), "'a' is there twice"),
        (lambda: evaluate_trials([trial()], au_names=NAMES), "has 1 columns; `au_names` names 3"),
        (
            lambda: fit_calibration([trial()], au_names=["AU1"], posterior=torch.sigmoid),
            "`posterior` needs `posterior_options`",
        ),
        (
            lambda: fit_calibration([trial()], au_names=["AU1"], posterior_options=OPTIONS),
            "`posterior` is missing",
        ),
        (
            lambda: fit_calibration(
                [trial()], au_names=["AU1"], posterior=torch.sigmoid, posterior_options=OPTIONS
            ),
            "describe another posterior than `posterior`: they differ by up to",
        ),
        (
            lambda: compare(make_trials(4), make_trials(6)),
            "must hold the same videos",
        ),
        (
            lambda: compare(make_trials(4), make_trials(4, hidden=False)),
            "about different frames: all, seen, hidden against all",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(TypeError, match="`seen` must be a bool tensor"):
        trial(seen=torch.ones(3))


def test_the_labels_outside_of_a_subset_are_unknown():
    one = trial(seen=torch.tensor([True, False, True]))
    assert one.labels_of("seen").flatten().tolist() == [1, -1, 1]
    assert one.labels_of("hidden").flatten().tolist() == [-1, 1, -1]
    assert_close(trial().labels_of("seen"), trial().labels)
    assert trial().labels_of("hidden").flatten().tolist() == [-1, -1, -1]
