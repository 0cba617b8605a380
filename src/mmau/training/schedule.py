"""The learning rate over the steps of a run."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmau._checks import check_range

__all__ = ["set_learning_rates", "warmup_cosine", "warmup_cosine_factor"]


def warmup_cosine_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    final_factor: float = 0.0,
    constant_steps: int = 0,
    constant_factor: float | None = None,
) -> float:
    r"""Return the share of the peak learning rate at a step.

    $$ f(s) = \frac{s + 1}{w} \;(s < w), \qquad
       f(s) = f_\text{end} + \tfrac12 (1 - f_\text{end})
       \Bigl(1 + \cos \pi \frac{s - w}{\max(1, T - w)}\Bigr) $$

    with warm-up $w$ and total $T$. The first step already learns, the peak is reached at the end of
    the warm-up, and steps after the last one stay at the end value. With `constant_factor` the last
    `constant_steps` leave the cosine and stay at that share: what weight averaging wants.

    Args:
        step: Steps taken so far, from 0.
        warmup_steps: Steps of linear warm-up; 0 for none.
        total_steps: Steps of the whole run.
        final_factor: Share at the end, in [0, 1]; above 0 leaves room for weight averaging.
        constant_steps: Steps at the end that `constant_factor` is for.
        constant_factor: Their share of the peak, in [0, 1]; `None` goes on with the cosine.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [warmup_cosine_factor(s, warmup_steps=2, total_steps=6) for s in (0, 1, 2, 4, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    check_range("total_steps", total_steps, 1)
    check_range("warmup_steps", warmup_steps, 0, total_steps)
    check_range("final_factor", final_factor, 0, 1)
    check_range("constant_steps", constant_steps, 0, total_steps)
    check_range("step", step, 0)
    if constant_factor is not None:
        check_range("constant_factor", constant_factor, 0, 1)
        if step >= total_steps - constant_steps:
            return constant_factor
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_factor: float = 0.0
) -> LambdaLR:
    """Build the scheduler of linear warm-up and cosine decay; each group keeps its own peak.

    Args:
        optimizer: Its groups hold their peak learning rates.
        warmup_steps: Steps of linear warm-up; 0 for none.
        total_steps: Steps of the whole run.
        final_factor: Share of the peak at the end, in [0, 1].

    Returns:
        The scheduler; call `step()` once after each optimiser step.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Section 4.1 of the paper: cosine annealing after five epochs of linear warm-up.
    """
    factor = partial(
        warmup_cosine_factor,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        final_factor=final_factor,
    )
    return LambdaLR(optimizer, factor)


def set_learning_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Give each group its share of its own peak; the step is the only state, so resume is exact.

    The peak of a group is what its `lr` was when this was first called, kept as `initial_lr`.

    Args:
        optimizer: Its groups may have names, as `parameter_groups` gives them.
        factor: Share of the peak, at least 0.

    Returns:
        Name (or number) of each group to its learning rate.

    Raises:
        ValueError: If `factor` is negative.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
        >>> set_learning_rates(optimizer, 0.5), set_learning_rates(optimizer, 0.1)
        ({'0': 0.1}, {'0': 0.02})
    """
    check_range("factor", factor, 0)
    rates = {}
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        rates[str(group.get("name", number))] = group["lr"]
    return rates
