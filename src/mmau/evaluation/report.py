"""What an evaluation found, for people and for files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_mask, check_shapes
from mmau.evaluation.bootstrap import Interval
from mmau.evaluation.counts import AUCounts, TrivialFloors

Posterior: TypeAlias = Callable[[Tensor], Tensor]
"""From logits `(t, c)` to the probability that they mean, such as `loss.posterior`."""

Subset: TypeAlias = Literal["all", "seen", "hidden"]
SUBSETS: dict[Subset, str] = {
    "all": "all frames",
    "seen": "face seen",
    "hidden": "no face seen",
}


@dataclass(frozen=True)
class ScoredTrial:
    """Logits and labels of one trial: a video, or one person of it.

    Args:
        name: Name of the trial, such as `video10_1_left`.
        group: What must stay together when thresholds are chosen and videos are resampled: the
            source video, or the subject.
        logits: `(t, c)`, one row per frame.
        labels: `(t, c)`, 1, 0, or -1 where it is not known.
        timestamps: `(t)`, seconds, in the order of the frames.
        seen: `(t)`, bool, True where a face was found; `None` if that is not known.

    Raises:
        TypeError: If `seen` is not bool.
        ValueError: If shapes differ, a timestamp is not finite, or a labelled entry is NaN.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[1], [0]], dtype=torch.int8)
        >>> trial = ScoredTrial("a", "a", torch.zeros(2, 1), labels, torch.tensor([0.0, 0.1]))
        >>> trial.num_frames
        2
    """

    name: str
    group: str
    logits: Tensor
    labels: Tensor
    timestamps: Tensor
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        try:
            check_shapes(
                logits=(self.logits, "t c"),
                labels=(self.labels, "t c"),
                timestamps=(self.timestamps, "t"),
                seen=(self.seen, "t"),
            )
        except ValueError as error:
            raise ValueError(f"trial {self.name!r}: {error}") from error
        check_mask("seen", self.seen)
        if not bool(self.timestamps.isfinite().all()):
            raise ValueError(f"trial {self.name!r}: `timestamps` must be finite.")
        unknown = int((self.logits.isnan() & (self.labels >= 0)).sum())
        if unknown:
            raise ValueError(
                f"trial {self.name!r}: `logits` are NaN at {unknown} labelled entries; give these "
                "frames a prediction or mark their labels as -1."
            )

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.logits)

    def labels_of(self, subset: Subset) -> Tensor:
        """Return the labels `(t, c)`, unknown (-1) outside of a subset of the frames.

        Args:
            subset: `"all"`, `"seen"` (a face was found) or `"hidden"` (none was).

        Returns:
            The labels. Without `seen`, every frame counts as seen.
        """
        if subset == "all" or (self.seen is None and subset == "seen"):
            return self.labels
        if self.seen is None:
            return torch.full_like(self.labels, -1)
        outside = ~self.seen if subset == "seen" else self.seen
        return self.labels.masked_fill(outside[:, None], -1)


class TrialSet:
    """Trials that are scored together, checked against each other."""

    def __init__(self, trials: Sequence[ScoredTrial], au_names: Sequence[str]) -> None:
        self.trials = {trial.name: trial for trial in trials}
        self.au_names = tuple(au_names)
        if not self.trials:
            raise ValueError("`trials` must hold at least one trial; got none.")
        if len(self.trials) != len(trials):
            names = [trial.name for trial in trials]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"`trials` must have one name each; {twice!r} is there twice.")
        for trial in trials:
            if trial.logits.shape[-1] != len(self.au_names):
                raise ValueError(
                    f"trial {trial.name!r} has {trial.logits.shape[-1]} columns; `au_names` names "
                    f"{len(self.au_names)}: {', '.join(self.au_names)}."
                )
        self.labels = {name: trial.labels for name, trial in self.trials.items()}
        self.timestamps = {name: trial.timestamps for name, trial in self.trials.items()}
        self.groups = {name: trial.group for name, trial in self.trials.items()}
        self.num_groups = len(set(self.groups.values()))

    def probabilities(self, posterior: Posterior | None) -> dict[str, Tensor]:
        """Return `(t, c)` probabilities by name: the sigmoid, or the posterior."""
        mean = torch.sigmoid if posterior is None else posterior
        return {name: mean(trial.logits.detach()) for name, trial in self.trials.items()}

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """Subsets of the frames that are worth a column: one with no face in some labelled frame.

        Where a face is seen in every labelled frame, `"all"` and `"seen"` are the same.
        """
        hidden = any(bool((trial.labels_of("hidden") >= 0).any()) for trial in self.trials.values())
        seen = any(bool((trial.labels_of("seen") >= 0).any()) for trial in self.trials.values())
        return ("all", *(("seen",) if hidden and seen else ()), *(("hidden",) if hidden else ()))


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
