"""Asymmetric loss for labels with gaps, its focal and plain special cases, and its posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes

PerClass: TypeAlias = float | Sequence[float] | Tensor
"""One number for all Action Units, or one per Action Unit, `(c)`."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""`"mean"` over the labelled entries, `"sum"`, or `"none"` to keep them."""


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
    return _loss(
        logits,
        target,
        LossOptions(soft_labels, ignore_index, check_labels, reduction, normalizer),
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        class_weight=class_weight,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )


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
    for negatives, or 1 without `alpha`. It is `asymmetric_loss` with equal exponents and no margin,
    which describes the other arguments.

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
    return _loss(
        logits,
        target,
        LossOptions(soft_labels, ignore_index, check_labels, reduction, normalizer),
        gamma=gamma,
        alpha=alpha,
        class_weight=class_weight,
        detach_focus=detach_focus,
    )


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
    is `asymmetric_loss` without exponents and margin, which describes the other arguments.

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
    return _loss(
        logits,
        target,
        LossOptions(soft_labels, ignore_index, check_labels, reduction, normalizer),
        class_weight=class_weight,
        pos_weight=pos_weight,
    )


def asymmetric_posterior(
    logits: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Turn logits trained with `asymmetric_loss` into the probability that the label is 1.

    The loss is not proper: where a fraction $\pi$ of the labels is 1, its expectation is smallest
    not at $p = \pi$ but where $\pi\, \partial L_+ + (1 - \pi)\, \partial L_- = 0$. Solved for
    $\pi$,

    $$
    \frac{\pi}{1 - \pi} = \frac{b}{w a}, \quad
    a = \frac{(1-p)^{\gamma_+}}{p} - \gamma_+ (1-p)^{\gamma_+ - 1} \log p, \quad
    b = \frac{p_m^{\gamma_-}}{1 - p_m} - \gamma_- p_m^{\gamma_- - 1} \log(1 - p_m)
    $$

    with $w$ = `pos_weight`. Nothing is fitted. It increases with the logit, so it changes
    thresholds and calibration, not the ranking, except that all probabilities up to the margin
    become 0. With exponents and margin at 0 and no weight it is the sigmoid. Of focusing weights
    that were detached only the first term of `a` and `b` remains. Weights of classes do not matter.
    With a margin and `gamma_pos=0` the posterior stays below 1 even at $p = 1$: near there a
    negative costs little more the surer the model is, and a positive little less.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        gamma_pos: Exponent of positives that the model was trained with.
        gamma_neg: Exponent of negatives that the model was trained with.
        margin: Margin that the model was trained with.
        pos_weight: Weight of positives that the model was trained with.
        detach_focus: Whether the model was trained with detached focusing weights.

    Returns:
        `(..., c)`, probability in [0, 1], float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError: If the logits are not a floating point tensor.
        ValueError: If an option is out of range.

    References:
        Charoenphakdee et al., *On Focal Loss for Class-Posterior Probability Estimation*, CVPR
        2021, for equal exponents without a margin and any number of classes.

    Examples:
        An ASL model that says 0.5 means 0.147:

        >>> import torch
        >>> asymmetric_posterior(torch.zeros(1))
        tensor([0.1473])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating("logits", logits)
    terms = checked_terms(
        logits,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    x = logits.detach().to(compute_dtype(logits))
    # Beyond this both gradients underflow to 0/0 while their ratio has long reached its limit.
    limit = 80.0 if x.dtype == torch.float32 else _LARGEST_LOGIT
    of_positive, of_negative = _gradient_sizes(x.clamp(-limit, limit), terms)
    return of_negative / (of_positive + of_negative)


def logits_from_asymmetric_posterior(
    prob: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Find the logits that `asymmetric_posterior` turns into given probabilities.

    For a threshold chosen on the posterior and applied to logits, and for the bias of the last
    layer, which should start where the model says how frequent each Action Unit is.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        gamma_pos: As in `asymmetric_posterior`.
        gamma_neg: As in `asymmetric_posterior`.
        margin: As in `asymmetric_posterior`.
        pos_weight: As in `asymmetric_posterior`.
        detach_focus: As in `asymmetric_posterior`.

    Returns:
        `(..., c)`, logits in the dtype of `prob`, at least float32, without gradient. Infinite for
        1 and for what no logit means; for 0 the largest logit that means 0, which a margin makes
        finite; NaN for NaN.

    Raises:
        TypeError: If `prob` is not a floating point tensor.
        ValueError: If a probability lies outside [0, 1], or an option is out of range.

    Examples:
        Where a bias starts for an Action Unit in a tenth of the frames; without focusing it would
        be the logit of 0.1, which is -2.2:

        >>> import torch
        >>> logits_from_asymmetric_posterior(torch.tensor([0.1]))
        tensor([-0.1281])
    """
    check_shapes(prob=(prob, "... c"))
    check_floating("prob", prob)
    outside = (prob < 0) | (prob > 1)
    if bool(outside.any()):
        raise ValueError(f"`prob` must be in [0, 1]; got {prob[outside][0].item():g}.")
    wanted = prob.detach().double()
    terms = checked_terms(
        wanted,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    # The posterior rises with the logit: bisect, to more than the digits of float64.
    low = torch.full_like(wanted, -_LARGEST_LOGIT)
    high = torch.full_like(wanted, _LARGEST_LOGIT)
    for _ in range(64):
        middle = (low + high) / 2
        of_positive, of_negative = _gradient_sizes(middle, terms)
        # Products instead of the quotient, whose digits end near 1.
        above = of_negative * (1 - wanted) > of_positive * wanted
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    # Without a margin 0 is only reached at infinity, or where the gradient underflows.
    margins = torch.as_tensor(terms.margin, dtype=wanted.dtype, device=wanted.device)
    found = torch.where((wanted == 0) & (margins == 0), -torch.inf, low)
    found = torch.where((wanted == 1) | (low >= _LARGEST_LOGIT - 1), torch.inf, found)
    return torch.where(wanted.isnan(), torch.nan, found).to(compute_dtype(prob))


_LARGEST_LOGIT = 700.0
"""Logit of either sign beyond which the gradients are 0 in float64."""


def _gradient_sizes(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Sizes of the gradient at a logit: of a positive, of a negative label."""
    positive, negative = (
        loss_and_gradient(x, torch.full_like(x, label), terms)[1] for label in (1, 0)
    )
    return -positive, negative


class Labelled(NamedTuple):
    """Logits and labels in the dtype of the arithmetic."""

    x: Tensor
    y: Tensor
    valid_mask: Tensor | None
    """Where there is a label; `None` for everywhere."""
    otherwise: float | Tensor
    """Loss and gradient elsewhere: 0, or NaN where the target is invalid."""
    num_labels: float | Tensor
    """How many entries have a label."""


class LossOptions(NamedTuple):
    """How the target is read and the entries are put together; see `asymmetric_loss`."""

    soft_labels: bool
    ignore_index: int | None
    check_labels: bool | None
    reduction: Reduction
    normalizer: float | Tensor | None

    def check(self) -> None:
        """Check all that does not depend on the values of the target."""
        if self.ignore_index in (0, 1):
            raise ValueError(
                f"`ignore_index` must not be a label, 0 or 1; got {self.ignore_index}."
            )
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        if self.normalizer is None:
            return
        if self.reduction != "mean":
            raise ValueError(
                f'`normalizer` is for reduction="mean"; got reduction={self.reduction!r}.'
            )
        if not isinstance(self.normalizer, Tensor):
            check_option("normalizer", self.normalizer)
        elif self.normalizer.numel() != 1:
            raise ValueError(
                f"`normalizer` must be one number; got shape {tuple(self.normalizer.shape)}."
            )

    def read(self, logits: Tensor, target: Tensor, whole_target: Tensor) -> Labelled:
        """Read a chunk; an invalid value is reported for the whole target."""
        dtype = compute_dtype(logits)
        x, y = logits.to(dtype), target.to(dtype)
        inside = torch.addcmul(y, y, y, value=-1)  # y - y^2: 0 for 0 and 1, positive between them
        on_cpu = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and not self.soft_labels:
            flat = inside.flatten()
            if float(torch.dot(flat, flat)) == 0:
                return Labelled(x, y, None, 0.0, y.numel())
        valid = inside >= 0 if self.soft_labels else inside == 0
        invalid = ~valid
        if self.ignore_index is not None:
            invalid &= (y - self.ignore_index).abs_() > 0  # False for NaN, which is missing too
        otherwise: float | Tensor = 0.0
        check = on_cpu if self.check_labels is None else self.check_labels
        if not check or torch.compiler.is_compiling():
            otherwise = torch.where(invalid, math.nan, 0.0).to(dtype)
        elif int(invalid.sum()) > 0:  # `any` takes three times as long
            self.raise_on_invalid(whole_target)
        # In floating point, which a compiler sums four times as fast as the 64 bits of integers.
        return Labelled(x, y, valid, otherwise, valid.sum(dtype=dtype))

    def raise_on_invalid(self, target: Tensor) -> None:
        """Say which values are neither a label nor the mark of a missing one."""
        target = target.double()
        inside = target * (1 - target)
        invalid = ~(inside >= 0 if self.soft_labels else inside == 0)
        if self.ignore_index is not None:
            invalid &= ~((target == self.ignore_index) | torch.isnan(target))
        examples = torch.unique(target[invalid]).tolist()[:3]
        labels = "in [0, 1]" if self.soft_labels else "0 or 1"
        missing = "" if self.ignore_index is None else f", or {self.ignore_index} or NaN for none"
        between = not self.soft_labels and any(0 < value < 1 for value in examples)
        raise ValueError(
            f"`target` must be {labels}{missing}; got {int(invalid.sum())} other values, such as "
            f"{', '.join(f'{value:g}' for value in examples)}."
            f"{' Labels between 0 and 1 need `soft_labels=True`.' if between else ''}"
        )

    def scale(self, total: Tensor, num_labels: float | Tensor) -> float | Tensor:
        """Return what the sum is multiplied by; 1 where there is nothing to divide by."""
        if self.reduction != "mean":
            return 1.0
        count = num_labels if self.normalizer is None else self.normalizer
        if isinstance(count, Tensor):
            count = count.detach().reshape(()).to(total)
            return 1 / torch.where(count > 0, count, torch.ones_like(count))
        return 1 / count if count > 0 else 1.0


Number: TypeAlias = float | Tensor
"""One number, or one per Action Unit, `(c)`."""


class Terms(NamedTuple):
    """The options of the formula, checked; those of one side are named after it."""

    gamma_pos: Number
    gamma_neg: Number
    margin: Number
    weight_pos: Number
    weight_neg: Number
    detach_focus: bool

    @property
    def has_margin(self) -> bool:
        """Whether there is a margin; a tensor is not looked into."""
        return isinstance(self.margin, Tensor) or self.margin != 0


def checked_terms(
    like: Tensor,
    *,
    gamma: PerClass | None = None,
    gamma_pos: PerClass = 0.0,
    gamma_neg: PerClass = 0.0,
    margin: PerClass = 0.0,
    alpha: float | None = None,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Terms:
    """Check the options against the last axis of `like`; `gamma` stands for both exponents."""
    weight_pos: Number = 1.0
    weight_neg: Number = 1.0
    if alpha is not None:
        check_option("alpha", alpha)
        weight_pos, weight_neg = alpha, 1 - alpha
    if pos_weight is not None:
        weight_pos = _per_class("pos_weight", pos_weight, like)
    if class_weight is not None:
        weight = _per_class("class_weight", class_weight, like)
        weight_pos, weight_neg = weight_pos * weight, weight_neg * weight
    if gamma is not None:
        both = _per_class("gamma", gamma, like)
        return Terms(both, both, 0.0, weight_pos, weight_neg, detach_focus)
    return Terms(
        _per_class("gamma_pos", gamma_pos, like),
        _per_class("gamma_neg", gamma_neg, like),
        _per_class("margin", margin, like),
        weight_pos,
        weight_neg,
        detach_focus,
    )


def _per_class(name: str, value: PerClass, like: Tensor) -> Number:
    """Check an option that is one number or one per Action Unit.

    The values of a tensor on an accelerator are taken as they are, since looking means waiting.
    """
    if isinstance(value, (int, float)):
        check_option(name, value)
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
            check_option(name, number)
    return values.detach().to(like.device, compute_dtype(like))


def check_option(name: str, value: float) -> None:
    """Check one number of an option: exponents and weights may be 0 and more."""
    high = 1 if name in ("margin", "alpha") else None
    check_range(name, value, 0, high, open_low=name in ("alpha", "pos_weight"), open_high=True)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse integers."""
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point; got {tensor.dtype}.")


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64, and float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------- the formula, entry by entry


def _sided(y: Tensor, negative: Tensor, of_positive: Number, of_negative: Number) -> Number:
    """Choose between two options by label, by arithmetic, which compiles to less."""
    same = of_positive is of_negative
    if not isinstance(of_positive, Tensor) and not isinstance(of_negative, Tensor):
        same = of_positive == of_negative
    return of_positive if same else y * of_positive + negative * of_negative


def _power(base: Tensor, exponent: Number) -> Tensor:
    """Base to a non-negative exponent; pow with a free exponent is several times slower."""
    if isinstance(exponent, Tensor):
        return base.pow(exponent)
    if exponent == 4:
        return base.square().square_()
    return base if exponent == 1 else base.pow(exponent)


def loss_and_gradient(
    x: Tensor,
    y: Tensor,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    r"""Loss and its derivative by the logit; the label `y` is 1 or 0, in the dtype of `x`.

    Written for both labels at once. With the probability $e$ of the other label, $k$ of this one,
    and the margin $m$, 0 for positives, let $e_m = \max(e - m, 0)$, $u = \min(k + m, 1) = 1 - e_m$
    and $\rho = -\log(u) / (1 - u)$. Then

    $$ L = e_m^\gamma e_m \rho, \qquad
    \partial L / \partial z = e_m^\gamma e\, (k / u + \gamma k \rho) $$

    with the logit $z$ of the other label. Nothing in it cancels, and $\rho$ is 1 to the last digit
    where $u$ is near 1. Everything is done in place where it can be, because that is faster.
    """
    limits = torch.finfo(x.dtype)
    negative = 1 - y
    sign = negative - y
    # An infinite logit acts as the largest finite one: k * log(k) stays 0 instead of 0 * inf.
    z = (x * sign).clamp_(-limits.max, limits.max)
    negative_z = -z
    e, k = torch.sigmoid(z), torch.sigmoid(negative_z)
    k_above_0 = k.clamp(min=limits.tiny)
    # Where k underflows its logarithm is still -z, and log k < -z everywhere.
    if not terms.has_margin:
        e_m, u, largest_log = e, k_above_0.clone(), negative_z
    else:
        m = negative * terms.margin
        e_m = (e - m).clamp_(min=0)
        if isinstance(terms.margin, Tensor):
            largest_log = torch.where(m > 0, 0.0, negative_z)
        else:
            largest_log = negative_z.mul_(y)
        u = m.add_(k_above_0)
    # Just below 1 the quotient rho is 1 to the last digit; at 1 it would be 0 / 0.
    u.clamp_(max=1 - limits.eps / 2)
    rho = torch.minimum(u.log(), largest_log).div_(u - 1)

    gamma = _sided(y, negative, terms.gamma_pos, terms.gamma_neg)
    if not isinstance(terms.gamma_pos, Tensor) and not isinstance(terms.gamma_neg, Tensor):
        focus = _power(e_m, terms.gamma_pos)
        if isinstance(gamma, Tensor):
            focus = torch.lerp(focus, _power(e_m, terms.gamma_neg), negative)
    else:
        focus = _power(e_m, gamma)
    if terms.has_margin and (isinstance(terms.gamma_neg, Tensor) or terms.gamma_neg == 0):
        # x^0 does not vanish at 0. `<=` rather than `>`: a NaN logit must stay visible.
        focus = torch.where(e_m <= 0, 0.0, focus)
    label_weight = _sided(y, negative, terms.weight_pos, terms.weight_neg)
    if isinstance(label_weight, Tensor) or label_weight != 1:
        focus = focus * label_weight
    loss = (e_m * focus).mul_(rho)
    gradient = k_above_0.div_(u)
    if not terms.detach_focus:
        gradient += k.mul_(rho).mul_(gamma)
    return loss, gradient.mul_(focus).mul_(e).mul_(sign)


def differentiable_loss(x: Tensor, y: Tensor, terms: Terms) -> Tensor:
    """Loss, entry by entry, in steps that autograd may go through as often as it likes."""
    limits = torch.finfo(x.dtype)
    z = (x * (1 - 2 * y)).clamp(max=limits.max)
    m = terms.margin * (1 - y)
    # The derivative of a sigmoid near 1 would lose its digits; that of its logarithm keeps them.
    log_e, log_k = F.logsigmoid(z), F.logsigmoid(-z)
    e, k = log_e.exp(), log_k.exp()
    outside = e <= m
    # Replaced before the power, not after it: 0 * inf in the derivative would be NaN.
    e_m = torch.where(outside, 1.0, e - m)
    focus = torch.where(y > 0.5, _power(e_m, terms.gamma_pos), _power(e_m, terms.gamma_neg))
    if terms.detach_focus:
        focus = focus.detach()
    u = torch.where(m > 0, (k + m).clamp(min=limits.tiny, max=1), 1.0)
    log_u = torch.where(m > 0, torch.log(u), log_k)
    loss = -focus * log_u * _sided(y, 1 - y, terms.weight_pos, terms.weight_neg)
    return torch.where(outside, 0.0, loss)


# ----------------------------------------------------------------------------- the loss of a batch

CHUNK = 65536
"""Entries at a time on one CPU thread: they stay in a cache, and an operation on them takes several
times as long as starting it."""
ACCELERATOR_CHUNK = 2**24
"""Entries at a time elsewhere, which only bounds the memory."""


def _loss(logits: Tensor, target: Tensor, options: LossOptions, **terms: PerClass | None) -> Tensor:
    """Check all arguments and compute the loss."""
    check_shapes(logits=(logits, "... c"), target=(target, "... c"))
    check_floating("logits", logits)
    if logits.shape != target.shape:
        raise ValueError(
            f"`logits` and `target` must have the same shape (..., c); got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}."
        )
    options.check()
    checked = checked_terms(logits, **cast("Any", terms))
    with torch.autocast(logits.device.type, enabled=False):
        apply = cast("Any", _Loss.apply)
        return cast("Tensor", apply(logits, target, checked, options))


class _Loss(torch.autograd.Function):
    """Loss of a batch, with the gradient in closed form, which keeps digits autograd would lose."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, terms: Terms, options: LossOptions
    ) -> Tensor:
        loss, num_labels, gradient = _over_batch(
            logits, target, terms, options, want_gradient=ctx.needs_input_grad[0]
        )
        ctx.scale = options.scale(loss, num_labels)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        else:
            ctx.save_for_backward(logits, target)
            ctx.terms, ctx.options, ctx.gradient = terms, options, gradient
        scaled: Tensor = loss * ctx.scale
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad * ctx.scale
        if torch.compiler.is_compiling():
            (gradient,) = ctx.saved_tensors
            return (grad * gradient).to(ctx.dtype), None, None, None
        logits, target = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A graph of the gradient is asked for, so it must not be a constant.
            again = _differentiable_gradient(logits, target, ctx.terms, ctx.options, grad)
            return again, None, None, None
        # Handed over and not kept: a second backward pass over the same graph, which is rare,
        # computes it again, and every other one needs no second buffer of this size.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = _over_batch(logits, target, ctx.terms, ctx.options, want_gradient=True)[2]
        return gradient.mul_(grad).to(logits.dtype), None, None, None


def _over_batch(
    logits: Tensor, target: Tensor, terms: Terms, options: LossOptions, *, want_gradient: bool
) -> tuple[Tensor, float | Tensor, Tensor | None]:
    """Return the sum, or all entries for `"none"`, the number of labels, and the gradient."""

    def over_chunk(x: Tensor, y: Tensor) -> tuple[Tensor, float | Tensor, Tensor]:
        x, y, valid_mask, otherwise, num_labels = options.read(x, y, target)
        if options.soft_labels:
            positive, of_positive = loss_and_gradient(x, torch.ones_like(y), terms)
            negative, of_negative = loss_and_gradient(x, torch.zeros_like(y), terms)
            loss = y * positive + (1 - y) * negative
            gradient = y * of_positive + (1 - y) * of_negative
        else:
            loss, gradient = loss_and_gradient(x, y, terms)
        if valid_mask is not None:  # selected, not multiplied: 0 times NaN would be NaN
            loss = torch.where(valid_mask, loss, otherwise)
            gradient = torch.where(valid_mask, gradient, otherwise)
        return loss if options.reduction == "none" else loss.sum(), num_labels, gradient

    if torch.compiler.is_compiling():
        return over_chunk(logits, target)
    on_cpu = logits.device.type == "cpu"
    limit = CHUNK * torch.get_num_threads() if on_cpu else ACCELERATOR_CHUNK
    if logits.numel() <= limit:
        return over_chunk(logits, target)

    rows, targets = (tensor.detach()[None].flatten(0, -2) for tensor in (logits, target))
    step = max(1, limit // rows.shape[1])
    whole_gradient = torch.empty_like(rows, dtype=compute_dtype(logits)) if want_gradient else None
    losses = []
    num_labels: float | Tensor = 0.0
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        loss, labels_here, gradient = over_chunk(rows[part], targets[part])
        losses.append(loss)
        num_labels = num_labels + labels_here
        if whole_gradient is not None:
            whole_gradient[part] = gradient
    if whole_gradient is not None:
        whole_gradient = whole_gradient.view(logits.shape)
    if options.reduction == "none":
        return torch.cat(losses).view(logits.shape), num_labels, whole_gradient
    return torch.stack(losses).sum(), num_labels, whole_gradient


def _differentiable_gradient(
    logits: Tensor, target: Tensor, terms: Terms, options: LossOptions, grad: Tensor
) -> Tensor:
    """Gradient of the loss as a function of the logits and of `grad`, to any order."""
    x, y, valid_mask, otherwise, _ = options.read(logits, target, target)
    if valid_mask is not None:
        # Here before the arithmetic too, because autograd multiplies what was not selected by 0.
        x, y = torch.where(valid_mask, x, 0.0), torch.where(valid_mask, y, 0.0)
    if options.soft_labels:
        loss = y * differentiable_loss(x, torch.ones_like(y), terms)
        loss = loss + (1 - y) * differentiable_loss(x, torch.zeros_like(y), terms)
    else:
        loss = differentiable_loss(x, y, terms)
    if valid_mask is not None:
        loss = torch.where(valid_mask, loss, otherwise)
    grad = grad.expand(loss.shape).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, logits, grad, create_graph=True)
    return gradient
