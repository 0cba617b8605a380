"""Stochastic weight averaging of some parts of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["SubmoduleAverage"]


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

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._averages.items():
            pairs = zip(average.module.parameters(), self._live[name].parameters(), strict=True)
            for mean, live in pairs:
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
        self._require_updates()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def apply(self) -> None:
        """Put the mean in place of the weights for good.

        Raises:
            RuntimeError: If `update` was never called.
        """
        self._require_updates()
        with torch.no_grad():
            for name, average in self._averages.items():
                pairs = zip(average.module.parameters(), self._live[name].parameters(), strict=True)
                for mean, live in pairs:
                    live.copy_(mean)

    def _require_updates(self) -> None:
        if not self.num_updates:
            raise RuntimeError("there is no mean yet: call `update()` first.")

    def state_dict(self) -> dict[str, Any]:
        """Return the means, for a checkpoint.

        Returns:
            Name of the sub-module to the state of its average.
        """
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up means that `state_dict` returned.

        Args:
            state: As returned by `state_dict`.

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
