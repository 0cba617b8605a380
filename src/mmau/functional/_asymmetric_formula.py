"""The asymmetric loss of single entries, twice: with its slope in closed form, and for autograd.

Everything is written in the error of one entry: with z = -x for a positive, z = x for a negative,

    e = sigmoid(z), k = sigmoid(-z), e_m = max(e - m, 0), u = min(k + m, 1), rho = log(u) / (1 - u)
    L = -e_m^g log(u) = -e_m^(g+1) rho,    dL/dz = e e_m^g (k/u - g rho k)

where m is 0 for positives. No `pow(., g - 1)` occurs, so no exponent g >= 0 can produce a NaN, and
the hardest positives keep their gradient where `log(p)` of a rounded p would lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau.functional._masked_loss import PerClass, per_class

__all__ = ["Terms", "checked_terms", "differentiable_entries", "entries_and_slope"]

Number = float | Tensor
"""One number, or one per Action Unit, `(c)`."""


class Terms(NamedTuple):
    """The options of the loss, checked; those of one side are named after it."""

    gamma_pos: Number = 1.0
    gamma_neg: Number = 4.0
    margin: Number = 0.05
    weight_pos: Number = 1.0
    weight_neg: Number = 1.0
    detach_focus: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether both sides have one exponent; two tensors are not looked into."""
        return self.gamma_pos is self.gamma_neg or _same_number(self.gamma_pos, self.gamma_neg)

    @property
    def has_edge(self) -> bool:
        """Whether a negative could be pulled inside the margin, since x^0 does not vanish at 0."""
        if not isinstance(self.margin, Tensor) and self.margin == 0:
            return False
        return isinstance(self.gamma_neg, Tensor) or self.gamma_neg == 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """Return the same with every option that is one per Action Unit changed."""

        def changed(value: Number) -> Number:
            return change(value) if isinstance(value, Tensor) else value

        return self._replace(
            gamma_pos=changed(self.gamma_pos),
            gamma_neg=changed(self.gamma_neg),
            margin=changed(self.margin),
            weight_pos=changed(self.weight_pos),
            weight_neg=changed(self.weight_neg),
        )

    def weighted(self, of_positive: Number, of_negative: Number) -> Terms:
        """Return the same with both sides weighted once more."""
        return self._replace(
            weight_pos=self.weight_pos * of_positive, weight_neg=self.weight_neg * of_negative
        )


def checked_terms(
    like: Tensor,
    *,
    gamma: PerClass | None = None,
    gamma_pos: PerClass = 0.0,
    gamma_neg: PerClass = 0.0,
    margin: PerClass = 0.0,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Terms:
    """Check the options against the last axis of `like`; `gamma` stands for both exponents."""
    if gamma is not None:
        both = per_class("gamma", gamma, like)
        terms = Terms(both, both, 0.0, detach_focus=detach_focus)
    else:
        terms = Terms(
            per_class("gamma_pos", gamma_pos, like),
            per_class("gamma_neg", gamma_neg, like),
            per_class("margin", margin, like, high=1),
            detach_focus=detach_focus,
        )
    if pos_weight is not None:
        terms = terms.weighted(per_class("pos_weight", pos_weight, like, open_low=True), 1.0)
    if class_weight is not None:
        weight = per_class("class_weight", class_weight, like)
        terms = terms.weighted(weight, weight)
    return terms


def _same_number(first: Number, second: Number) -> bool:
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _sided(y: Tensor, of_positive: Number, of_negative: Number) -> Number:
    """Choose by label, 1 or 0, between two options; by arithmetic, which compiles to less."""
    if _same_number(of_positive, of_negative):
        return of_positive
    return of_positive * y + of_negative * (1 - y)


def _power(base: Tensor, exponent: Number) -> Tensor:
    """Base to a non-negative exponent; pow with a free exponent is several times slower."""
    if isinstance(exponent, Tensor):
        return base.pow(exponent)
    if exponent == 4:
        return base.square().square()
    return base if exponent == 1 else base.pow(exponent)


def entries_and_slope(x: Tensor, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the logit, entry by entry; the letters are those of the module.

    The label `y` is 1 or 0, in the dtype of `x`.
    """
    limits = torch.finfo(x.dtype)
    sign = 1 - 2 * y
    # An infinite logit acts as the largest finite one: k * log(k) stays 0 instead of 0 * inf.
    z = (x * sign).clamp(max=limits.max)
    # Both sigmoids from one exponential, without cancellation.
    small = torch.exp(-z.abs())
    large = 1 / (1 + small)
    small = small * large
    e, k = torch.where(z < 0, small, large), torch.where(z < 0, large, small)
    m = terms.margin * (1 - y)
    e_m = F.relu(e - m)
    # Just below 1 the quotient rho is -1 to the last digit; at 1 it would be 0 / 0.
    k_above_0 = k.clamp(min=limits.tiny)
    u = (k_above_0 + m).clamp(max=1 - limits.eps / 2)
    # Where sigmoid(-z) underflows its logarithm is still -z.
    rho = torch.where(u <= limits.tiny, -z, torch.log(u)) / (1 - u)
    focus = _power(e_m, terms.gamma_pos)
    if not terms.symmetric:
        focus = torch.where(y > 0.5, focus, _power(e_m, terms.gamma_neg))
    focus = focus * _sided(y, terms.weight_pos, terms.weight_neg)
    pull = k_above_0 / u
    if not terms.detach_focus:
        pull = pull - _sided(y, terms.gamma_pos, terms.gamma_neg) * (rho * k)
    slope = e * focus * pull * sign
    if terms.has_edge:
        # `<=` rather than `>`: a NaN logit must stay visible in the gradient.
        slope = torch.where(e_m <= 0, 0.0, slope)
    return -focus * e_m * rho, slope


def differentiable_entries(x: Tensor, y: Tensor, terms: Terms) -> Tensor:
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
    entries = -focus * log_u * _sided(y, terms.weight_pos, terms.weight_neg)
    return torch.where(outside, 0.0, entries)
