"""Learning rates, parameter groups and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from mmau._checks import check_range


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
        constant_factor: Their share of the peak, in [0, 1]; `None` continues the cosine.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    References:
        Section 4.1 of the paper: cosine annealing after five epochs of linear warm-up.

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


def parameter_groups(
    model: nn.Module,
    *,
    lr: float = 2e-4,
    lr_adapters: float = 1e-5,
    weight_decay: float = 1e-4,
    adapters_in: Sequence[str] = ("visual_encoder", "audio_encoder"),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model into groups for an optimiser.

    What lies inside a pretrained encoder (LoRA, adapters) learns at `lr_adapters`, everything else
    at `lr`. Biases, scales of normalisations and other vectors do not decay, nor do parameters that
    the class of their module names in `no_weight_decay` (`A_log`, the bias of Delta), or that carry
    `_no_weight_decay = True`, as those of other Mamba libraries do. Frozen parameters are left out,
    so the optimiser keeps no state for them.

    Args:
        model: The model.
        lr: Peak learning rate of the new modules.
        lr_adapters: Peak learning rate of trainable weights inside the encoders.
        weight_decay: Decay of the matrices.
        adapters_in: Names of the sub-modules that count as pretrained encoders; empty where the
            encoders are trained from scratch. A name that the model has not is an error, one whose
            sub-module is `None` is not.

    Returns:
        Up to four groups with the keys `name`, `params`, `lr`, `weight_decay`; none is empty.

    Raises:
        ValueError: If nothing is trainable, or `adapters_in` names no sub-module of the model.

    References:
        Section 4.1 of the paper: AdamW, weight decay 1e-4, 2e-4 for new modules, 1e-5 for LoRA.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> groups = parameter_groups(model, adapters_in=["encoder"])
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('new', 0.0002, 0.0001), ('new, no decay', 0.0002, 0.0), ('adapters', 1e-05, 0.0001),
         ('adapters, no decay', 1e-05, 0.0)]
    """
    check_range("lr", lr, 0)
    check_range("lr_adapters", lr_adapters, 0)
    check_range("weight_decay", weight_decay, 0)
    for name in adapters_in:
        owner, _, leaf = name.rpartition(".")
        if not hasattr(model.get_submodule(owner), leaf):
            raise ValueError(
                f"`adapters_in` names {name!r}, which {type(model).__name__} does not have."
            )
    # By name: a mark on a parameter is lost when another object takes its place.
    exempt = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    prefixes = tuple(f"{name}." for name in adapters_in)
    groups: dict[str, dict[str, Any]] = {}
    for kind, rate in (("new", lr), ("adapters", lr_adapters)):
        for suffix, decay in (("", weight_decay), (", no decay", 0.0)):
            name = kind + suffix
            groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": decay}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "adapters" if name.startswith(prefixes) else "new"
        marked = id(parameter) in exempt or getattr(parameter, "_no_weight_decay", False)
        decays = parameter.ndim > 1 and not marked
        groups[kind if decays else f"{kind}, no decay"]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError(f"{type(model).__name__} has no trainable parameter.")
    return used


class SubmoduleAverage:
    r"""Keep the running mean of the weights of named sub-modules, and put it in their place.

    $$ \bar\theta_n = \bar\theta_{n-1} + (\theta_n - \bar\theta_{n-1}) / n $$

    The paper averages the temporal and the alignment modules over the last epochs and leaves the
    encoders alone. A cosine schedule that ends at zero makes this nearly a no-op; end it higher.

    Args:
        model: The model.
        names: Names of its sub-modules, such as `("hga", "temporal", "head")`.

    Raises:
        ValueError: If the model has no such sub-module, or two names overlap.

    References:
        Section 4.2 of the paper. Izmailov et al., *Averaging Weights Leads to Wider Optima*, 2018.

    Examples:
        >>> model = nn.ModuleDict({"head": nn.Linear(1, 1, bias=False)})
        >>> average = SubmoduleAverage(model, ["head"])
        >>> for value in (1.0, 3.0):
        ...     _ = nn.init.constant_(model["head"].weight, value)
        ...     average.update()
        >>> with average.swapped_in():
        ...     model["head"].weight.item()
        2.0
        >>> model["head"].weight.item()
        3.0
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._live: dict[str, nn.Module] = {}
        known = {name: module for name, module in model.named_modules() if name}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"cannot average {name!r}: {type(model).__name__} has no such sub-module; "
                    f"it has {', '.join(n for n in known if '.' not in n)}."
                )
            for other in self._live:
                if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                    raise ValueError(f"`names` lists {name!r} twice: it overlaps {other!r}.")
            self._live[name] = known[name]
        self._averages = {name: AveragedModel(module) for name, module in self._live.items()}

    @property
    def num_updates(self) -> int:
        """How many sets of weights went into the mean."""
        return max((int(a.n_averaged) for a in self._averages.values()), default=0)

    def update(self) -> None:
        """Take the current weights into the mean."""
        for name, average in self._averages.items():
            average.update_parameters(self._live[name])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the mean and the weight of every parameter."""
        if not self.num_updates:
            raise RuntimeError("there is no mean yet: call `update()` first.")
        for name, average in self._averages.items():
            yield from zip(average.module.parameters(), self._live[name].parameters(), strict=True)

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, live in self._pairs():
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the mean in place of the weights, then put them back.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If `update` was never called.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights for good.

        Raises:
            RuntimeError: If `update` was never called.
        """
        for mean, live in self._pairs():
            live.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each average, under the name of its sub-module."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore means that `state_dict` returned.

        Args:
            state: Name of each sub-module to the state of its average.

        Raises:
            ValueError: If it is for other sub-modules.
        """
        if set(state) != set(self._averages):
            raise ValueError(
                f"the saved average is of {', '.join(sorted(state)) or 'nothing'}; "
                f"expected {', '.join(sorted(self._averages)) or 'nothing'}."
            )
        for name, average in self._averages.items():
            average.load_state_dict(state[name])
