"""What a logit trained with the asymmetric, focal or cross-entropy loss means as a probability."""

from __future__ import annotations

import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes
from mmau.functional._asymmetric_formula import Terms, checked_terms, entries_and_slope
from mmau.functional._masked_loss import PerClass, check_floating, to_compute_dtype

__all__ = [
    "asymmetric_posterior",
    "focal_posterior",
    "logits_from_asymmetric_posterior",
    "logits_from_focal_posterior",
]

FARTHEST = 700.0
"""Logit of either sign beyond which the slopes are 0 in float64."""
HALVINGS = 64
"""Of the interval between, which is more than float64 resolves."""


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
    become 0. With exponents and margin at 0 and no weight it is the sigmoid. Focusing weights that
    were detached pull with the first term of `a` and `b` only. Weights of classes do not matter.
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

    Examples:
        An ASL model that says 0.5 means 0.147:

        >>> import torch
        >>> asymmetric_posterior(torch.zeros(1))
        tensor([0.1473])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating(logits)
    terms = checked_terms(
        logits,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    return _posterior(to_compute_dtype(logits.detach()), terms)


def focal_posterior(
    logits: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Turn logits trained with `focal_loss` into the probability that the label is 1.

    It is `asymmetric_posterior` with equal exponents, no margin and the weight of positives
    `alpha / (1 - alpha)`. Without `alpha` 0.5 means 0.5, and every other output is
    nearer to 0.5 than the probability that it stands for.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        gamma: Exponent that the model was trained with.
        alpha: Weight of positives that the model was trained with, in (0, 1), or `None`.
        detach_focus: Whether the model was trained with detached focusing weights.

    Returns:
        `(..., c)`, probability in [0, 1], float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError: If the logits are not a floating point tensor.
        ValueError: If an option is out of range.

    References:
        Charoenphakdee et al., *On Focal Loss for Class-Posterior Probability Estimation*, CVPR
        2021, who derive it for any number of classes.

    Examples:
        >>> import torch
        >>> focal_posterior(torch.logit(torch.tensor([0.5, 0.7, 0.9])))
        tensor([0.5000, 0.9064, 0.9974])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating(logits)
    terms = checked_terms(logits, gamma=gamma, pos_weight=_odds(alpha), detach_focus=detach_focus)
    return _posterior(to_compute_dtype(logits.detach()), terms)


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
    _check_prob(prob)
    terms = checked_terms(
        prob.double(),
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    return _inverse(prob, terms)


def logits_from_focal_posterior(
    prob: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    detach_focus: bool = False,
) -> Tensor:
    """Find the logits that `focal_posterior` turns into given probabilities.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        gamma: As in `focal_posterior`.
        alpha: As in `focal_posterior`.
        detach_focus: As in `focal_posterior`.

    Returns:
        `(..., c)`, logits in the dtype of `prob`, at least float32, without gradient; minus and
        plus infinity for 0 and 1, NaN for NaN.

    Raises:
        TypeError: If `prob` is not a floating point tensor.
        ValueError: If a probability lies outside [0, 1], or an option is out of range.

    Examples:
        >>> import torch
        >>> logits_from_focal_posterior(torch.tensor([0.5, 0.9064])).sigmoid()
        tensor([0.5000, 0.7000])
    """
    _check_prob(prob)
    terms = checked_terms(
        prob.double(), gamma=gamma, pos_weight=_odds(alpha), detach_focus=detach_focus
    )
    return _inverse(prob, terms)


def _odds(alpha: float | None) -> float | None:
    """What focal loss weights positives with, relative to negatives."""
    if alpha is None:
        return None
    check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
    return alpha / (1 - alpha)


def _check_prob(prob: Tensor) -> None:
    check_shapes(prob=(prob, "... c"))
    if not prob.is_floating_point():
        raise TypeError(f"`prob` must be floating point; got {prob.dtype}.")
    outside = (prob < 0) | (prob > 1)
    if bool(outside.any()):
        raise ValueError(f"`prob` must be in [0, 1]; got {prob[outside][0].item():g}.")


def _pulls(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Derivatives of the loss at a logit, made positive: of a positive, of a negative label."""
    pull_up = -entries_and_slope(x, torch.ones_like(x), terms)[1]
    return pull_up, entries_and_slope(x, torch.zeros_like(x), terms)[1]


def _posterior(x: Tensor, terms: Terms) -> Tensor:
    # Beyond this both slopes underflow to 0/0 while their ratio has long reached its limit.
    limit = 80.0 if x.dtype == torch.float32 else FARTHEST
    pull_up, pull_down = _pulls(x.clamp(-limit, limit), terms)
    return pull_down / (pull_up + pull_down)


def _inverse(prob: Tensor, terms: Terms) -> Tensor:
    """Bisect: the posterior rises with the logit, and this is no place to be fast."""
    wanted = prob.detach().double()
    low, high = torch.full_like(wanted, -FARTHEST), torch.full_like(wanted, FARTHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        pull_up, pull_down = _pulls(middle, terms)
        # Products instead of the quotient, whose digits end near 1.
        above = pull_down * (1 - wanted) > pull_up * wanted
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    # Without a margin 0 is only reached at infinity, or where the slope underflows.
    margin = torch.as_tensor(terms.margin, dtype=wanted.dtype, device=wanted.device)
    found = torch.where((wanted == 0) & (margin == 0), -torch.inf, low)
    found = torch.where((wanted == 1) | (low >= FARTHEST - 1), torch.inf, found)
    return torch.where(wanted.isnan(), torch.nan, found).to(to_compute_dtype(prob[..., :0]).dtype)
