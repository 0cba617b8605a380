"""Scores of every way to turn logits into decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmau._checks import check_choice
from mmau.calibration import (
    SHRINKAGE,
    WIDTHS,
    SmoothingKind,
    TimeUnit,
    cross_fitted_predictions,
    cross_fitted_smoothing,
)
from mmau.evaluation._report import (
    POSTERIOR,
    RAW,
    SMOOTHED,
    THRESHOLDS,
    EvaluationReport,
    ReportRow,
)
from mmau.evaluation._trials import Posterior, ScoredTrial, Subset, TrialSet
from mmau.metrics import (
    AUCounts,
    Interval,
    average_precision,
    bootstrap_by_video,
    bootstrap_per_au_by_video,
    calibration_error,
    paired_bootstrap_by_video,
    trivial_floors,
)

__all__ = ["evaluate_trials"]


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
