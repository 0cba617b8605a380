"""What the multi-label losses share: labels with gaps, options per Action Unit, reductions.

A label is read without waiting for an accelerator. On a CPU a label that is none is refused with a
sentence, at no cost worth measuring. On an accelerator, and in compiled code, looking at a value
means waiting for everything queued before it, so that there such a label makes the loss and its
gradient NaN, which no training overlooks; `check_labels=True` waits and gives the sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes

__all__ = [
    "Labels",
    "PerClass",
    "Reduction",
    "check_floating",
    "check_pair",
    "check_reduction",
    "per_class",
    "to_compute_dtype",
]

PerClass: TypeAlias = float | Sequence[float] | Tensor
"""One number for all Action Units, or one per Action Unit, `(c)`."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""`"mean"` over the labelled entries, `"sum"`, or `"none"` to keep them."""


class Labels(NamedTuple):
    """How the values of a target are read."""

    ignore_index: int | None
    """Value that marks a missing label beside NaN, or `None` if there must be none missing."""
    soft: bool
    """Whether numbers between 0 and 1 are labels."""
    check: bool
    """Whether to look at the values and refuse what is no label."""

    @classmethod
    def of(cls, target: Tensor, ignore_index: int | None, soft: bool, check: bool | None) -> Labels:
        """Decide on `check` where it is left open: where looking costs nothing."""
        if check is None:
            check = target.device.type == "cpu"
        return cls(ignore_index, soft, check and not torch.compiler.is_compiling())

    def given(self, target: Tensor) -> Tensor:
        """Return where there is a label, by one comparison, which is false for NaN."""
        inside = target * (1 - target)
        return inside >= 0 if self.soft else inside == 0

    def unless_given(self, target: Tensor) -> float | Tensor:
        """Return what an entry is that has no label: 0, or NaN if that is not allowed."""
        if self.check:
            return 0.0
        if self.ignore_index is None:
            return math.nan
        # False for NaN, which is a mark of a missing label too.
        return torch.where((target - self.ignore_index).abs() > 0, math.nan, 0.0).to(target.dtype)

    def refuse(self, target: Tensor) -> None:
        """Raise if anything is neither a label nor the mark of a missing one."""
        target = target.double()
        refused = ~self.given(target)
        if self.ignore_index is not None:
            refused &= ~((target == self.ignore_index) | torch.isnan(target))
        if not bool(refused.any()):
            return
        examples = torch.unique(target[refused]).tolist()[:3]
        labels = "in [0, 1]" if self.soft else "0 or 1"
        missing = "" if self.ignore_index is None else f", or {self.ignore_index} or NaN for none"
        between = not self.soft and any(0 < value < 1 for value in examples)
        raise ValueError(
            f"`target` must be {labels}{missing}; got {int(refused.sum())} other values, such as "
            f"{', '.join(f'{value:g}' for value in examples)}."
            f"{' Labels between 0 and 1 need `soft_labels=True`.' if between else ''}"
        )


def to_compute_dtype(logits: Tensor) -> Tensor:
    """Return float64 as it is and everything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_floating(logits: Tensor) -> None:
    """Refuse integer logits."""
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating point; got {logits.dtype}.")


def check_pair(logits: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Check all that can be said of logits and target without looking at their values."""
    check_shapes(logits=(logits, "... c"), target=(target, "... c"))
    check_floating(logits)
    if logits.shape != target.shape:
        raise ValueError(
            f"`logits` and `target` must have the same shape (..., c); got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}."
        )
    if ignore_index in (0, 1):
        raise ValueError(f"`ignore_index` must not be a label, 0 or 1; got {ignore_index}.")


def check_reduction(reduction: Reduction, normalizer: float | Tensor | None) -> None:
    """Check how the entries are put together."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'`normalizer` is for reduction="mean"; got reduction={reduction!r}.')
    if not isinstance(normalizer, Tensor):
        check_range("normalizer", normalizer, 0, open_high=True)
    elif normalizer.numel() != 1:
        raise ValueError(f"`normalizer` must be one number; got shape {tuple(normalizer.shape)}.")


def per_class(
    name: str,
    value: PerClass,
    like: Tensor,
    *,
    high: float | None = None,
    open_low: bool = False,
) -> float | Tensor:
    """Check an option that is one number or one per Action Unit; the low end is 0.

    The values of a tensor on an accelerator are taken as they are, since looking means waiting.
    """
    if isinstance(value, (int, float)):
        check_range(name, value, 0, high, open_low=open_low, open_high=True)
        return float(value)
    values = torch.as_tensor(value)
    num_classes = like.shape[-1]
    if values.shape != (num_classes,):
        raise ValueError(
            f"`{name}` must be one number or one per Action Unit, ({num_classes},); "
            f"got shape {tuple(values.shape)}."
        )
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        for number in values.tolist():
            check_range(name, number, 0, high, open_low=open_low, open_high=True)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.detach().to(like.device, dtype)
