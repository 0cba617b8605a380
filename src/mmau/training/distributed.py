"""What several processes need to train and to prepare data as one; with one process, no-ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from mmau._checks import check_range

__all__ = ["gather_by_name", "rank_and_size", "share_longest_first", "sum_over_ranks"]

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process and how many there are: (0, 1) without a process group.

    Returns:
        Rank and size.

    Examples:
        >>> rank_and_size()
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up a tensor over all processes; every one gets the sum, no gradient flows.

    To normalise a loss by the labelled entries of all processes, divide its sum by the sum of their
    counts and multiply by the number of processes, which `DistributedDataParallel` divides by: the
    mean of the means of each process weighs labels differently.

    Args:
        value: Same shape and dtype in every process; not changed.

    Returns:
        The sum, detached.

    Examples:
        >>> import torch
        >>> sum_over_ranks(torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """
    total = value.detach().clone()
    if rank_and_size()[1] > 1:
        dist.all_reduce(total)
    return total


def gather_by_name(mine: Mapping[str, T]) -> dict[str, T]:
    """Collect what every process has found out about its share, such as logits of its videos.

    Args:
        mine: Name to a value that can be pickled; names must differ between processes.

    Returns:
        All of them, sorted by name, the same in every process.

    Raises:
        ValueError: If two processes have the same name.

    Examples:
        >>> gather_by_name({"b": 2, "a": 1})
        {'a': 1, 'b': 2}
    """
    num_ranks = rank_and_size()[1]
    shares: list[Any] = [dict(mine)]
    if num_ranks > 1:
        shares = [None] * num_ranks
        dist.all_gather_object(shares, dict(mine))
    collected: dict[str, T] = {}
    for share in shares:
        twice = sorted(set(share) & set(collected))
        if twice:
            raise ValueError(f"two processes have {twice[0]!r}; each must have its own share.")
        collected.update(share)
    return dict(sorted(collected.items()))


def share_longest_first(sizes: Mapping[str, float], num_ranks: int) -> list[list[str]]:
    """Deal jobs of known size to processes so that all finish at about the same time.

    The longest job goes first, each to the process that has least to do. The result depends on the
    arguments alone, so processes agree without talking.

    Args:
        sizes: Name to size (bytes of a video, number of frames), not negative.
        num_ranks: Number of processes.

    Returns:
        For each process its names, longest first; some may be empty.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> share_longest_first({"a": 5, "b": 3, "c": 3, "d": 1}, 2)
        [['a', 'd'], ['b', 'c']]
    """
    check_range("num_ranks", num_ranks, 1)
    for name, size in sizes.items():
        check_range(f"sizes[{name!r}]", size, 0)
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares
