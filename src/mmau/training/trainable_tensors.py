"""The part of a model that training changes: what a state must hold, and nothing that is frozen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["restore_tensors", "trainable_tensors"]


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name the live tensors that change in training: trainable parameters, persistent buffers.

    Frozen parameters come from where they came from: a download, the seed, or an earlier stage.

    Args:
        model: The model.

    Returns:
        Name to tensor, not copies.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).requires_grad_(False)
        >>> _ = model[1].requires_grad_(True)
        >>> sorted(trainable_tensors(model))
        ['1.bias', '1.num_batches_tracked', '1.running_mean', '1.running_var', '1.weight']
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in frozen}


@torch.no_grad()
def restore_tensors(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors in place, if names and shapes agree exactly; else touch nothing.

    Args:
        model: The model.
        saved: Name to value, as `trainable_tensors` named them.

    Raises:
        ValueError: If a name is missing or superfluous, or a shape differs.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> restore_tensors(model, {"weight": torch.zeros(1, 1)})
        Traceback (most recent call last):
        ...
        ValueError: the saved state does not fit Linear: 'bias' is missing.
    """
    live = trainable_tensors(model)
    for name in sorted(live.keys() | saved.keys()):
        problem = None
        if name not in saved:
            problem = "is missing"
        elif name not in live:
            problem = "has no place in it"
        elif live[name].shape != saved[name].shape:
            problem = f"has shape {tuple(saved[name].shape)}, not {tuple(live[name].shape)}"
        if problem:
            raise ValueError(
                f"the saved state does not fit {type(model).__name__}: {name!r} {problem}."
            )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
