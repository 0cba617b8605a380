"""Losses for Action Unit logits, as modules behind one interface and one registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mmau._checks import check_choice
from mmau.functional.asymmetric_loss import (
    PerClass,
    Reduction,
    asymmetric_loss,
    asymmetric_posterior,
    check_option,
    focal_loss,
    logits_from_asymmetric_posterior,
    masked_bce_loss,
)
from mmau.registry import Registry


class MultiLabelLoss(Protocol):
    """What every registered loss does."""

    def __call__(
        self, logits: Tensor, target: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """Return the loss of `(..., c)` logits against labels 1, 0 and unknown."""

    def posterior(self, logits: Tensor) -> Tensor:
        """Return the probability `(..., c)` that a model trained with this loss means."""

    def logits_from_posterior(self, prob: Tensor) -> Tensor:
        """Return the logits `(..., c)` that `posterior` turns into these probabilities."""


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


class BaseLoss(nn.Module):
    """Keeps, checks and prints the options; those given per Action Unit are buffers."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        *,
        soft_labels: bool,
        ignore_index: int | None,
        check_labels: bool | None,
        reduction: Reduction,
        **formula: PerClass | bool | None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        for name, value in formula.items():
            if value is None or isinstance(value, bool):
                setattr(self, name, value)
            elif isinstance(value, (int, float)):
                check_option(name, value)
                setattr(self, name, float(value))
            else:
                per_unit = torch.as_tensor(value, dtype=torch.float32)
                for number in per_unit.flatten().tolist():
                    check_option(name, number)
                self.register_buffer(name, per_unit, persistent=False)
        self.soft_labels, self.ignore_index = soft_labels, ignore_index
        self.check_labels, self.reduction = check_labels, reduction
        self._names = (*formula, "soft_labels", "ignore_index", "check_labels", "reduction")

    def _options(self) -> dict[str, Any]:
        """Options of the function, by name."""
        return {name: getattr(self, name) for name in self._names}

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
        return type(self).function(logits, target, normalizer=normalizer, **self._options())

    @property
    def posterior_options(self) -> dict[str, Any]:
        """Options of `asymmetric_posterior` that describe this loss."""
        raise NotImplementedError

    def posterior(self, logits: Tensor) -> Tensor:
        """Turn logits trained with this loss into calibrated probabilities, in closed form."""
        return asymmetric_posterior(logits, **self.posterior_options)

    def logits_from_posterior(self, prob: Tensor) -> Tensor:
        """Find the logits that `posterior` turns into given probabilities.

        For a threshold on the posterior that is applied to logits, and for the bias of a last layer
        that should start at the frequency of each Action Unit.
        """
        return logits_from_asymmetric_posterior(prob, **self.posterior_options)

    def extra_repr(self) -> str:
        """Return the options that say something."""
        return ", ".join(
            f"{name}={value.tolist() if isinstance(value, Tensor) else value!r}"
            for name, value in self._options().items()
            if (value is not None and value is not False) or name == "ignore_index"
        )


class AsymmetricLoss(BaseLoss):
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
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
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

    function = staticmethod(asymmetric_loss)

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            gamma_pos=gamma_pos,
            gamma_neg=gamma_neg,
            margin=margin,
            class_weight=class_weight,
            pos_weight=pos_weight,
            detach_focus=detach_focus,
            soft_labels=soft_labels,
            ignore_index=ignore_index,
            check_labels=check_labels,
            reduction=reduction,
        )

    @property
    def posterior_options(self) -> dict[str, Any]:
        """Options of `asymmetric_posterior` that describe this loss."""
        names = ("gamma_pos", "gamma_neg", "margin", "pos_weight", "detach_focus")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class FocalLoss(BaseLoss):
    r"""Focal loss over the labelled entries.

    $$ L = -\alpha_t (1 - p_t)^{\gamma} \log p_t $$

    Args:
        gamma: Focusing exponent, at least 0; one number or one per Action Unit.
        alpha: Weight of positives in (0, 1), negatives get 1 - `alpha`; `None` for no weights.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
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
    alpha: float | None
    detach_focus: bool
    function = staticmethod(focal_loss)

    def __init__(
        self,
        *,
        gamma: PerClass = 2.0,
        alpha: float | None = None,
        class_weight: PerClass | None = None,
        detach_focus: bool = False,
        soft_labels: bool = False,
        ignore_index: int | None = -1,
        check_labels: bool | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            gamma=gamma,
            alpha=alpha,
            class_weight=class_weight,
            detach_focus=detach_focus,
            soft_labels=soft_labels,
            ignore_index=ignore_index,
            check_labels=check_labels,
            reduction=reduction,
        )

    @property
    def posterior_options(self) -> dict[str, Any]:
        """Options of `asymmetric_posterior` that describe this loss."""
        weights = {} if self.alpha is None else {"pos_weight": self.alpha / (1 - self.alpha)}
        return {
            "gamma_pos": self.gamma,
            "gamma_neg": self.gamma,
            "margin": 0.0,
            "detach_focus": self.detach_focus,
            **weights,
        }


class MaskedBCELoss(BaseLoss):
    r"""Binary cross-entropy over the labelled entries.

    $$ L = -w\, y \log p - (1 - y) \log(1 - p) $$

    Args:
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit.
        pos_weight: Weight `w` of positives, above 0; one number or one per Action Unit.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.

    Shape:
        - logits: `(..., c)`
        - target: `(..., c)`
        - output: scalar, or `(..., c)` for `reduction="none"`

    References:
        `mmau.functional.asymmetric_loss`.

    Examples:
        >>> import torch
        >>> MaskedBCELoss()(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))
        tensor(0.6931)
        >>> MaskedBCELoss(pos_weight=3.0).posterior(torch.zeros(1))
        tensor([0.2500])
    """

    pos_weight: float | Tensor | None
    function = staticmethod(masked_bce_loss)

    def __init__(
        self,
        *,
        class_weight: PerClass | None = None,
        pos_weight: PerClass | None = None,
        soft_labels: bool = False,
        ignore_index: int | None = -1,
        check_labels: bool | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            class_weight=class_weight,
            pos_weight=pos_weight,
            soft_labels=soft_labels,
            ignore_index=ignore_index,
            check_labels=check_labels,
            reduction=reduction,
        )

    @property
    def posterior_options(self) -> dict[str, Any]:
        """Options of `asymmetric_posterior` that describe this loss."""
        weights = {} if self.pos_weight is None else {"pos_weight": self.pos_weight}
        return {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0, **weights}
