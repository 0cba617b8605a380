"""Binary cross-entropy for multi-label targets with gaps."""

from __future__ import annotations

from torch import Tensor

from mmau.functional._asymmetric_engine import asymmetric_engine
from mmau.functional._asymmetric_formula import checked_terms
from mmau.functional._masked_loss import (
    Labels,
    PerClass,
    Reduction,
    check_pair,
    check_reduction,
)

__all__ = ["masked_bce_loss"]


def masked_bce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy over the labelled entries.

    $$ L = -w\, y \log p - (1 - y) \log(1 - p) $$

    with $w$ = `pos_weight`: torch's `binary_cross_entropy_with_logits` with gaps in the target. It
    is `asymmetric_loss` without exponents and margin; labels, dtypes and reductions behave the
    same.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. It is torch's
            `weight`.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.
        normalizer: What `"mean"` divides by instead of the number of labelled entries.

    Returns:
        Scalar, or `(..., c)` for `reduction="none"`.

    Raises:
        TypeError: As `asymmetric_loss`.
        ValueError: As `asymmetric_loss`.

    Examples:
        >>> import torch
        >>> masked_bce_loss(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))  # log 2
        tensor(0.6931)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(logits, class_weight=class_weight, pos_weight=pos_weight)
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)
