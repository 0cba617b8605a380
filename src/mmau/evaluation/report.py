"""What an evaluation found, as text and as plain numbers; differences between two systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmau.evaluation.bootstrap import BootstrapOptions, Interval, paired_bootstrap_by_video
from mmau.evaluation.counts import AUCounts, TrivialBaselines
from mmau.evaluation.trials import SUBSETS, Subset

RAW = "raw at 0.5"
POSTERIOR = "posterior at 0.5"
THRESHOLDS = "cross-validated thresholds"
SMOOTHED = "cross-validated thresholds + smoothing"
SHORT = {RAW: "raw", POSTERIOR: "posterior", THRESHOLDS: "thresholds", SMOOTHED: "smoothed"}


@dataclass(frozen=True)
class ReportRow:
    """One way to decide."""

    name: str
    """Such as `raw at 0.5`."""
    scores: Mapping[Subset, Interval]
    """Mean F1 with its interval, by subset of the frames."""
    counts: Mapping[Subset, Mapping[str, AUCounts]]
    """Counts by subset and group, for paired intervals."""

    def pooled(self, subset: Subset = "all") -> AUCounts:
        """Return the counts over all videos; their `mean_f1` is the official score of this row."""
        total = AUCounts(next(iter(self.counts[subset].values())).au_names)
        for one in self.counts[subset].values():
            total.merge(one)
        return total


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that `evaluate_trials` found."""

    au_names: tuple[str, ...]
    """Names of the columns."""
    num_trials: int
    """Trials that were scored."""
    num_videos: int
    """Groups of trials: what was resampled."""
    rows: tuple[ReportRow, ...]
    """One per way to decide, in the order in which they build on each other. A row has a `name`,
    `scores` (subset of the frames to interval) and `pooled()` counts."""
    baselines: Mapping[Subset, TrivialBaselines]
    """What predictors score that see no input."""
    average_precision: Mapping[Subset, Tensor]
    """`(c)`, per subset: the ranking alone, whatever the thresholds."""
    calibration_error: Mapping[str, Tensor]
    """`(c)`, of the `raw` probability and of the `posterior`."""
    per_au: Mapping[str, Interval]
    """F1 of the last row per Action Unit; empty with one video."""
    delta_f1: Mapping[str, Interval]
    """Paired difference in mean F1 of each row to the first, all frames; empty with one video."""
    notes: tuple[str, ...]
    """What a reader must know: Action Units without positives, no intervals."""
    bootstrap: BootstrapOptions
    """How videos were resampled for the intervals."""

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """Subsets of the frames that have a column."""
        return tuple(self.rows[0].scores)

    def row(self, name: str) -> ReportRow:
        """Return a row by its name.

        Args:
            name: Such as `raw at 0.5`.

        Returns:
            The row.

        Raises:
            LookupError: If this report has no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        listed = ", ".join(repr(row.name) for row in self.rows)
        raise LookupError(f"no row named {name!r}. This report has {listed}.")

    def render(self) -> str:
        """Return the tables as text."""
        notes = ["", *(f"  note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*self._summary(), "", *self._per_au_table(), *notes])

    def _summary(self) -> list[str]:
        baselines = [self.baselines[subset] for subset in self.subsets]
        ranking = [float(self.average_precision[subset].nanmean()) for subset in self.subsets]
        lines = [
            f"Mean F1 over {len(self.au_names)} AUs, pooled over the labelled frames of "
            f"{self.num_trials} trials ({self.num_videos} videos)",
            f"  [{_show_percent(self.bootstrap)}, video bootstrap]",
            "",
            _line("", (SUBSETS[subset] for subset in self.subsets)),
            _line("baseline: every AU in every frame", (_show(b.mean_all_ones) for b in baselines)),
            _line(
                "baseline: chance at the true rate",
                (_show(b.mean_prevalence_random) for b in baselines),
            ),
        ]
        for row in self.rows:
            lines.append(_line(row.name, map(_show_interval, row.scores.values())))
        lines.append(_line("mean average precision", map(_show, ranking)))
        for name, error in self.calibration_error.items():
            lines.append(_line(f"calibration error, {name}", [_show(float(error.nanmean()))]))
        if self.delta_f1:
            lines.append("")
        for name, delta in self.delta_f1.items():
            lines.append(f"  delta F1, {name} against {RAW}: {_show_interval(delta)}")
        return lines

    def _per_au_table(self) -> list[str]:
        pooled = [row.pooled() for row in self.rows]
        heads = "".join(f"{SHORT[row.name]:>12}" for row in self.rows)
        ends = f"{_show_percent(self.bootstrap):>18}" if self.per_au else ""
        lines = [f"  {'F1 per AU':<12}{'active':>8}{'baseline':>10}{heads}{ends}{'AP':>8}"]
        for i, name in enumerate(self.au_names):
            labelled = max(1.0, float(pooled[0].num_labelled[i]))
            share = f"{100 * float(pooled[0].num_positive[i]) / labelled:.1f} %"
            line = f"  {name:<12}{share:>8}{_show(float(self.baselines['all'].all_ones[i])):>10}"
            line += "".join(f"{_show(float(counts.f1()[i])):>12}" for counts in pooled)
            if self.per_au:
                line += f"{_show_ends(self.per_au[name]):>18}"
            lines.append(line + f"{_show(float(self.average_precision['all'][i])):>8}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return every number as plain Python, `None` where there is none, for JSON."""
        pooled = {row.name: row.pooled() for row in self.rows}
        per_au = {}
        for i, name in enumerate(self.au_names):
            per_au[name] = {
                "positives": int(pooled[RAW].num_positive[i]),
                "labelled": int(pooled[RAW].num_labelled[i]),
                "baseline": _plain(float(self.baselines["all"].all_ones[i])),
                "average_precision": _plain(float(self.average_precision["all"][i])),
                "calibration_error": {
                    kind: _plain(float(error[i])) for kind, error in self.calibration_error.items()
                },
                **{
                    score: {
                        row: _plain(float(getattr(counts, score)()[i]))
                        for row, counts in pooled.items()
                    }
                    for score in ("f1", "precision", "recall")
                },
                "interval": _interval_as_dict(self.per_au[name]) if self.per_au else None,
            }
        return {
            "au_names": list(self.au_names),
            "num_trials": self.num_trials,
            "num_videos": self.num_videos,
            "baselines": {
                subset: {
                    "all_ones": _plain(baselines.mean_all_ones),
                    "prevalence_random": _plain(baselines.mean_prevalence_random),
                }
                for subset, baselines in self.baselines.items()
            },
            "mean_f1": {row.name: _intervals_as_dict(row.scores) for row in self.rows},
            "delta_f1": _intervals_as_dict(self.delta_f1),
            "mean_average_precision": {
                subset: _plain(float(values.nanmean()))
                for subset, values in self.average_precision.items()
            },
            "calibration_error": {
                kind: _plain(float(error.nanmean()))
                for kind, error in self.calibration_error.items()
            },
            "per_au": per_au,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Comparison:
    """Difference between two systems, first - second, for every row that both have."""

    first: str
    """Name of the first system."""
    second: str
    """Name of the second system."""
    rows: Mapping[str, Mapping[Subset, Interval]]
    """Paired difference of the mean F1, by row and subset of the frames."""
    mean_average_precision: Mapping[Subset, float]
    """Difference of the mean average precision, without an interval."""
    bootstrap: BootstrapOptions
    """How videos were resampled for the intervals."""

    def render(self) -> str:
        """Return the table as text."""
        subsets = tuple(self.mean_average_precision)
        num_videos = next(iter(next(iter(self.rows.values())).values())).num_videos
        lines = [
            f"Delta mean F1: {self.first} - {self.second}",
            f"  [{_show_percent(self.bootstrap)}, bootstrap of {num_videos} videos, the same for "
            "both]",
            "",
            _line("", (SUBSETS[subset] for subset in subsets)),
        ]
        for name, scores in self.rows.items():
            lines.append(_line(name, (_show_interval(scores[subset]) for subset in subsets)))
        values = (f"{value:.3f}" for value in self.mean_average_precision.values())
        return "\n".join([*lines, _line("mean average precision", values)])

    def as_dict(self) -> dict[str, Any]:
        """Return every number as plain Python, for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "mean_f1": {name: _intervals_as_dict(scores) for name, scores in self.rows.items()},
            "mean_average_precision": {
                subset: _plain(value) for subset, value in self.mean_average_precision.items()
            },
        }


def compare_reports(
    first: EvaluationReport,
    second: EvaluationReport,
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """Compare two reports about the same videos, row by row.

    Each draw takes the same videos for both systems, so the difficulty of the videos cancels. If an
    interval excludes 0, the order of the two does not hang on the choice of videos. What one
    training run happened to give is not in it: that takes several seeds.

    Args:
        first: Report of one system; videos are resampled as for its intervals.
        second: Report of the other, on the same trials and labels.
        names: What to call them.

    Returns:
        The differences, with `render()` and `as_dict()`.

    Raises:
        ValueError: If the reports are about different videos, labels or Action Units, or about
            fewer than two videos.

    Examples:
        >>> import torch
        >>> from mmau.evaluation import ScoredTrial, evaluate_trials
        >>> labels, clock = torch.tensor([[1], [0]], dtype=torch.int8), torch.tensor([0.0, 0.1])
        >>> reports = [
        ...     evaluate_trials(
        ...         [ScoredTrial(n, n, sign * (4.0 * labels - 2), labels, clock) for n in "abc"],
        ...         au_names=["AU1"],
        ...     )
        ...     for sign in (1, -1)
        ... ]
        >>> print(compare_reports(*reports).rows["raw at 0.5"]["all"])
        1.000 [1.000, 1.000]
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
                row.counts[subset], others[row.name].counts[subset], first.bootstrap
            )
            for subset in first.subsets
        }
        for row in first.rows
        if row.name in others
    }
    precision = {
        subset: float(
            first.average_precision[subset].nanmean() - second.average_precision[subset].nanmean()
        )
        for subset in first.subsets
    }
    return Comparison(*names, rows, precision, first.bootstrap)


