"""Losses for Action Unit logits, as modules behind one interface and one registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_range
from mmau.functional._masked_loss import PerClass, Reduction
from mmau.functional.asymmetric_loss import asymmetric_loss, asymmetric_posterior, focal_loss
from mmau.functional.masked_bce_loss import masked_bce_loss
from mmau.registry import Registry

__all__ = ["LOSSES", "AsymmetricLoss", "FocalLoss", "MaskedBCELoss", "MultiLabelLoss"]


class MultiLabelLoss(Protocol):
    """What every registered loss does."""

    def __call__(
        self, logits: Tensor, target: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """Return the loss of `(..., c)` logits against labels 1, 0 and unknown."""

    def posterior(self, logits: Tensor) -> Tensor:
        """Return the probability `(..., c)` that a model trained with this loss means."""


LOSSES: Registry[Callable[..., MultiLabelLoss]] = Registry("loss", group="mmau.losses")
LOSSES.register_lazy(
    "asl",
    "mmau.modules.losses:AsymmetricLoss",
    summary="Asymmetric loss of the paper: easy negatives fade, very easy ones vanish.",
)
LOSSES.register_lazy(
    "focal",
    "mmau.modules.losses:FocalLoss",
    summary="Focal loss: easy entries of either kind fade.",
)
LOSSES.register_lazy(
    "bce",
    "mmau.modules.losses:MaskedBCELoss",
    summary="Binary cross-entropy over the labelled entries.",
)


class _Loss(nn.Module):
    """Keeps and prints the options; those given per Action Unit are buffers, so they move along."""

    def __init__(self, ignore_index: int | None, reduction: Reduction, **options: PerClass) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self._options = tuple(options)
        for name, value in options.items():
            if isinstance(value, (int, float)):
                setattr(self, name, float(value))
            else:
                per_unit = torch.as_tensor(value, dtype=torch.float32)
                self.register_buffer(name, per_unit, persistent=False)

    def extra_repr(self) -> str:
        """Return the options."""
        shown = {name: getattr(self, name) for name in self._options}
        shown |= {"ignore_index": self.ignore_index, "reduction": self.reduction}
        values = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in shown.items()}
        return ", ".join(f"{name}={value!r}" for name, value in values.items())


class AsymmetricLoss(_Loss):
    r"""Asymmetric loss of section 4.2, over the labelled entries.

    $$
    L_+ = -(1 - p)^{\gamma_+} \log p, \qquad
    L_- = -p_m^{\gamma_-} \log(1 - p_m), \qquad p_m = \max(p - m, 0)
    $$

    The sigmoid of a model trained with it is not a probability: threshold `posterior(logits)` at
    0.5, or tune the thresholds.

    Args:
        gamma_pos: Focusing exponent of positives, at least 0; one number or one per Action Unit.
        gamma_neg: Focusing exponent of negatives, at least 0; one number or one per Action Unit.
        margin: Probability shift `m`, in [0, 1); one number or one per Action Unit.
        ignore_index: Target value that marks a missing label, or `None`.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.

    Shape:
        - logits: `(..., c)`
        - target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known
        - output: scalar, or `(..., c)` for `reduction="none"`

    References:
        Section 4.2 of the paper; `mmau.functional.asymmetric_loss`.

    Examples:
        >>> import torch
        >>> loss = AsymmetricLoss()
        >>> logits = torch.tensor([[2.0, -3.0, 0.5]], requires_grad=True)
        >>> loss(logits, torch.tensor([[1, 0, -1]])).backward()
        >>> logits.grad
        tensor([[-0.0138,  0.0000,  0.0000]])
        >>> loss.posterior(torch.zeros(1))
        tensor([0.1473])
    """

    gamma_pos: float | Tensor
    gamma_neg: float | Tensor
    margin: float | Tensor

    def __init__(
        self,
        *,
        gamma_pos: PerClass = 1.0,
        gamma_neg: PerClass = 4.0,
        margin: PerClass = 0.05,
        ignore_index: int | None = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            ignore_index, reduction, gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin
        )
        _check_all("gamma_pos", self.gamma_pos)
        _check_all("gamma_neg", self.gamma_neg)
        _check_all("margin", self.margin, high=1)

    def forward(
        self, logits: Tensor, target: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.
            target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
            normalizer: What `"mean"` divides by instead of the number of labelled entries, such as
                the count over all processes.

        Returns:
            Scalar, or `(..., c)` for `reduction="none"`.
        """
        return asymmetric_loss(
            logits,
            target,
            gamma_pos=self.gamma_pos,
            gamma_neg=self.gamma_neg,
            margin=self.margin,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def posterior(self, logits: Tensor) -> Tensor:
        """Turn logits trained with this loss into calibrated probabilities, in closed form.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.

        Returns:
            `(..., c)`, probability in [0, 1].
        """
        return asymmetric_posterior(
            logits, gamma_pos=self.gamma_pos, gamma_neg=self.gamma_neg, margin=self.margin
        )


class FocalLoss(_Loss):
    r"""Focal loss over the labelled entries.

    $$ L = -\alpha_t (1 - p_t)^{\gamma} \log p_t $$

    Args:
        gamma: Focusing exponent, at least 0; one number or one per Action Unit.
        alpha: Weight of positives in (0, 1), negatives get 1 - `alpha`; `None` for no weights.
        ignore_index: Target value that marks a missing label, or `None`.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.

    Shape:
        - logits: `(..., c)`
        - target: `(..., c)`
        - output: scalar, or `(..., c)` for `reduction="none"`

    References:
        Lin et al., ICCV 2017; `mmau.functional.focal_loss`.

    Examples:
        >>> import torch
        >>> FocalLoss()(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor(0.1733)
    """

    gamma: float | Tensor

    def __init__(
        self,
        *,
        gamma: PerClass = 2.0,
        alpha: float | None = None,
        ignore_index: int | None = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(ignore_index, reduction, gamma=gamma)
        _check_all("gamma", self.gamma)
        if alpha is not None:
            check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
        self.alpha = alpha

    def forward(
        self, logits: Tensor, target: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.
            target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
            normalizer: What `"mean"` divides by instead of the number of labelled entries.

        Returns:
            Scalar, or `(..., c)` for `reduction="none"`.
        """
        return focal_loss(
            logits,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def posterior(self, logits: Tensor) -> Tensor:
        """Turn logits trained with this loss into calibrated probabilities, in closed form.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.

        Returns:
            `(..., c)`, probability in [0, 1].
        """
        prob = asymmetric_posterior(logits, gamma_pos=self.gamma, gamma_neg=self.gamma, margin=0.0)
        return prob if self.alpha is None else _unweighted(prob, self.alpha / (1 - self.alpha))

    def extra_repr(self) -> str:
        """Return the options."""
        return f"{super().extra_repr()}, alpha={self.alpha!r}"


class MaskedBCELoss(_Loss):
    r"""Binary cross-entropy over the labelled entries.

    $$ L = -w\, y \log p - (1 - y) \log(1 - p) $$

    Args:
        pos_weight: Weight `w` of positives, above 0; one number or one per Action Unit.
        ignore_index: Target value that marks a missing label, or `None`.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.

    Shape:
        - logits: `(..., c)`
        - target: `(..., c)`
        - output: scalar, or `(..., c)` for `reduction="none"`

    References:
        `mmau.functional.masked_bce_loss`.

    Examples:
        >>> import torch
        >>> MaskedBCELoss()(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))
        tensor(0.6931)
        >>> MaskedBCELoss(pos_weight=3.0).posterior(torch.zeros(1))
        tensor([0.2500])
    """

    pos_weight: float | Tensor

    def __init__(
        self,
        *,
        pos_weight: PerClass | None = None,
        ignore_index: int | None = -1,
        reduction: Reduction = "mean",
    ) -> None:
        weight: PerClass = 1.0 if pos_weight is None else pos_weight
        super().__init__(ignore_index, reduction, pos_weight=weight)
        _check_all("pos_weight", self.pos_weight, open_low=True)

    def forward(
        self, logits: Tensor, target: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.
            target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
            normalizer: What `"mean"` divides by instead of the number of labelled entries.

        Returns:
            Scalar, or `(..., c)` for `reduction="none"`.
        """
        return masked_bce_loss(
            logits,
            target,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def posterior(self, logits: Tensor) -> Tensor:
        """Turn logits trained with this loss into probabilities: the sigmoid, without the weight.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.

        Returns:
            `(..., c)`, probability in [0, 1].
        """
        prob = asymmetric_posterior(logits, gamma_pos=0.0, gamma_neg=0.0, margin=0.0)
        return _unweighted(prob, self.pos_weight)


def _unweighted(prob: Tensor, weight: float | Tensor) -> Tensor:
    """Undo a weight of positives: it multiplies the odds that minimise the loss."""
    return prob / (prob + weight * (1 - prob))


def _check_all(
    name: str, value: float | Tensor, *, high: float | None = None, open_low: bool = False
) -> None:
    """Check an option once, when the module is built; the low end is 0."""
    for number in value.flatten().tolist() if isinstance(value, Tensor) else [value]:
        check_range(name, number, 0, high, open_low=open_low, open_high=True)
