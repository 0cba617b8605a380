"""Binary cross-entropy for multi-label targets with gaps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau.functional._masked_loss import (
    PerClass,
    Reduction,
    per_class,
    read_target,
    reduce_entries,
    to_compute_dtype,
)

__all__ = ["masked_bce_loss"]


def masked_bce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: PerClass | None = None,
    ignore_index: int | None = -1,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy over the labelled entries.

    $$ L = -w\, y \log p - (1 - y) \log(1 - p) $$

    with $w$ = `pos_weight`: torch's `binary_cross_entropy_with_logits` with gaps in the target.
    Masks, dtypes and reductions behave as in `asymmetric_loss`.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit. It is not
            torch's `weight`, which would scale both sides.
        ignore_index: Target value that marks a missing label, or `None`.
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
    positive, labelled = read_target(logits, target, ignore_index)
    if pos_weight is not None:
        pos_weight = per_class("pos_weight", pos_weight, logits.shape[-1], logits, open_low=True)
    # Replaced before any arithmetic: 0 * NaN would leak.
    x = torch.where(labelled, to_compute_dtype(logits), 0.0)
    entries = F.binary_cross_entropy_with_logits(x, positive.to(x.dtype), reduction="none")
    entries = torch.where(labelled, entries, 0.0)
    if pos_weight is not None:
        entries = entries * torch.where(positive, pos_weight, 1.0)
    return reduce_entries(entries, target, labelled, ignore_index, reduction, normalizer)