# -------------------------------------------------------------------------------------- internals
def _plain(number: float) -> float | None:
    """Return a number that JSON knows: NaN becomes `None`."""
    return None if number != number else number


def _interval_as_dict(interval: Interval) -> dict[str, float | None]:
    return {name: _plain(value) for name, value in dataclasses.asdict(interval).items()}


def _intervals_as_dict(intervals: Mapping[Any, Interval]) -> dict[Any, dict[str, float | None]]:
    return {name: _interval_as_dict(interval) for name, interval in intervals.items()}


def _show(number: float) -> str:
    return "-" if number != number else f"{number:.3f}"


def _show_ends(interval: Interval) -> str:
    return "-" if interval.low != interval.low else f"[{interval.low:.3f}, {interval.high:.3f}]"


def _show_interval(interval: Interval) -> str:
    """Return an interval as text; only its estimate if it has no ends."""
    if interval.low != interval.low:
        return _show(interval.estimate)
    return f"{_show(interval.estimate)} {_show_ends(interval)}"


def _show_percent(bootstrap: BootstrapOptions) -> str:
    return f"{round(100 * bootstrap.confidence, 1):g} % CI"


def _line(name: str, cells: Iterable[str]) -> str:
    return f"  {name:<40}" + "".join(f"{cell:>22}" for cell in cells)
