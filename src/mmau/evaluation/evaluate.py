"""Score every way to turn logits into decisions; choose what a checkpoint is shipped with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmau.evaluation.bootstrap import (
    BootstrapOptions,
    Interval,
    bootstrap_by_video,
    bootstrap_per_au_by_video,
    paired_bootstrap_by_video,
)
from mmau.evaluation.calibration import Calibration, PosteriorOption
from mmau.evaluation.counts import AUCounts, trivial_baselines
from mmau.evaluation.ranking import average_precision, calibration_error
from mmau.evaluation.report import (
    POSTERIOR,
    RAW,
    SMOOTHED,
    THRESHOLDS,
    EvaluationReport,
    ReportRow,
)
from mmau.evaluation.thresholds import CrossValidation, FitOptions, fit_thresholds
from mmau.evaluation.trials import Posterior, ScoredTrial, Subset, TrialSet


def evaluate_trials(
    trials: Sequence[ScoredTrial],
    *,
    au_names: Sequence[str],
    posterior: Posterior | None = None,
    options: FitOptions = FitOptions(),
    bootstrap: BootstrapOptions = BootstrapOptions(),
) -> EvaluationReport:
    """Score a model in every way that a reader should see, with intervals and baselines.

    The rows are: the sigmoid at 0.5; the posterior at 0.5, if `posterior` is given; thresholds that
    were chosen on other videos; the same after smoothing with windows that were chosen on other
    videos. Each is the mean F1 pooled over all labelled frames, over those with a face, and over
    those without. An Action Unit without positives has no F1; it is named and left out of the mean.
    The intervals resample videos and hold the chosen thresholds and windows fixed. Smoothing
    crosses no gap in time, but continues through frames without a face: the model predicts those.

    Args:
        trials: Logits and labels.
        au_names: Names of the columns.
        posterior: From logits to the posterior, such as `loss.posterior`. Thresholds and windows
            are chosen on it, or on the sigmoid if it is left out. A threshold decides the same on
            either, but smoothing does not: means of posteriors are probabilities, means of an
            asymmetric loss's sigmoids are not.
        options: How thresholds and smoothing are chosen; `FitOptions(smoothing=False)` leaves the
            row with smoothing out, which is slow.
        bootstrap: How videos are resampled for the intervals.

    Returns:
        The report: `render()` for people, `as_dict()` for files. With fewer than two groups of
        trials it has no intervals and no cross-validated rows, and says so.

    Raises:
        ValueError: If the trials do not belong together.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[1], [0], [0]], dtype=torch.int8)
        >>> clock, logits = torch.arange(3) / 30, torch.tensor([[1.0], [-2.0], [0.5]])
        >>> trials = [ScoredTrial(name, name, logits, labels, clock) for name in "abc"]
        >>> report = evaluate_trials(trials, au_names=["AU1"])
        >>> print(report.rows[0].name, report.rows[0].scores["all"])
        raw at 0.5 0.667 [0.667, 0.667]
    """
    together = TrialSet(trials, au_names)
    raw = together.probabilities(None)
    fitted = raw if posterior is None else together.probabilities(posterior)
    decided = {RAW: _above_half(raw)}
    if posterior is not None:
        decided[POSTERIOR] = _above_half(fitted)
    notes = []
    if together.num_groups > 1:
        decided[THRESHOLDS] = _cross_validated(together, fitted, replace(options, smoothing=False))
        if options.smoothing:
            decided[SMOOTHED] = _cross_validated(together, fitted, options)
    else:
        notes.append(
            "all trials are of one video: no interval, and no threshold can be chosen elsewhere"
        )
    rows = []
    for name, decisions in decided.items():
        counts = {subset: _count(together, decisions, subset) for subset in together.subsets}
        scores = {subset: _interval(one, bootstrap) for subset, one in counts.items()}
        rows.append(ReportRow(name, scores, counts))
    missing = rows[0].pooled().without_positives
    if missing:
        notes.append(f"no positive label, so no F1 and not in the mean: {', '.join(missing)}")

    per_au: Mapping[str, Interval] = {}
    delta_f1: dict[str, Interval] = {}
    if together.num_groups > 1:
        of_rows = {row.name: row.counts["all"] for row in rows}
        per_au = bootstrap_per_au_by_video(rows[-1].counts["all"], bootstrap)
        delta_f1 = {
            name: paired_bootstrap_by_video(counts, of_rows[RAW], bootstrap)
            for name, counts in of_rows.items()
            if name != RAW
        }
    labels = {
        subset: torch.cat([trial.labels_of(subset) for trial in together.trials.values()])
        for subset in together.subsets
    }
    ranked = torch.cat(list(raw.values()))
    errors = {"raw": calibration_error(ranked, labels["all"])}
    if posterior is not None:
        errors["posterior"] = calibration_error(torch.cat(list(fitted.values())), labels["all"])
    return EvaluationReport(
        au_names=together.au_names,
        num_trials=len(together.trials),
        num_videos=together.num_groups,
        rows=tuple(rows),
        baselines={s: trivial_baselines(one, together.au_names) for s, one in labels.items()},
        average_precision={s: average_precision(ranked, one) for s, one in labels.items()},
        calibration_error=errors,
        per_au=per_au,
        delta_f1=delta_f1,
        notes=tuple(notes),
        bootstrap=bootstrap,
    )


def fit_calibration(
    trials: Sequence[ScoredTrial],
    *,
    au_names: Sequence[str],
    posterior: Posterior | None = None,
    posterior_options: Mapping[str, float | Sequence[float] | Tensor] | None = None,
    options: FitOptions = FitOptions(),
    note: str | None = None,
) -> Calibration:
    """Choose thresholds and smoothing on all trials, to be saved with the checkpoint.

    The smoothing windows are those of highest cross-validated F1, the thresholds those of highest
    F1 on the smoothed probabilities, drawn towards the default where an Action Unit occurs in few
    videos. On these same trials the result scores too well: report `evaluate_trials`, which chooses
    in the same way but never on the video it scores.

    Args:
        trials: Logits and labels.
        au_names: Names of the columns.
        posterior: From logits to the posterior, such as `loss.posterior`, if the thresholds are to
            be for it; those of the sigmoid if left out. The record says which.
        posterior_options: The same posterior as options of `mmau.functional.asymmetric_posterior`,
            to be saved: whoever loads the checkpoint has the logits only. If left out, the
            `posterior_options` of the loss whose method `posterior` is.
        options: How thresholds and smoothing are chosen. With fewer than two groups of trials there
            is nothing to choose smoothing on, and nothing is smoothed.
        note: Which data this is, in words; the number of trials if left out.

    Returns:
        The calibration.

    Raises:
        ValueError: If the trials do not belong together, or `posterior_options` are missing or
            describe another posterior.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[1], [0]], dtype=torch.int8)
        >>> clock, logits = torch.tensor([0.0, 0.1]), torch.tensor([[0.0], [-2.0]])
        >>> trials = [ScoredTrial(name, name, logits, labels, clock) for name in "abcd"]
        >>> fit_calibration(trials, au_names=["AU1"]).thresholds  # drawn up from 0.31
        (0.36...,)
    """
    together = TrialSet(trials, au_names)
    words = f"chosen on {len(together.trials)} trials of {together.num_groups} videos"
    untuned = Calibration(
        together.au_names,
        (options.default,) * len(together.au_names),
        note=words if note is None else note,
        smoothing_kind=options.smoothing_kind,
        smoothing_unit=options.smoothing_unit,
        max_gap=options.max_gap,
        probability="raw" if posterior is None else "posterior",
        posterior_options=_plain_options(posterior, posterior_options),
    )
    if posterior is not None:
        _check_posterior(untuned, posterior)
    probs = together.probabilities(posterior)
    if options.smoothing and together.num_groups > 1:
        validation = _cross_validation(together, probs, options)
        windows, thresholds = validation.fit(validation.folds)
        untuned = replace(untuned, smoothing=tuple(windows.tolist()))
    else:
        thresholds = fit_thresholds(probs, together.labels, together.groups, options)
    return replace(untuned, thresholds=tuple(thresholds.tolist()))


# -------------------------------------------------------------------------------------- internals
def _above_half(probs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: prob >= 0.5 for name, prob in probs.items()}


def _cross_validation(
    together: TrialSet, probs: Mapping[str, Tensor], options: FitOptions
) -> CrossValidation:
    return CrossValidation(probs, together.labels, together.timestamps, together.groups, options)


def _cross_validated(
    together: TrialSet, probs: Mapping[str, Tensor], options: FitOptions
) -> dict[str, Tensor]:
    """Decide every trial with thresholds and windows that were chosen on other videos."""
    held_out = _cross_validation(together, probs, options).held_out()
    return {name: one.decisions for name, one in held_out.items()}


def _count(
    together: TrialSet, decisions: Mapping[str, Tensor], subset: Subset
) -> dict[str, AUCounts]:
    """Pool the trials of each group: what a resample draws or leaves."""
    counts: dict[str, AUCounts] = {}
    for name, trial in together.trials.items():
        one = counts.setdefault(trial.group, AUCounts(together.au_names))
        one.update(decisions[name], trial.labels_of(subset))
    return counts


def _interval(counts: Mapping[str, AUCounts], bootstrap: BootstrapOptions) -> Interval:
    if len(counts) > 1:
        return bootstrap_by_video(counts, bootstrap)
    only = next(iter(counts.values())).mean_f1()
    return Interval(only, float("nan"), float("nan"), bootstrap.confidence, num_videos=1)


def _plain_options(
    posterior: Posterior | None, given: Mapping[str, float | Sequence[float] | Tensor] | None
) -> dict[str, PosteriorOption]:
    """Return what the record says about the posterior, as plain numbers."""
    if posterior is None:
        if given:
            raise ValueError("`posterior_options` describe a posterior; `posterior` is missing.")
        return {}
    if given is None:
        given = getattr(getattr(posterior, "__self__", None), "posterior_options", None)
    if not given:
        raise ValueError(
            "`posterior` needs `posterior_options`, such as {'gamma_pos': 1, 'gamma_neg': 4, "
            "'margin': 0.05}: a checkpoint whose thresholds are for a posterior that cannot be "
            "computed is of no use. Leave both out to choose thresholds for the sigmoid."
        )
    options: dict[str, PosteriorOption] = {}
    for name, value in given.items():
        if isinstance(value, (bool, int, float)):
            options[name] = value
        else:
            numbers = torch.as_tensor(value, dtype=torch.float64).tolist()
            options[name] = tuple(numbers) if isinstance(numbers, list) else numbers
    return options


def _check_posterior(calibration: Calibration, posterior: Posterior) -> None:
    """Check the options of the record against the function once; they are trusted when loaded."""
    logits = torch.linspace(-8, 8, 65).repeat(len(calibration.au_names), 1).T.contiguous()
    error = float((calibration.probability_of(logits) - posterior(logits)).abs().max())
    if not error < 1e-4:
        raise ValueError(
            f"`posterior_options` {dict(calibration.posterior_options)} describe another posterior "
            f"than `posterior`: they differ by up to {error:.3g}."
        )
