"""One probability from several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes

__all__ = ["ensemble"]

# Odds of an exact 0 or 1 are not finite: one certain model would outvote all others.
CERTAIN = 1e-7


def ensemble(
    probs: Sequence[Tensor],
    *,
    average: Literal["logit", "probability"] = "logit",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Average the probabilities of several models or checkpoints.

    `"logit"` averages log-odds, $\sigma(\sum_k w_k\, \text{logit}(p_k))$: a model that is sure
    counts for more, and the result is sharp where all agree. `"probability"` averages
    $\sum_k w_k\, p_k$: the result is never surer than the surest model. Models that were trained
    with different losses mean different things by one number: give their posteriors
    (`loss.posterior(logits)`), not their sigmoids.

    Args:
        probs: At least one `(..., c)` tensor in [0, 1], all of one shape. NaN stays NaN.
        average: `"logit"` or `"probability"`. For `"logit"`, probabilities are kept 1e-7 away from
            0 and 1.
        weights: One weight per model, not negative, not all 0; equal if left out. They are divided
            by their sum.

    Returns:
        `(..., c)`, in the dtype of the first.

    Raises:
        ValueError: If there is nothing to average, shapes differ, a probability is outside [0, 1],
            or an option is out of range.

    Examples:
        >>> import torch
        >>> models = [torch.tensor([0.5]), torch.tensor([0.9])]
        >>> ensemble(models), ensemble(models, average="probability")  # odds 1 and 9: 3
        (tensor([0.7500]), tensor([0.7000]))
    """
    check_choice("average", average, ("logit", "probability"))
    if len(probs) == 0:
        raise ValueError("`probs` must hold the probabilities of at least one model; got none.")
    for i, prob in enumerate(probs):
        check_shapes(sizes=None, **{f"probs[{i}]": (prob, "... c")})
        if prob.shape != probs[0].shape:
            raise ValueError(
                f"`probs` must have one shape; got {tuple(probs[0].shape)} and, at {i}, "
                f"{tuple(prob.shape)}."
            )
        if bool(((prob < 0) | (prob > 1)).any()):
            raise ValueError(
                f"`probs[{i}]` must be in [0, 1]; got values from {float(prob.min()):g} to "
                f"{float(prob.max()):g}. Are these logits?"
            )
    given = [1.0] * len(probs) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(probs):
        raise ValueError(f"`weights` must be {len(probs)} numbers; got {len(given)}.")
    for weight in given:
        check_range("weights", weight, 0, float("inf"), open_high=True)
    if sum(given) == 0:
        raise ValueError("`weights` must not all be 0.")
    stacked = torch.stack([prob.double() for prob in probs])
    share = torch.tensor(given, dtype=torch.float64, device=stacked.device) / sum(given)
    share = share.reshape(-1, *[1] * probs[0].dim())
    if average == "probability":
        return (share * stacked).sum(0).to(probs[0].dtype)
    odds = stacked.clamp(CERTAIN, 1 - CERTAIN).logit()
    return (share * odds).sum(0).sigmoid().to(probs[0].dtype)
