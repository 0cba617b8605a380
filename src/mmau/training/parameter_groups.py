"""Which parameter learns how fast, and which decays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmau._checks import check_range

__all__ = ["parameter_groups"]


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
    carry `_no_weight_decay = True` (`A_log`, the bias of Delta). Frozen parameters are left out, so
    the optimiser keeps no state for them.

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
        decays = parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)
        groups[kind if decays else f"{kind}, no decay"]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError(f"{type(model).__name__} has no trainable parameter.")
    return used
