"""Everything that moves in a training loop, as one state that is saved and restored together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from mmau.training.state_files import StateFileError, StateFiles
from mmau.training.trainable_tensors import restore_tensors, trainable_tensors

__all__ = ["HasState", "Resumable"]


class HasState(Protocol):
    """An optimiser, a gradient scaler, an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take it up again."""


class Resumable:
    """Save and restore a model with all that trains it.

    Not in it, since they follow from the step: learning rate, order of the data, random numbers.
    See `set_learning_rates`, `StepOrder` and `seed_everything`.

    Args:
        states: Where the states are.
        model: Its trainable tensors are saved; what is frozen comes from elsewhere.
        parts: Name to what else has a state; `None` for what this run does not use.

    Examples:
        >>> import tempfile, torch
        >>> model, states = nn.Linear(1, 1), StateFiles(tempfile.mkdtemp())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = Resumable(states, model, {"optimizer": optimizer, "scaler": None})
        >>> run.resume()
        (0, {})
        >>> run.save(7, {"loss": 0.5})
        >>> run.resume()
        (7, {'loss': 0.5})
    """

    def __init__(
        self, states: StateFiles, model: nn.Module, parts: Mapping[str, HasState | None]
    ) -> None:
        self.states = states
        self.model = model
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def save(self, step: int, counters: Mapping[str, Any]) -> None:
        """Write the state after a step.

        Args:
            step: Steps taken so far.
            counters: Plain numbers of the loop, such as the loss of the epoch so far.

        Raises:
            StateFileError: If it cannot be written.
        """
        tensors = {name: t.detach() for name, t in trainable_tensors(self.model).items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"model": tensors, "parts": parts, "counters": dict(counters)}
        self.states.save(step, state)

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Take up the newest state, if there is one.

        Returns:
            Steps taken so far, and the counters; 0 and nothing for a new run.

        Raises:
            StateFileError: If it is damaged, or of another model or other parts.
        """
        path = self.states.newest()
        if path is None:
            return 0, {}
        step, state = self.states.load(path)
        if set(state["parts"]) != set(self.parts):
            raise StateFileError(
                f"{path} holds the state of {', '.join(sorted(state['parts']))}; this run has "
                f"{', '.join(sorted(self.parts))}."
            )
        try:
            restore_tensors(self.model, state["model"])
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except ValueError as error:
            raise StateFileError(f"{path} is of another run: {error}") from error
        return step, state["counters"]
