"""Asymmetric loss for multi-label targets with gaps, its focal special case, and its posterior.

Everything is written in the error of one entry: with z = -x for a positive, z = x for a negative,

    e = sigmoid(z), k = sigmoid(-z), e_m = max(e - m, 0), u = min(k + m, 1), rho = log(u) / (1 - u)
    L = -e_m^(g+1) rho,    dL/dz = e e_m^g (k/u - g rho k)

where m is 0 for positives. No `pow(., g - 1)` occurs, so no exponent g >= 0 can produce a NaN, and
the hardest positives keep their gradient where `log(p)` of a rounded p would lose it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes
from mmau.functional._masked_loss import (
    PerClass,
    Reduction,
    check_floating,
    per_class,
    read_target,
    reduce_entries,
    to_compute_dtype,
)

__all__ = ["asymmetric_loss", "asymmetric_posterior", "focal_loss"]


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    ignore_index: int | None = -1,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Focal binary cross-entropy whose positive and negative sides decay at different rates.

    $$
    L_+ = -(1 - p)^{\gamma_+} \log p, \qquad
    L_- = -p_m^{\gamma_-} \log(1 - p_m), \qquad p_m = \max(p - m, 0)
    $$

    with $p = \sigma(\text{logits})$. A negative whose probability is at most the margin has neither
    loss nor gradient. With `gamma_pos = gamma_neg = margin = 0` this is binary cross-entropy. An
    entry without a label has no influence at all, whatever its logit is, NaN and infinity included.
    The loss is computed in float32 (float64 for float64 logits) and returned so; the gradient has
    the dtype of the logits. It can be differentiated once.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1 where the Action Unit is active, 0 where it is not, `ignore_index` or
            NaN where it is not known.
        gamma_pos: Focusing exponent of positives, at least 0; one number or one per Action Unit.
        gamma_neg: Focusing exponent of negatives, at least 0; one number or one per Action Unit.
        margin: Probability shift `m`, in [0, 1); one number or one per Action Unit.
        ignore_index: Target value that marks a missing label (Aff-Wild2 uses -1), or `None` if
            every entry must have a label; then NaN is refused as well.
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
            value. Compiled code cannot raise on values: there such a target makes the loss NaN.
        NotImplementedError: If a second derivative is asked for.

    References:
        Section 4.2 of the paper, which averages over classes. Ridnik et al., *Asymmetric Loss for
        Multi-Label Classification*, ICCV 2021, sum instead. The focusing weight is not detached.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -3.0, 0.5]])
        >>> asymmetric_loss(logits, torch.tensor([[1, 0, -1]]))
        tensor(0.0076)
    """
    positive, labelled = read_target(logits, target, ignore_index)
    num_classes = logits.shape[-1]
    gamma_pos = per_class("gamma_pos", gamma_pos, num_classes, logits)
    gamma_neg = per_class("gamma_neg", gamma_neg, num_classes, logits)
    margin = per_class("margin", margin, num_classes, logits, high=1)
    entries = _entries(logits, positive, labelled, gamma_pos, gamma_neg, margin)
    return reduce_entries(entries, target, labelled, ignore_index, reduction, normalizer)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    ignore_index: int | None = -1,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy in which easy entries of either kind count less.

    $$ L = -\alpha_t (1 - p_t)^{\gamma} \log p_t $$

    with $p_t$ the probability of the true label and $\alpha_t$ = `alpha` for positives, 1 - `alpha`
    for negatives, or 1 without `alpha`. It is `asymmetric_loss` with equal exponents and no margin;
    masks, dtypes and reductions behave the same.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        gamma: Focusing exponent, at least 0; one number or one per Action Unit.
        alpha: Weight of positives in (0, 1), or `None` for no weights.
        ignore_index: Target value that marks a missing label, or `None`.
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
    positive, labelled = read_target(logits, target, ignore_index)
    gamma = per_class("gamma", gamma, logits.shape[-1], logits)
    entries = _entries(logits, positive, labelled, gamma, gamma, 0.0)
    if alpha is not None:
        check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
        entries = entries * torch.where(positive, alpha, 1 - alpha)
    return reduce_entries(entries, target, labelled, ignore_index, reduction, normalizer)


