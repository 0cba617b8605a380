"""Stop before a loss that is not a number spoils the weights."""

from __future__ import annotations

import math

__all__ = ["NotFiniteError", "check_finite"]


class NotFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the weights are still those of the step before."""


def check_finite(where: str, **numbers: float) -> None:
    """Raise if a number is NaN or infinite; called after backward and before the optimiser's step.

    Args:
        where: Step and clips, for the sentence.
        **numbers: Name to value, such as `loss` and `gradient_norm`.

    Raises:
        NotFiniteError: If one is not finite.

    Examples:
        >>> check_finite("step 3, on clip a", loss=float("nan"))
        Traceback (most recent call last):
        ...
        mmau.training.finite.NotFiniteError: the loss is nan at step 3, on clip a.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"the {name.replace('_', ' ')} is {value} at {where}.")
