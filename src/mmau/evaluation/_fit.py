"""What a checkpoint ships: thresholds and widths chosen on all annotated videos at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mmau.calibration import (
    SHRINKAGE,
    WIDTHS,
    Calibration,
    PosteriorOption,
    SmoothingKind,
    TimeUnit,
    choose_widths,
    fit_thresholds,
)
from mmau.evaluation._trials import Posterior, ScoredTrial, TrialSet
from mmau.functional import asymmetric_posterior

__all__ = ["fit_calibration"]


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
            `mmau.functional.asymmetric_posterior`, to be saved: whoever loads the checkpoint has
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
