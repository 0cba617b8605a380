"""What is evaluated: logits and labels, trial by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_mask, check_shapes

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
