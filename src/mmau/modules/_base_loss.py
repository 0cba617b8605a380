"""What the loss modules share: they keep their options, check them once, and print them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_range
from mmau.functional._masked_loss import PerClass, Reduction
from mmau.functional.asymmetric_posterior import (
    asymmetric_posterior,
    logits_from_asymmetric_posterior,
)

__all__ = ["BaseLoss", "check_all"]

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
        """Turn logits trained with this loss into calibrated probabilities, in closed form.

        Args:
            logits: `(..., c)`, one unbounded score per Action Unit.

        Returns:
            `(..., c)`, probability in [0, 1].
        """
        return asymmetric_posterior(logits, **self.posterior_options)

    def logits_from_posterior(self, prob: Tensor) -> Tensor:
        """Find the logits that `posterior` turns into given probabilities.

        For a threshold on the posterior that is applied to logits, and for the bias of a last layer
        that should start at the frequency of each Action Unit.

        Args:
            prob: `(..., c)`, probability in [0, 1].

        Returns:
            `(..., c)`, logits.
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
