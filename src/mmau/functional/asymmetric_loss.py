"""Asymmetric loss for multi-label targets with gaps, and its focal special case."""

from __future__ import annotations

from torch import Tensor

from mmau._checks import check_range
from mmau.functional._asymmetric_engine import asymmetric_engine
from mmau.functional._asymmetric_formula import Terms, checked_terms
from mmau.functional._masked_loss import (
    Labels,
    PerClass,
    Reduction,
    check_pair,
    check_reduction,
)

__all__ = ["asymmetric_loss", "focal_loss"]


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Focal binary cross-entropy whose positive and negative sides decay at different rates.

    $$
    L_+ = -(1 - p)^{\gamma_+} \log p, \qquad
    L_- = -p_m^{\gamma_-} \log(1 - p_m), \qquad p_m = \max(p - m, 0)
    $$

    with $p = \sigma(\text{logits})$; a soft label $y$ costs $y L_+ + (1 - y) L_-$. A negative whose
    probability is at most the margin has neither loss nor gradient. With
    `gamma_pos = gamma_neg = margin = 0` this is binary cross-entropy. An entry without a label has
    no influence at all, whatever its logit is, NaN and infinity included. The loss is computed in
    float32 (float64 for float64 logits) and returned so; the gradient has the dtype of the logits
    and is rounded to it once. It can be differentiated as often as needed.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1 where the Action Unit is active, 0 where it is not, `ignore_index` or
            NaN where it is not known.
        gamma_pos: Focusing exponent of positives, at least 0; one number or one per Action Unit.
        gamma_neg: Focusing exponent of negatives, at least 0; one number or one per Action Unit.
        margin: Probability shift `m`, in [0, 1); one number or one per Action Unit.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. The mean is still
            over the number of labelled entries, not over the sum of their weights.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient, as some published
            code has it. The paper's formula is differentiated as a whole.
        soft_labels: Whether numbers between 0 and 1 are labels. Off, so that an intensity or a
            forgotten threshold does not pass for one.
        ignore_index: Target value that marks a missing label (Aff-Wild2 uses -1), or `None` if
            every entry must have a label; then NaN is refused as well.
        check_labels: Whether any other value raises. `None` does where that costs nothing, on a
            CPU. Elsewhere, and in compiled code always, such a value makes loss and gradient NaN
            instead, because raising means waiting for the accelerator.
        reduction: `"mean"` divides the sum by the number of labelled entries, so that it depends
            neither on the batch size nor on the gaps; `"sum"`; `"none"` keeps `(..., c)`.
        normalizer: What `"mean"` divides by instead of the number of labelled entries here: the
            count over all processes, or over all steps of an accumulated batch. 0 gives loss 0.

    Returns:
        Scalar, or `(..., c)` for `reduction="none"`. Zero, with zero gradient, where nothing is
        labelled.

    Raises:
        TypeError: If an argument is not a tensor or the logits are not floating point.
        ValueError: If the shapes differ, an option is out of range, or the target holds any other
            value, see `check_labels`.

    References:
        Section 4.2 of the paper, which averages over classes. Ridnik et al., *Asymmetric Loss for
        Multi-Label Classification*, ICCV 2021, sum instead.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -3.0, 0.5]])
        >>> asymmetric_loss(logits, torch.tensor([[1, 0, -1]]))
        tensor(0.0076)

        Half of a positive's loss and half of a negative's:

        >>> asymmetric_loss(torch.zeros(1), torch.tensor([0.5]), soft_labels=True)
        tensor(0.1855)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(
        logits,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        class_weight=class_weight,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    class_weight: PerClass | None = None,
    detach_focus: bool = False,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy in which easy entries of either kind count less.

    $$ L = -\alpha_t (1 - p_t)^{\gamma} \log p_t $$

    with $p_t$ the probability of the true label and $\alpha_t$ = `alpha` for positives, 1 - `alpha`
    for negatives, or 1 without `alpha`. It is `asymmetric_loss` with equal exponents and no margin;
    labels, dtypes and reductions behave the same.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        gamma: Focusing exponent, at least 0; one number or one per Action Unit.
        alpha: Weight of positives in (0, 1), or `None` for no weights.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient.
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

    References:
        Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017. The paper names it as the
        rejected alternative.

    Examples:
        >>> import torch
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([[1, 0]]))  # 0.25 log 2
        tensor(0.1733)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(
        logits,
        gamma=gamma,
        class_weight=class_weight,
        detach_focus=detach_focus,
    )
    if alpha is not None:
        check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
        terms = Terms.weighted(terms, alpha, 1 - alpha)
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)
