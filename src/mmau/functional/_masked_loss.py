"""What the multi-label losses share: reading a target with gaps, per-AU options, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes

__all__ = [
    "PerClass",
    "Reduction",
    "check_floating",
    "per_class",
    "read_target",
    "reduce_entries",
    "to_compute_dtype",
]

PerClass: TypeAlias = float | Sequence[float] | Tensor
"""One number for all Action Units, or one per Action Unit, `(c)`."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""`"mean"` over the labelled entries, `"sum"`, or `"none"` to keep them."""


def to_compute_dtype(logits: Tensor) -> Tensor:
    """Return float64 as it is and everything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_floating(logits: Tensor) -> None:
    """Refuse integer logits."""
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating point; got {logits.dtype}.")


def read_target(logits: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return where the label is 1, and where there is a label."""
    check_shapes(logits=(logits, "... c"), target=(target, "... c"))
    check_floating(logits)
    if logits.shape != target.shape:
        raise ValueError(
            f"`logits` and `target` must have the same shape (..., c); got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}."
        )
    if ignore_index in (0, 1):
        raise ValueError(f"`ignore_index` must not be a label, 0 or 1; got {ignore_index}.")
    positive = target == 1
    labelled = positive | (target == 0)
    if not torch.compiler.is_compiling():
        refused = refused_entries(target, labelled, ignore_index)
        if bool(refused.any()):
            examples = torch.unique(target[refused].float()).tolist()[:3]
            missing = "" if ignore_index is None else f", or {ignore_index} or NaN for no label"
            raise ValueError(
                f"`target` must be 0 or 1{missing}; got {int(refused.sum())} other values, "
                f"such as {', '.join(f'{value:g}' for value in examples)}."
            )
    return positive, labelled


def refused_entries(target: Tensor, labelled: Tensor, ignore_index: int | None) -> Tensor:
    """Where the target is neither a label nor the mark of a missing one."""
    if ignore_index is None:
        return ~labelled
    return ~(labelled | (target == ignore_index) | torch.isnan(target))


def per_class(
    name: str,
    value: PerClass,
    num_classes: int,
    like: Tensor,
    *,
    high: float | None = None,
    open_low: bool = False,
) -> float | Tensor:
    """Check an option that is one number or one per Action Unit; the low end is 0."""
    if isinstance(value, (int, float)):
        check_range(name, value, 0, high, open_low=open_low, open_high=True)
        return float(value)
    values = torch.as_tensor(value, dtype=to_compute_dtype(like).dtype, device=like.device)
    if values.shape != (num_classes,):
        raise ValueError(
            f"`{name}` must be one number or one per Action Unit, ({num_classes},); "
            f"got shape {tuple(values.shape)}."
        )
    if not torch.compiler.is_compiling():
        for number in values.tolist():
            check_range(name, number, 0, high, open_low=open_low, open_high=True)
    return values


def reduce_entries(
    entries: Tensor,
    target: Tensor,
    labelled: Tensor,
    ignore_index: int | None,
    reduction: Reduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Sum, average or keep the entries, which are 0 where there is no label."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if torch.compiler.is_compiling():
        # A graph cannot raise on a value; a loss that is NaN cannot be overlooked.
        entries = torch.where(refused_entries(target, labelled, ignore_index), torch.nan, entries)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'`normalizer` is for reduction="mean"; got reduction={reduction!r}.')
    if reduction == "none":
        return entries
    total = entries.sum()
    if reduction == "sum":
        return total
    count: float | Tensor = labelled.sum() if normalizer is None else normalizer
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"`normalizer` must be one number; got shape {tuple(count.shape)}.")
        count = count.reshape(()).to(total.device, total.dtype)
        return total / torch.where(count > 0, count, torch.ones_like(count))
    check_range("normalizer", count, 0, open_high=True)
    return total / count if count > 0 else total
