"""Exact sums over the processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_over_processes"]


def sum_over_processes(
    counts: Tensor, au_names: tuple[str, ...], group: dist.ProcessGroup | None
) -> Tensor:
    """Add up int64 counts over all processes; a copy where there is only this one.

    Args:
        counts: Any shape, int64, on the CPU.
        au_names: Names of the Action Units, which must be the same everywhere.
        group: Process group; the default one if `None`.

    Returns:
        The sum, on the CPU, the same in every process.

    Raises:
        ValueError: In every process, if they count different Action Units or shapes. Otherwise the
            sum would mix them up, or the processes would wait for each other for ever.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return counts.clone()
    mine = (au_names, tuple(counts.shape))
    everywhere: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, mine, group=group)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            raise ValueError(
                f"all processes must count the same Action Units; process 0 counts "
                f"{everywhere[0]}, process {rank} {other}."
            )
    # NCCL adds on its own GPU only.
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    summed = counts.to(device, copy=True)
    dist.all_reduce(summed, group=group)
    return summed.cpu()
