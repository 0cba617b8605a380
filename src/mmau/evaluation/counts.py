"""Exact, mergeable counts of decisions, and the scores of trivial predictors beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mmau.action_units import AU_NAMES

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any]
"""A tensor or a numpy array."""


class Labelled(NamedTuple):
    """Scores and labels of any leading axes, checked and flattened, on one device."""

    scores: Tensor
    """`(n, c)`, float64, so that thresholds compare exactly."""
    positive: Tensor
    """`(n, c)`, bool: labelled 1."""
    known: Tensor
    """`(n, c)`, bool: labelled 0 or 1, neither -1 nor NaN."""


def check_scores(prob: ArrayLike, target: ArrayLike, num_columns: int | None = None) -> Labelled:
    """Check probabilities and labels, as every function of this package that takes them does."""
    scores, labels = torch.as_tensor(prob).detach(), torch.as_tensor(target).detach()
    expected = "(..., c)" if num_columns is None else f"(..., {num_columns})"
    if scores.dim() == 0 or (num_columns is not None and scores.shape[-1] != num_columns):
        raise ValueError(f"`prob` must have shape {expected}; got {tuple(scores.shape)}.")
    if scores.shape != labels.shape:
        raise ValueError(
            f"`prob` and `target` must have the same shape; got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}."
        )
    scores = scores.reshape(-1, scores.shape[-1]).double()
    labels = labels.reshape(scores.shape).to(scores.device)
    positive = labels == 1
    known = positive | (labels == 0)
    other = ~(known | (labels == -1) | labels.isnan())
    if bool(other.any()):
        raise ValueError(
            f"`target` must be 0 or 1, or -1 or NaN for no label; got {int(other.sum())} other "
            f"values, such as {labels[other][0].item():g}."
        )
    seen = scores[known]
    if bool(seen.isnan().any()):
        raise ValueError(
            f"`prob` is NaN at {int(seen.isnan().sum())} of {seen.numel()} labelled entries; "
            "give these frames a prediction or mark their labels as -1."
        )
    if seen.numel() and (float(seen.amin()) < 0 or float(seen.amax()) > 1):
        raise ValueError(
            f"`prob` must be in [0, 1]; got values from {float(seen.amin()):g} to "
            f"{float(seen.amax()):g}. Are these logits?"
        )
    return Labelled(scores, positive, known)


class AUCounts:
    """True and false positives and negatives per Action Unit, pooled over everything it is given.

    The counts are int64, so they are exact, and the order in which batches, videos or processes are
    added makes no difference. An entry without a label (-1 or NaN) is not counted. Decisions are
    `prob >= threshold`.

    Args:
        au_names: Names of the columns, or their number.

    Examples:
        >>> import torch
        >>> counts = AUCounts(["AU1", "AU2"])
        >>> prob = torch.tensor([[0.9, 0.2], [0.6, 0.1], [0.1, 0.3]])
        >>> counts.update(prob, torch.tensor([[1, 0], [0, 0], [1, -1]]))
        AUCounts(AU1: tp 1 fp 1 fn 1 tn 0, AU2: tp 0 fp 0 fn 0 tn 2)
        >>> counts.f1()
        tensor([0.5000, nan], dtype=torch.float64)
        >>> counts.mean_f1(), counts.without_positives
        (0.5, ('AU2',))
    """

    def __init__(self, au_names: Sequence[str] | int = AU_NAMES) -> None:
        if isinstance(au_names, str):
            raise TypeError(f"`au_names` must be a list of names or a number; got {au_names!r}.")
        names = map(str, range(au_names)) if isinstance(au_names, int) else au_names
        self.au_names = check_names(names)
        self.counts = torch.zeros(len(self.au_names), 4, dtype=torch.int64)
        """`(c, 4)`: true positives, false positives, false negatives, true negatives."""

    def __repr__(self) -> str:
        rows = zip(self.au_names, self.counts.tolist(), strict=True)
        listed = (f"{name}: tp {tp} fp {fp} fn {fn} tn {tn}" for name, (tp, fp, fn, tn) in rows)
        return f"AUCounts({', '.join(listed)})"

    def update(
        self,
        prob: ArrayLike,
        target: ArrayLike,
        threshold: float | Sequence[float] | ArrayLike = 0.5,
    ) -> AUCounts:
        """Count a batch, a clip or a video.

        Args:
            prob: `(..., c)`, probability in [0, 1]; decisions (bool) are counted as they are.
            target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
            threshold: Smallest probability that counts as active; one number or one per Action
                Unit.

        Returns:
            Itself, so that calls can be chained.

        Raises:
            ValueError: If shapes differ, a labelled probability is NaN or outside [0, 1], or a
                label is anything else.
        """
        scores, positive, known = check_scores(prob, target, len(self.au_names))
        limit = torch.as_tensor(threshold, dtype=torch.float64, device=scores.device)
        if limit.dim() and limit.shape != (len(self.au_names),):
            raise ValueError(
                f"`threshold` must be one number or one per Action Unit, ({len(self.au_names)},); "
                f"got shape {tuple(limit.shape)}."
            )
        if bool(limit.isnan().any()):
            raise ValueError("`threshold` must not be NaN.")
        predicted, negative = scores >= limit, known & ~positive
        cells = (predicted & positive, predicted & negative, ~predicted & positive)
        columns = [cell.sum(0) for cell in (*cells, ~predicted & negative)]
        self.counts += torch.stack(columns, dim=-1).cpu()
        return self

    def merge(self, other: AUCounts) -> AUCounts:
        """Add the counts of another part of the data.

        Args:
            other: Counts of the same Action Units.

        Returns:
            Itself.

        Raises:
            ValueError: If the Action Units differ.
        """
        if other.au_names != self.au_names:
            raise ValueError(
                f"`other` must count the same Action Units, {', '.join(self.au_names)}; "
                f"got {', '.join(other.au_names)}."
            )
        self.counts += other.counts
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> AUCounts:
        """Return the sum over all processes of a distributed run, exactly what one would count.

        The counts of this process stay as they are, so that calling it twice counts nothing twice.
        Where no process group was initialised there is one process, and the sum is its own.

        Args:
            group: Process group; the default one if left out.

        Returns:
            New counts, the same in every process.

        Raises:
            ValueError: If the processes count different Action Units.
        """
        total = AUCounts(self.au_names)
        if not (dist.is_available() and dist.is_initialized()):
            return total.merge(self)
        names: list[object] = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, self.au_names, group=group)
        for rank, other in enumerate(names):
            if other != names[0]:
                raise ValueError(
                    f"all processes must count the same Action Units; process 0 counts "
                    f"{names[0]}, process {rank} {other}."
                )
        # NCCL adds on its own GPU only.
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        summed = self.counts.to(device, copy=True)
        dist.all_reduce(summed, group=group)
        total.counts = summed.cpu()
        return total

    @property
    def num_positive(self) -> Tensor:
        """`(c)`, int64: entries labelled 1."""
        return self.counts[:, 0] + self.counts[:, 2]

    @property
    def num_labelled(self) -> Tensor:
        """`(c)`, int64: entries labelled 0 or 1."""
        return self.counts.sum(-1)

    @property
    def without_positives(self) -> tuple[str, ...]:
        """Names of the Action Units that are never labelled 1: they have no F1."""
        pairs = zip(self.au_names, self.num_positive.tolist(), strict=True)
        return tuple(name for name, positives in pairs if positives == 0)

    def f1(self) -> Tensor:
        """Return F1 of the positive class, `(c)`, float64; NaN where there are no positives."""
        return f1_of_counts(self.counts.double())

    def mean_f1(self) -> float:
        """Return the unweighted mean over the Action Units that have positives; NaN if none has.

        This is the official metric when `without_positives` is empty; print that tuple beside it.
        """
        return float(self.f1().nanmean())

    def precision(self) -> Tensor:
        """Return precision, `(c)`, float64; NaN where nothing was predicted."""
        true_positive, false_positive = self.counts[:, 0].double(), self.counts[:, 1].double()
        return true_positive / (true_positive + false_positive)

    def recall(self) -> Tensor:
        """Return recall, `(c)`, float64; NaN for Action Units without positives."""
        return self.counts[:, 0].double() / self.num_positive.double()


@dataclass(frozen=True)
class TrivialBaselines:
    """F1 of predictors that see no input; NaN for Action Units without positives."""

    au_names: tuple[str, ...]
    """Names of the columns."""
    all_ones: Tensor
    """`(c)`, F1 of predicting 1 everywhere: 2r / (1 + r) at a positive rate r."""
    prevalence_random: Tensor
    """`(c)`, F1 of predicting 1 at random at the positive rate: r. Also the average precision of a
    random ranking."""

    @property
    def mean_all_ones(self) -> float:
        """Mean F1 of predicting all ones."""
        return float(self.all_ones.nanmean())

    @property
    def mean_prevalence_random(self) -> float:
        """Mean F1 of predicting at random."""
        return float(self.prevalence_random.nanmean())


def trivial_baselines(
    target: ArrayLike, au_names: Sequence[str] | int | None = None
) -> TrivialBaselines:
    """Score predictors that see no input, to be printed beside every result.

    Args:
        target: `(..., c)`, labels of everything that is scored: 1, 0, or -1 or NaN.
        au_names: Names of the columns; those of Aff-Wild2 if there are twelve, else numbers.

    Returns:
        F1 per Action Unit and its means.

    Raises:
        ValueError: If a label is anything else, or the number of names is not c.

    Examples:
        >>> import torch
        >>> baselines = trivial_baselines(torch.tensor([[1], [0], [0], [0], [-1]]))
        >>> baselines.mean_all_ones, baselines.mean_prevalence_random
        (0.4, 0.25)
    """
    labels = torch.as_tensor(target)
    if labels.dim() == 0:
        raise ValueError("`target` must have shape (..., c); got a single number.")
    num_columns = labels.shape[-1]
    if au_names is None:
        au_names = AU_NAMES if num_columns == len(AU_NAMES) else num_columns
    counts = AUCounts(au_names).update(torch.ones(labels.shape, device=labels.device), labels)
    rate = counts.num_positive.double() / counts.num_labelled.double()
    rate = torch.where(counts.num_positive > 0, rate, torch.nan)
    return TrivialBaselines(counts.au_names, all_ones=counts.f1(), prevalence_random=rate)


# -------------------------------------------------------------------------------------- internals
def f1_of_counts(counts: Tensor) -> Tensor:
    """`(..., 4)` counts to `(...)`; NaN without positives, where F1 can only be 0 or undefined."""
    tp, fp, fn = counts[..., 0], counts[..., 1], counts[..., 2]
    return torch.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), torch.nan)


def check_names(au_names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of columns as a tuple; at least one, each once."""
    names = tuple(au_names)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`au_names` must be at least one name, each once; got {names}.")
    return names
