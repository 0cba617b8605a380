"""The best validation score of a run, and when to give up waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmau._checks import check_range

__all__ = ["BestSoFar"]


class BestSoFar:
    """Remember the highest score, and stop a run that has not improved for long.

    Args:
        patience: Scores without an improvement after which `exhausted` is true; never if `None`.

    Raises:
        ValueError: If `patience` is below 1.

    Examples:
        >>> best = BestSoFar(patience=2)
        >>> [best.update(score) for score in (0.4, 0.6, 0.5, 0.6)]
        [True, True, False, False]
        >>> best.score, best.exhausted
        (0.6, True)
    """

    def __init__(self, *, patience: int | None = None) -> None:
        if patience is not None:
            check_range("patience", patience, 1)
        self.patience = patience
        self.score = -math.inf
        self.since = 0

    def update(self, score: float) -> bool:
        """Take in a score.

        Args:
            score: Higher is better; NaN is never an improvement.

        Returns:
            Whether it is the best so far.
        """
        better = score > self.score
        self.score = score if better else self.score
        self.since = 0 if better else self.since + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs.

        Returns:
            Score and how many scores ago it was.
        """
        return {"score": self.score, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was called.

        Args:
            state: As returned by `state_dict`.
        """
        self.score, self.since = float(state["score"]), int(state["since"])
