"""Losses for Action Unit logits, as modules behind one interface and one registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_range
from mmau.functional.asymmetric_loss import (
    PerClass,
    Reduction,
    asymmetric_loss,
    asymmetric_posterior,
    focal_loss,
    logits_from_asymmetric_posterior,
    masked_bce_loss,
)
from mmau.registry import Registry

_SHARED = ("soft_labels", "ignore_index", "check_labels", "reduction")
"""Options that every loss has under the same name as its function."""


class BaseLoss(nn.Module):
    """Keeps and prints the options; those given per Action Unit are buffers, so they move along."""

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: PerClass | None,
        soft_labels: bool,
        ignore_index: int | None,
        check_labels: bool | None,
        reduction: Reduction,
        **options: PerClass | bool | None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.soft_labels = soft_labels
        self.ignore_index = ignore_index
        self.check_labels = check_labels
        self.reduction: Reduction = reduction
        for name, value in {**options, "class_weight": class_weight}.items():
            if value is None or isinstance(value, (int, float)):
                plain = value if value is None or isinstance(value, bool) else float(value)
                setattr(self, name, plain)
            else:
                per_unit = torch.as_tensor(value, dtype=torch.float32)
                self.register_buffer(name, per_unit, persistent=False)
        check_all("class_weight", self.class_weight)
        self._options = (*options, "class_weight", *_SHARED)

    def shared_options(self) -> dict[str, Any]:
        """Return the options that every loss passes on to its function."""
        return {name: getattr(self, name) for name in ("class_weight", *_SHARED)}

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
        shown = {name: getattr(self, name) for name in self._options}
        values = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in shown.items()}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in values.items()
            if (value is not None and value is not False) or name == "ignore_index"
        )


def check_all(
    name: str,
    value: float | Tensor | None,
    *,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    """Check an option once, when the module is built; the low end is 0."""
    if value is None:
        return
    for number in value.flatten().tolist() if isinstance(value, Tensor) else [value]:
        check_range(name, number, 0, high, open_low=open_low, open_high=True)


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
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. The mean is still
            over the number of labelled entries.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient.
        soft_labels: Whether numbers between 0 and 1 are labels; the loss is linear in them.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does where that costs nothing, on a
            CPU. Elsewhere, and in compiled code, it makes loss and gradient NaN.
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
    pos_weight: float | Tensor | None
    detach_focus: bool

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
            class_weight,
            soft_labels,
            ignore_index,
            check_labels,
            reduction,
            gamma_pos=gamma_pos,
            gamma_neg=gamma_neg,
            margin=margin,
            pos_weight=pos_weight,
            detach_focus=detach_focus,
        )
        check_all("gamma_pos", self.gamma_pos)
        check_all("gamma_neg", self.gamma_neg)
        check_all("margin", self.margin, high=1)
        check_all("pos_weight", self.pos_weight, open_low=True)

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
            pos_weight=self.pos_weight,
            detach_focus=self.detach_focus,
            normalizer=normalizer,
            **self.shared_options(),
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
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. The mean is still
            over the number of labelled entries.
        detach_focus: Whether the focusing weights are constants to the gradient.
        soft_labels: Whether numbers between 0 and 1 are labels; the loss is linear in them.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does where that costs nothing, on a
            CPU. Elsewhere, and in compiled code, it makes loss and gradient NaN.
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
            class_weight,
            soft_labels,
            ignore_index,
            check_labels,
            reduction,
            gamma=gamma,
            alpha=alpha,
            detach_focus=detach_focus,
        )
        check_all("gamma", self.gamma)
        if alpha is not None:
            check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)

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
            detach_focus=self.detach_focus,
            normalizer=normalizer,
            **self.shared_options(),
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
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. The mean is still
            over the number of labelled entries.
        pos_weight: Weight `w` of positives, above 0; one number or one per Action Unit.
        soft_labels: Whether numbers between 0 and 1 are labels; the loss is linear in them.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does where that costs nothing, on a
            CPU. Elsewhere, and in compiled code, it makes loss and gradient NaN.
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
            class_weight,
            soft_labels,
            ignore_index,
            check_labels,
            reduction,
            pos_weight=pos_weight,
        )
        check_all("pos_weight", self.pos_weight, open_low=True)

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
            normalizer=normalizer,
            **self.shared_options(),
        )

    @property
    def posterior_options(self) -> dict[str, Any]:
        """Options of `asymmetric_posterior` that describe this loss."""
        weights = {} if self.pos_weight is None else {"pos_weight": self.pos_weight}
        return {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0, **weights}
