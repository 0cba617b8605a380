"""Scores of every way to turn logits into decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmau._checks import check_choice
from mmau.evaluation.bootstrap import (
    Interval,
    bootstrap_by_video,
    bootstrap_per_au_by_video,
    paired_bootstrap_by_video,
)
from mmau.evaluation.calibration import Calibration, PosteriorOption
from mmau.evaluation.counts import AUCounts, trivial_floors
from mmau.evaluation.ranking import average_precision, calibration_error
from mmau.evaluation.report import (
    POSTERIOR,
    RAW,
    SMOOTHED,
    SUBSETS,
    THRESHOLDS,
    EvaluationReport,
    Posterior,
    ReportRow,
    ScoredTrial,
    Subset,
    TrialSet,
    interval_as_dict,
    plain,
    show_interval,
)
from mmau.evaluation.smoothing import (
    WIDTHS,
    SmoothingKind,
    TimeUnit,
    choose_widths,
    cross_fitted_smoothing,
)
from mmau.evaluation.thresholds import SHRINKAGE, cross_fitted_predictions, fit_thresholds
from mmau.functional import asymmetric_posterior


def fit_calibration(
    trials: Sequence[ScoredTrial],
    *,
    au_names: Sequence[str],
    posterior: Posterior | None = None,
    posterior_options: Mapping[str, float | Sequence[float] | Tensor] | None = None,
    smoothing: bool = True,
    smoothing_kind: SmoothingKind = "mean",
    smoothing_unit: TimeUnit = "seconds",
    widths: Sequence[float] = WIDTHS,
    max_gap: float = 0.5,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
    note: str | None = None,
) -> Calibration:
    """Choose thresholds and smoothing on all trials, to be saved with the checkpoint.

    The widths are those of highest cross-fitted F1, the thresholds those of highest F1 on the
    smoothed probabilities, drawn towards `default` where an Action Unit occurs in few videos. On
    these same trials the result scores too well: report `evaluate_trials`, which chooses in the
    same way but never on the video it scores.

    Args:
        trials: Logits and labels.
        au_names: Names of the columns.
        posterior: From logits to the posterior, such as `loss.posterior`, if the thresholds are to
            be for it; those of the sigmoid if left out. The record says which.
        posterior_options: The same posterior as options of
            `mmau.functional.asymmetric_loss`, to be saved: whoever loads the checkpoint has
            the logits only. If left out, the `posterior_options` of the loss whose method
            `posterior` is.
        smoothing: Whether to choose widths at all. With fewer than two groups of trials there is
            nothing to choose them on, and nothing is smoothed.
        smoothing_kind: `"mean"`, `"median"`, or `"exponential"` for live streams.
        smoothing_unit: What the widths count, `"seconds"` or `"frames"`.
        widths: Widths to choose from.
        max_gap: Longest time between two frames that are smoothed together, in seconds.
        num_folds: Number of folds.
        seed: Start of the dealing into folds.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth; 0 for none.
        note: Which data this is, in words; the number of trials if left out.

    Returns:
        The calibration.

    Raises:
        ValueError: If the trials do not belong together, an option is out of range, or
            `posterior_options` are missing or describe another posterior.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[1], [0]], dtype=torch.int8)
        >>> clock, logits = torch.tensor([0.0, 0.1]), torch.tensor([[0.0], [-2.0]])
        >>> trials = [ScoredTrial(name, name, logits, labels, clock) for name in "abcd"]
        >>> fit_calibration(trials, au_names=["AU1"]).thresholds  # drawn up from 0.31
        (0.36...,)
    """
    together = TrialSet(trials, au_names)
    options = _options_of(posterior, posterior_options, len(together.au_names))
    probs = together.probabilities(posterior)
    chosen: tuple[float, ...] = ()
    if smoothing and together.num_groups > 1:
        found = choose_widths(
            probs,
            together.labels,
            together.timestamps,
            widths=widths,
            kind=smoothing_kind,
            unit=smoothing_unit,
            max_gap=max_gap,
            groups=together.groups,
            num_folds=num_folds,
            seed=seed,
            default=default,
            shrinkage=shrinkage,
        )
        chosen = tuple(found.tolist())
    words = f"chosen on {len(together.trials)} trials of {together.num_groups} videos"
    untuned = Calibration(
        together.au_names,
        (default,) * len(together.au_names),
        chosen,
        words if note is None else note,
        smoothing_kind=smoothing_kind,
        smoothing_unit=smoothing_unit,
        max_gap=max_gap,
        probability="raw" if posterior is None else "posterior",
        posterior_options=options,
    )
    smoothed = {
        name: untuned.smooth(prob, together.timestamps[name], ~prob.isnan().any(-1))
        for name, prob in probs.items()
    }
    thresholds = fit_thresholds(
        smoothed, together.labels, groups=together.groups, default=default, shrinkage=shrinkage
    )
    return replace(untuned, thresholds=tuple(thresholds.tolist()))


# -------------------------------------------------------------------------------------- internals
def _options_of(
    posterior: Posterior | None,
    given: Mapping[str, float | Sequence[float] | Tensor] | None,
    num_columns: int,
) -> dict[str, PosteriorOption]:
    """Return what the record says about the posterior, as plain numbers, after trying it."""
    if posterior is None:
        if given:
            raise ValueError("`posterior_options` describe a posterior; `posterior` is missing.")
        return {}
    if given is None:
        given = getattr(getattr(posterior, "__self__", None), "posterior_options", None)
    if not given:
        raise ValueError(
            "`posterior` needs `posterior_options`, such as {'gamma_pos': 1, 'gamma_neg': 4, "
            "'margin': 0.05}: a checkpoint whose thresholds are for a posterior that nobody can "
            "compute is of no use. Leave both out to choose thresholds for the sigmoid."
        )
    options: dict[str, PosteriorOption] = {}
    for name, value in given.items():
        if isinstance(value, (bool, int, float)):
            options[name] = value
        else:
            numbers = torch.as_tensor(value, dtype=torch.float64).tolist()
            options[name] = tuple(numbers) if isinstance(numbers, list) else numbers
    # The record is checked against the function once, here, and trusted by everyone later.
    logits = torch.linspace(-8, 8, 65).repeat(num_columns, 1).T.contiguous()
    tensors = {k: torch.tensor(v) if isinstance(v, tuple) else v for k, v in options.items()}
    described = asymmetric_posterior(logits, **cast("Any", tensors))
    error = float((described - posterior(logits)).abs().max())
    if not error < 1e-4:
        raise ValueError(
            f"`posterior_options` {options} describe another posterior than `posterior`: they "
            f"differ by up to {error:.3g}."
        )
    return options


def evaluate_trials(
    trials: Sequence[ScoredTrial],
    *,
    au_names: Sequence[str],
    posterior: Posterior | None = None,
    smoothing: bool = True,
    resamples: int = 2000,
    seed: int = 0,
    fit_on: Literal["raw", "posterior"] | None = None,
    smoothing_kind: SmoothingKind = "mean",
    smoothing_unit: TimeUnit = "seconds",
    widths: Sequence[float] = WIDTHS,
    max_gap: float = 0.5,
    num_folds: int = 5,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
    level: float = 0.95,
) -> EvaluationReport:
    """Score a model in every way that a reader should see, with intervals and floors.

    The rows are: the sigmoid at 0.5; the posterior at 0.5, if `posterior` is given; thresholds that
    were chosen on other videos; the same after smoothing with widths that were chosen on other
    videos. Each is the mean F1 pooled over all labelled frames, over those with a face, and over
    those without. An Action Unit without positives has no F1; it is named and left out of the mean.
    The intervals resample videos and hold the chosen thresholds and widths fixed. Smoothing crosses
    no gap in time, but goes on through frames without a face: the model predicts those as well.

    Args:
        trials: Logits and labels.
        au_names: Names of the columns.
        posterior: From logits to the posterior, such as `loss.posterior`.
        smoothing: Whether to add the row with smoothing.
        resamples: Draws of videos per interval, at least 100.
        seed: Start of the draws and of the dealing into folds.
        fit_on: Probability on which thresholds and widths are chosen, `"raw"` or `"posterior"`; the
            posterior if it is given. A threshold decides the same on either, but smoothing does
            not: means of posteriors are probabilities, means of an asymmetric loss's sigmoids are
            not.
        smoothing_kind: `"mean"`, `"median"` or `"exponential"`.
        smoothing_unit: What the widths count, `"seconds"` or `"frames"`.
        widths: Widths to choose from.
        max_gap: Longest time between two frames that are smoothed together, in seconds.
        num_folds: Number of folds.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth; 0 for none.
        level: Share of the draws inside the intervals, in (0, 1).

    Returns:
        The report: `render()` for people, `as_dict()` for files. With fewer than two groups of
        trials it has no intervals and no cross-fitted rows, and says so.

    Raises:
        ValueError: If the trials do not belong together, or an option is out of range.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[1], [0], [0]], dtype=torch.int8)
        >>> clock, logits = torch.arange(3) / 30, torch.tensor([[1.0], [-2.0], [0.5]])
        >>> trials = [ScoredTrial(name, name, logits, labels, clock) for name in "abc"]
        >>> report = evaluate_trials(trials, au_names=["AU1"])
        >>> print(report.rows[0].name, report.rows[0].scores["all"])
        raw at 0.5 0.667 [0.667, 0.667]
    """
    if fit_on is None:
        fit_on = "raw" if posterior is None else "posterior"
    check_choice("fit_on", fit_on, ("raw", "posterior"))
    if fit_on == "posterior" and posterior is None:
        raise ValueError('`fit_on="posterior"` needs `posterior`.')
    together = TrialSet(trials, au_names)
    raw = together.probabilities(None)
    meant = raw if posterior is None else together.probabilities(posterior)
    decided = {RAW: _above_half(raw)}
    if posterior is not None:
        decided[POSTERIOR] = _above_half(meant)
    notes = []
    if together.num_groups > 1:
        fitted = raw if fit_on == "raw" else meant
        decided[THRESHOLDS] = cross_fitted_predictions(
            fitted,
            together.labels,
            groups=together.groups,
            num_folds=num_folds,
            seed=seed,
            default=default,
            shrinkage=shrinkage,
        )
        if smoothing:
            decided[SMOOTHED] = cross_fitted_smoothing(
                fitted,
                together.labels,
                together.timestamps,
                widths=widths,
                kind=smoothing_kind,
                unit=smoothing_unit,
                max_gap=max_gap,
                groups=together.groups,
                num_folds=num_folds,
                seed=seed,
                default=default,
                shrinkage=shrinkage,
            ).decisions
    else:
        notes.append(
            "all trials are of one video: no interval, and no threshold can be chosen elsewhere"
        )
    subsets = together.subsets
    rows = []
    for name, decisions in decided.items():
        counts = {subset: _count(together, decisions, subset) for subset in subsets}
        scores = {subset: _interval(counts[subset], resamples, level, seed) for subset in subsets}
        rows.append(ReportRow(name, scores, counts))
    last = rows[-1].counts["all"]
    per_au: Mapping[str, Interval] = {}
    gains: dict[str, Interval] = {}
    if together.num_groups > 1:
        per_au = bootstrap_per_au_by_video(last, num_resamples=resamples, level=level, seed=seed)
        gains = {
            row.name: paired_bootstrap_by_video(
                row.counts["all"],
                rows[0].counts["all"],
                num_resamples=resamples,
                level=level,
                seed=seed,
            )
            for row in rows[1:]
        }
    missing = rows[0].pooled("all").without_positives
    if missing:
        notes.append(f"no positive label, so no F1 and not in the mean: {', '.join(missing)}")
    labels = {subset: _stack(together, subset) for subset in subsets}
    ranked = torch.cat(list(raw.values()))
    errors = {"raw": calibration_error(ranked, labels["all"])}
    if posterior is not None:
        errors["posterior"] = calibration_error(torch.cat(list(meant.values())), labels["all"])
    return EvaluationReport(
        au_names=together.au_names,
        num_trials=len(together.trials),
        num_videos=together.num_groups,
        rows=tuple(rows),
        floors={s: trivial_floors(labels[s], together.au_names) for s in subsets},
        average_precision={s: average_precision(ranked, labels[s]) for s in subsets},
        calibration_error=errors,
        per_au=per_au,
        gains=gains,
        notes=tuple(notes),
    )


# -------------------------------------------------------------------------------------- internals
def _above_half(probs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: prob >= 0.5 for name, prob in probs.items()}


def _count(
    together: TrialSet, decisions: Mapping[str, Tensor], subset: Subset
) -> dict[str, AUCounts]:
    """Pool the trials of each group: what a resample draws or leaves."""
    counts: dict[str, AUCounts] = {}
    for name, trial in together.trials.items():
        one = counts.setdefault(trial.group, AUCounts(together.au_names))
        one.update(decisions[name], trial.labels_of(subset))
    return counts


def _interval(counts: Mapping[str, AUCounts], resamples: int, level: float, seed: int) -> Interval:
    if len(counts) > 1:
        return bootstrap_by_video(counts, num_resamples=resamples, level=level, seed=seed)
    only = next(iter(counts.values())).mean_f1()
    return Interval(only, float("nan"), float("nan"), level, num_videos=1)


def _stack(together: TrialSet, subset: Subset) -> Tensor:
    return torch.cat([trial.labels_of(subset) for trial in together.trials.values()])


@dataclass(frozen=True)
class Comparison:
    """Difference between two systems, first minus second, for every row that both have."""

    first: str
    """Name of the first system."""
    second: str
    """Name of the second system."""
    rows: Mapping[str, Mapping[Subset, Interval]]
    """Paired difference of the mean F1, by row and subset of the frames."""
    mean_average_precision: Mapping[Subset, float]
    """Difference of the mean average precision, without an interval."""

    def render(self) -> str:
        """Return the table as text."""
        subsets = tuple(self.mean_average_precision)
        one = next(iter(next(iter(self.rows.values())).values()))
        lines = [
            f"Mean F1 of {self.first} minus {self.second}",
            f"  [{100 * one.level:g} % interval from resampling {one.num_videos} videos, the same "
            "for both]",
            "",
            f"  {'':<36}" + "".join(f"{SUBSETS[subset]:>24}" for subset in subsets),
        ]
        for name, scores in self.rows.items():
            cells = "".join(f"{show_interval(scores[subset]):>24}" for subset in subsets)
            lines.append(f"  {name:<36}{cells}")
        cells = "".join(f"{value:>24.3f}" for value in self.mean_average_precision.values())
        lines.append(f"  {'mean average precision':<36}{cells}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return every number as plain Python, for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "mean_f1": {
                name: {subset: interval_as_dict(score) for subset, score in scores.items()}
                for name, scores in self.rows.items()
            },
            "mean_average_precision": {
                subset: plain(value) for subset, value in self.mean_average_precision.items()
            },
        }


def compare_reports(
    first: EvaluationReport,
    second: EvaluationReport,
    *,
    names: tuple[str, str] = ("first", "second"),
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two reports about the same videos, row by row.

    Each draw takes the same videos for both systems, so the difficulty of the videos cancels. If an
    interval excludes 0, the order of the two does not hang on the choice of videos. What one
    training run happened to give is not in it: that takes several seeds.

    Args:
        first: Report of one system.
        second: Report of the other, on the same trials and labels.
        names: What to call them.
        resamples: Draws of videos per interval, at least 100.
        level: Share of the draws inside the intervals, in (0, 1).
        seed: Start of the draws.

    Returns:
        The differences.

    Raises:
        ValueError: If the reports are about different videos, labels or Action Units, or about
            fewer than two videos.
    """
    if first.subsets != second.subsets:
        raise ValueError(
            f"the reports are about different frames: {', '.join(first.subsets)} against "
            f"{', '.join(second.subsets)}."
        )
    others = {row.name: row for row in second.rows}
    rows = {
        row.name: {
            subset: paired_bootstrap_by_video(
                row.counts[subset],
                others[row.name].counts[subset],
                num_resamples=resamples,
                level=level,
                seed=seed,
            )
            for subset in first.subsets
        }
        for row in first.rows
        if row.name in others
    }
    gain = {
        subset: float(
            first.average_precision[subset].nanmean() - second.average_precision[subset].nanmean()
        )
        for subset in first.subsets
    }
    return Comparison(*names, rows, gain)


