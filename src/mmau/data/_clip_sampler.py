"""In which order the clips of an epoch come, on which rank, and from where on after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from mmau._checks import check_choice, check_range

__all__ = ["ClipSampler"]


class ClipSampler(Sampler[int]):
    """Shuffle the clips by (seed, epoch) alone, and give each rank its share.

    The order depends on nothing else: not on what was drawn before, nor on the global generator,
    nor on the number of ranks. So a run is continued from three numbers, (seed, epoch, position):
    `position` counts the clips of the epoch that all ranks together have taken, and the rest is
    dealt out again, on as many ranks as there are then. Count steps in the training loop and not in
    the sampler, which runs ahead of it when a loader has workers.

    Args:
        num_clips: Number of clips.
        seed: Seed of the run.
        shuffle: Whether to shuffle; in order otherwise.
        rank: Which share is ours, 0 to `world_size - 1`.
        world_size: Number of shares.
        remainder: What to do when clips cannot be dealt out evenly: `"keep"` them, so that some
            ranks have one more (each clip once: right for evaluation); `"drop"` them for this
            epoch; or `"repeat"` the first ones, so that all ranks take the same number of steps.

    Raises:
        ValueError: If a number is out of range or a word unknown.

    Examples:
        >>> sampler = ClipSampler(5, seed=1)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(sampler) == sorted(first), list(sampler) == first
        (True, False)
        >>> resumed = ClipSampler(5, seed=1)
        >>> resumed.load_state_dict({"seed": 1, "num_clips": 5, "epoch": 0, "position": 2})
        >>> list(resumed) == first[2:]
        True
    """

    def __init__(
        self,
        num_clips: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        remainder: Literal["keep", "drop", "repeat"] = "keep",
    ) -> None:
        if num_clips < 0 or seed < 0:
            raise ValueError(
                f"`num_clips` and `seed` must not be negative; got {num_clips} and {seed}."
            )
        check_range("world_size", world_size, 1)
        check_range("rank", rank, 0, world_size - 1)
        check_choice("remainder", remainder, ("keep", "drop", "repeat"))
        self.num_clips = num_clips
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.remainder = remainder
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int, *, position: int = 0) -> None:
        """Choose the order of an epoch, and where in it to start.

        Args:
            epoch: Epoch, counted from 0.
            position: Clips of this epoch that all ranks together have taken already.

        Raises:
            ValueError: If one of them is out of range.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must not be negative; got {epoch}.")
        # With "repeat", an epoch ends a little beyond its last clip.
        check_range("position", position, 0, self.num_clips + self.world_size - 1)
        self.epoch = epoch
        self.position = position

    def state_dict(self, position: int) -> dict[str, int]:
        """Describe where the run is; goes into its checkpoint.

        Args:
            position: Clips of this epoch that all ranks together have taken: steps times clips per
                step times ranks.

        Returns:
            Plain numbers.

        Raises:
            ValueError: If the position is out of range.
        """
        check_range("position", position, 0, self.num_clips + self.world_size - 1)
        return {
            "seed": self.seed,
            "num_clips": self.num_clips,
            "epoch": self.epoch,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where a run was stopped.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it is of another order: another seed or another number of clips.
        """
        for name in ("seed", "num_clips"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the run that is resumed had `{name}` {state[name]}, this one has "
                    f"{getattr(self, name)}: its order cannot be continued."
                )
        self.set_epoch(state["epoch"], position=state["position"])

    def _share(self) -> tuple[int, int]:
        """Clips that are left, and how many of them (or beyond them) are dealt out."""
        left = max(self.num_clips - self.position, 0)
        uneven = left % self.world_size
        if self.remainder == "keep" or not uneven:
            return left, left
        return left, left - uneven + (self.world_size if self.remainder == "repeat" else 0)

    def __len__(self) -> int:
        _, dealt = self._share()
        return len(range(self.rank, dealt, self.world_size))

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_clips)
        else:
            order = np.arange(self.num_clips)
        left, dealt = self._share()
        rest = order[self.position :]
        if dealt > left:
            # From the start of the epoch again, as often as it takes.
            rest = np.concatenate([rest, np.resize(order, dealt - left)])
        return iter(rest[:dealt][self.rank :: self.world_size].tolist())