def asymmetric_posterior(
    logits: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
) -> Tensor:
    r"""Turn logits trained with `asymmetric_loss` into the probability that the label is 1.

    The loss is not proper: where a fraction $\pi$ of the labels is 1, its expectation is smallest
    not at $p = \pi$ but where $\pi\, \partial L_+ + (1 - \pi)\, \partial L_- = 0$. Solved for
    $\pi$,

    $$
    \frac{\pi}{1 - \pi} = \frac{b}{a}, \quad
    a = \frac{(1-p)^{\gamma_+}}{p} - \gamma_+ (1-p)^{\gamma_+ - 1} \log p, \quad
    b = \frac{p_m^{\gamma_-}}{1 - p_m} - \gamma_- p_m^{\gamma_- - 1} \log(1 - p_m)
    $$

    Nothing is fitted. It increases with the logit, so it changes thresholds and calibration, not
    the ranking, except that all probabilities up to the margin become 0. With all three at 0 it is
    the sigmoid.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        gamma_pos: Exponent of positives that the model was trained with.
        gamma_neg: Exponent of negatives that the model was trained with.
        margin: Margin that the model was trained with.

    Returns:
        `(..., c)`, probability in [0, 1], float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError: If the logits are not a floating point tensor.
        ValueError: If an option is out of range.

    Examples:
        An ASL model that says 0.5 means 0.147:

        >>> import torch
        >>> asymmetric_posterior(torch.zeros(1))
        tensor([0.1473])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating(logits)
    num_classes = logits.shape[-1]
    gamma_pos = per_class("gamma_pos", gamma_pos, num_classes, logits)
    gamma_neg = per_class("gamma_neg", gamma_neg, num_classes, logits)
    margin = per_class("margin", margin, num_classes, logits, high=1)
    x = to_compute_dtype(logits.detach())
    # Beyond this both slopes underflow to 0/0 while their ratio has long reached its limit.
    limit = 80.0 if x.dtype == torch.float32 else 700.0
    x = x.clamp(-limit, limit)
    yes = torch.ones_like(x, dtype=torch.bool)
    pull_up = _loss_and_slope(x, yes, gamma_pos, gamma_neg, margin)[1].neg()
    pull_down = _loss_and_slope(x, ~yes, gamma_pos, gamma_neg, margin)[1]
    return pull_down / (pull_up + pull_down)


# ------------------------------------------------------------------------------- the closed form
def _entries(
    logits: Tensor,
    positive: Tensor,
    labelled: Tensor,
    gamma_pos: float | Tensor,
    gamma_neg: float | Tensor,
    margin: float | Tensor,
) -> Tensor:
    """Loss of every entry, 0 where there is no label."""
    arguments = (logits, positive, labelled, gamma_pos, gamma_neg, margin)
    return cast("Tensor", _AsymmetricEntries.apply(*arguments))  # type: ignore[no-untyped-call]


class _AsymmetricEntries(torch.autograd.Function):
    """Loss of every entry; saves nothing but the closed-form slope."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        positive: Tensor,
        labelled: Tensor,
        gamma_pos: float | Tensor,
        gamma_neg: float | Tensor,
        margin: float | Tensor,
    ) -> Tensor:
        x = to_compute_dtype(logits)
        loss, slope = _loss_and_slope(x, positive, gamma_pos, gamma_neg, margin)
        # Selected, not multiplied: 0 * NaN would leak.
        ctx.save_for_backward(torch.where(labelled, slope, 0.0))
        ctx.logits_dtype = logits.dtype
        return torch.where(labelled, loss, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The slope is a constant here: a gradient penalty on it would silently be no penalty.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "`asymmetric_loss` and `focal_loss` can be differentiated once; "
                "call backward or grad without create_graph=True."
            )
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.logits_dtype), None, None, None, None, None


def _loss_and_slope(
    x: Tensor,
    positive: Tensor,
    gamma_pos: float | Tensor,
    gamma_neg: float | Tensor,
    margin: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the logit, entry by entry; the letters are those of the module."""
    limits = torch.finfo(x.dtype)
    # An infinite logit acts as the largest finite one: k * log(k) stays 0 instead of 0 * inf.
    z = torch.where(positive, -x, x).clamp(max=limits.max)
    # Products, because `where` between two Python numbers rounds them to float32.
    yes, no = positive.to(x.dtype), (~positive).to(x.dtype)
    m, gamma = margin * no, gamma_pos * yes + gamma_neg * no
    e, k = torch.sigmoid(z), torch.sigmoid(-z)
    e_m = (e - m).clamp(min=0)
    u = (k + m).clamp(max=1)
    # Where sigmoid(-z) underflows its logarithm is still -z; as u -> 1 the quotient tends to -1.
    log_u = torch.where(u < limits.tiny, -z, torch.log(u))
    rho = torch.where(u >= 1, -1.0, log_u / (1 - u))
    focus = torch.where(positive, _power(e_m, gamma_pos), _power(e_m, gamma_neg))
    loss = -focus * e_m * rho
    ratio = torch.where(m > 0, k / u, 1.0)
    slope = e * focus * (ratio - gamma * (rho * k))
    # `<=` rather than `>`: a NaN logit must stay visible in the gradient.
    slope = torch.where(e_m <= 0, 0.0, slope)
    return loss, torch.where(positive, -slope, slope)


def _power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """Base to a non-negative exponent; pow with a free exponent is several times slower."""
    if isinstance(exponent, Tensor):
        return base.pow(exponent.to(base.dtype))
    if exponent == 4:
        return base.square().square()
    return base.pow(exponent)
