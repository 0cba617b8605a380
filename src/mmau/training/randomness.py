"""Random numbers that depend on the step alone, so that a resumed run draws the same ones."""

from __future__ import annotations

import random

import numpy as np
import torch

from mmau._checks import check_range

__all__ = ["seed_everything"]


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a few numbers.

    Called at the start of each step with `(seed, step, rank)`, it leaves no state of a random
    generator to save: dropout of step 1000 is the same whether steps 0 to 999 ran before or not.

    Args:
        *numbers: At least one, none negative; any change of one changes everything that is drawn.

    Raises:
        ValueError: If there is no number, or a negative one.

    Examples:
        >>> seed_everything(7, 1000, 0)
        >>> first = torch.rand(1)
        >>> seed_everything(7, 1000, 0)
        >>> bool(torch.rand(1) == first)
        True
    """
    if not numbers:
        raise ValueError("`numbers` must hold at least one number.")
    for number in numbers:
        check_range("numbers", number, 0)
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]))
    # The legacy generator is the one that other libraries draw from.
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed((int(words[2]) << 32) | int(words[3]))
