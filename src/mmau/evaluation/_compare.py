"""Two systems on the same videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmau.evaluation._evaluate import evaluate_trials
from mmau.evaluation._report import EvaluationReport, interval_as_dict, plain, show_interval
from mmau.evaluation._trials import SUBSETS, Posterior, ScoredTrial, Subset
from mmau.metrics import Interval, paired_bootstrap_by_video

__all__ = ["Comparison", "compare_reports", "compare_trials"]


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