def compare_trials(
    first: Sequence[ScoredTrial],
    second: Sequence[ScoredTrial],
    *,
    au_names: Sequence[str],
    posterior: Posterior | None = None,
    second_posterior: Posterior | None = None,
    names: tuple[str, str] = ("first", "second"),
    smoothing: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Evaluate two systems on the same trials and compare them, row by row.

    Args:
        first: Logits of one system, with the labels.
        second: Logits of the other on the same trials.
        au_names: Names of the columns.
        posterior: From logits of the first to its posterior.
        second_posterior: From logits of the second to its posterior; two systems may have been
            trained with different losses.
        names: What to call them.
        smoothing: Whether to add the row with smoothing.
        resamples: Draws of videos per interval, at least 100.
        seed: Start of the draws and of the dealing into folds.

    Returns:
        The differences, first minus second, of every row that both have.

    Raises:
        ValueError: As `evaluate_trials` and `compare_reports`.

    Examples:
        >>> import torch
        >>> labels, clock = torch.tensor([[1], [0]], dtype=torch.int8), torch.tensor([0.0, 0.1])
        >>> good = [ScoredTrial(n, n, 4.0 * labels - 2, labels, clock) for n in "abc"]
        >>> bad = [ScoredTrial(n, n, 2 - 4.0 * labels, labels, clock) for n in "abc"]
        >>> comparison = compare_trials(good, bad, au_names=["AU1"], smoothing=False)
        >>> print(comparison.rows["raw at 0.5"]["all"])
        1.000 [1.000, 1.000]
    """
    reports = [
        evaluate_trials(
            trials,
            au_names=au_names,
            posterior=meaning,
            smoothing=smoothing,
            resamples=resamples,
            seed=seed,
        )
        for trials, meaning in ((first, posterior), (second, second_posterior))
    ]
    return compare_reports(*reports, names=names, resamples=resamples, seed=seed)
