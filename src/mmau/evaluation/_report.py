"""What an evaluation found, for people and for files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmau.evaluation._trials import SUBSETS, Subset
from mmau.metrics import AUCounts, Interval, TrivialFloors

__all__ = [
    "POSTERIOR",
    "RAW",
    "SMOOTHED",
    "THRESHOLDS",
    "EvaluationReport",
    "ReportRow",
    "interval_as_dict",
    "plain",
    "show_interval",
]

RAW = "raw at 0.5"
POSTERIOR = "posterior at 0.5"
THRESHOLDS = "cross-fitted thresholds"
SMOOTHED = "cross-fitted thresholds + smoothing"
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
        """Return the counts over all videos.

        Args:
            subset: `"all"`, `"seen"` or `"hidden"`.

        Returns:
            The counts, whose `mean_f1` is the official score of this row.
        """
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
    """One per way to decide, in the order in which they build on each other."""
    floors: Mapping[Subset, TrivialFloors]
    """What a system scores that looks at nothing."""
    average_precision: Mapping[Subset, Tensor]
    """`(c)`, per subset: the ranking alone, whatever the thresholds."""
    calibration_error: Mapping[str, Tensor]
    """`(c)`, of the `raw` probability and of the `posterior`."""
    per_au: Mapping[str, Interval]
    """F1 of the last row per Action Unit; empty with one video."""
    gains: Mapping[str, Interval]
    """Paired difference in mean F1 of each row to the first, all frames; empty with one video."""
    notes: tuple[str, ...]
    """What a reader must know: Action Units without positives, no intervals."""

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
        return "\n".join([*self._summary(), "", *self._per_au_table(), *self._endnotes()])

    def _summary(self) -> list[str]:
        level = round(100 * self.rows[0].scores["all"].level, 1)
        lines = [
            f"Mean F1 over {len(self.au_names)} AUs, pooled over the labelled frames of "
            f"{self.num_trials} trials ({self.num_videos} videos)",
            f"  [{level:g} % interval from resampling videos]",
            "",
            f"  {'':<36}" + "".join(f"{SUBSETS[subset]:>22}" for subset in self.subsets),
        ]
        floors = [self.floors[subset] for subset in self.subsets]
        numbers = {
            "floor: every AU in every frame": [floor.mean_all_ones for floor in floors],
            "floor: chance at the true rate": [floor.mean_prevalence_random for floor in floors],
        }
        lines += [_line(name, map(_show, values)) for name, values in numbers.items()]
        lines += [
            _line(row.name, (show_interval(row.scores[subset]) for subset in self.subsets))
            for row in self.rows
        ]
        ranking = [float(self.average_precision[subset].nanmean()) for subset in self.subsets]
        lines.append(_line("mean average precision", map(_show, ranking)))
        for name, error in self.calibration_error.items():
            lines.append(_line(f"calibration error, {name}", [_show(float(error.nanmean()))]))
        lines += ["", *(f"  {n} minus {RAW}: {show_interval(g)}" for n, g in self.gains.items())]
        return lines if self.gains else lines[:-1]

    def _per_au_table(self) -> list[str]:
        pooled = [row.pooled() for row in self.rows]
        heads = "".join(f"{SHORT[row.name]:>12}" for row in self.rows)
        ends = f"{'interval':>18}" if self.per_au else ""
        lines = [f"  {'F1 per AU':<12}{'active':>8}{'floor':>8}{heads}{ends}{'AP':>8}"]
        for i, name in enumerate(self.au_names):
            labelled = max(1.0, float(pooled[0].num_labelled[i]))
            share = f"{100 * float(pooled[0].num_positive[i]) / labelled:.1f} %"
            line = f"  {name:<12}{share:>8}{_show(float(self.floors['all'].all_ones[i])):>8}"
            line += "".join(f"{_show(float(counts.f1()[i])):>12}" for counts in pooled)
            if self.per_au:
                one = self.per_au[name]
                line += f"{_show_ends(one):>18}"
            lines.append(line + f"{_show(float(self.average_precision['all'][i])):>8}")
        return lines

    def _endnotes(self) -> list[str]:
        return ["", *(f"  note: {note}" for note in self.notes)] if self.notes else []

    def as_dict(self) -> dict[str, Any]:
        """Return every number as plain Python, `None` where there is none, for JSON."""
        pooled = {row.name: row.pooled() for row in self.rows}
        first = pooled[RAW]
        per_au = {}
        for i, name in enumerate(self.au_names):
            per_au[name] = {
                "positives": int(first.num_positive[i]),
                "labelled": int(first.num_labelled[i]),
                "floor": plain(float(self.floors["all"].all_ones[i])),
                "average_precision": plain(float(self.average_precision["all"][i])),
                "calibration_error": {
                    kind: plain(float(error[i])) for kind, error in self.calibration_error.items()
                },
                **{
                    score: {
                        row: plain(float(getattr(counts, score)()[i]))
                        for row, counts in pooled.items()
                    }
                    for score in ("f1", "precision", "recall")
                },
                "interval": interval_as_dict(self.per_au[name]) if self.per_au else None,
            }
        return {
            "au_names": list(self.au_names),
            "num_trials": self.num_trials,
            "num_videos": self.num_videos,
            "floors": {
                subset: {
                    "all_ones": plain(floors.mean_all_ones),
                    "prevalence_random": plain(floors.mean_prevalence_random),
                }
                for subset, floors in self.floors.items()
            },
            "mean_f1": {
                row.name: {s: interval_as_dict(score) for s, score in row.scores.items()}
                for row in self.rows
            },
            "gains": {name: interval_as_dict(gain) for name, gain in self.gains.items()},
            "mean_average_precision": {
                subset: plain(float(values.nanmean()))
                for subset, values in self.average_precision.items()
            },
            "calibration_error": {
                kind: plain(float(error.nanmean()))
                for kind, error in self.calibration_error.items()
            },
            "per_au": per_au,
            "notes": list(self.notes),
        }


# -------------------------------------------------------------------------------------- internals
def plain(number: float) -> float | None:
    """Return a number that JSON knows: NaN becomes `None`."""
    return None if number != number else number


def interval_as_dict(interval: Interval) -> dict[str, float | None]:
    """Return the fields of an interval, `None` for NaN."""
    return {name: plain(value) for name, value in dataclasses.asdict(interval).items()}


def show_interval(interval: Interval) -> str:
    """Return an interval as text; only its estimate if it has no ends."""
    if interval.low != interval.low:
        return _show(interval.estimate)
    return f"{_show(interval.estimate)} {_show_ends(interval)}"


def _show_ends(interval: Interval) -> str:
    return "-" if interval.low != interval.low else f"[{interval.low:.3f}, {interval.high:.3f}]"


def _show(number: float) -> str:
    return "-" if number != number else f"{number:.3f}"


def _line(name: str, cells: Any) -> str:
    return f"  {name:<36}" + "".join(f"{cell:>22}" for cell in cells)
