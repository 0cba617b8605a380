"""Which items each process takes in each step, as a function of the seed and the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from mmau._checks import check_range

T = TypeVar("T")


# ------------------------------------------------------------------ between processes
def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
    if _is_distributed():
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
    shares: list[Any] = [dict(mine)]
    if _is_distributed():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, dict(mine))
    collected: dict[str, T] = {}
    for share in shares:
        twice = sorted(set(share) & set(collected))
        if twice:
            raise ValueError(f"two processes have {twice[0]!r}; each must have its own share.")
        collected.update(share)
    return dict(sorted(collected.items()))


# ------------------------------------------------------------------ the order of the data
class ItemKey(NamedTuple):
    """What a data set is asked for: augmentation may depend on `(seed, epoch, item)` only."""

    epoch: int
    """Pass over the data, from 0."""
    item: int
    """Number of the item."""
    counts: bool = True
    """False for padding: a process without a share still takes part, with no labels."""


@dataclass(frozen=True)
class StepOrder:
    """Shuffle items anew in every epoch and cut the order into steps.

    The step is the only cursor: nothing else needs to be saved to resume. The batch of a step is
    the same for any number of processes, which split it among themselves. The last batch of an
    epoch may be smaller; no item is left out or taken twice.

    Args:
        num_items: Number of items, at least 1.
        batch_size: Items of a step, over all processes.
        seed: Seed of the run.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> order = StepOrder(num_items=5, batch_size=2, seed=1)
        >>> order.steps_per_epoch
        3
        >>> sorted(i for step in range(3) for i in order.batch(step))
        [0, 1, 2, 3, 4]
        >>> order.batch(2) == [key.item for key in next(order.micro_batches(range(2, 3)))]
        True
        >>> [[key.counts for key in keys]  # a single item for two processes
        ...  for keys in order.micro_batches(range(2, 3), rank=1, num_ranks=2)]
        [[False]]
    """

    num_items: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("num_items", self.num_items, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("seed", self.seed, 0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the items."""
        return math.ceil(self.num_items / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the items of a step, over all processes.

        Args:
            step: Step of the run, from 0.

        Returns:
            Numbers of the items.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _shuffled(self.num_items, self.seed, epoch)
        return list(order[place * self.batch_size : (place + 1) * self.batch_size])

    def micro_batches(
        self, steps: range, *, rank: int = 0, num_ranks: int = 1, accumulate: int = 1
    ) -> Iterator[list[ItemKey]]:
        """Yield one process's share of every step, in `accumulate` parts: a `batch_sampler`.

        One iterator runs through all epochs, so that workers never stop and a resumed run starts
        right at its step. Every process gets the same number of parts; one with nothing to do gets
        an item whose labels do not count.

        Args:
            steps: Steps of the run.
            rank: Number of this process, from 0.
            num_ranks: Number of processes.
            accumulate: Parts of a step, whose gradients are added up.

        Returns:
            Keys of the items, part by part; those of all processes make up the batch.

        Raises:
            ValueError: If a number is out of range.
        """
        check_range("accumulate", accumulate, 1)
        check_range("num_ranks", num_ranks, 1)
        check_range("rank", rank, 0, num_ranks - 1)

        def keys(step: int, part: int) -> list[ItemKey]:
            epoch = step // self.steps_per_epoch
            batch = self.batch(step)
            mine = batch[rank::num_ranks][part::accumulate]
            return [ItemKey(epoch, i) for i in mine] or [ItemKey(epoch, batch[0], counts=False)]

        return (keys(step, part) for step in steps for part in range(accumulate))


@lru_cache(maxsize=4)
def _shuffled(num_items: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, epoch]).permutation(num_items).tolist())
