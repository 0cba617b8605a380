"""Training states on disk: complete or absent, newest first, never a step that was not finished."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmau._checks import check_range
from mmau._files import atomic_write


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


class NotFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the weights are still those of the step before."""


def check_finite(where: str, **numbers: float) -> None:
    """Raise if a number is NaN or infinite; called after backward and before the optimiser's step.

    Args:
        where: Step and clips, for the message.
        **numbers: Name to value, such as `loss` and `gradient_norm`.

    Raises:
        NotFiniteError: If one is not finite.

    Examples:
        >>> check_finite("step 3, on clip a", loss=float("nan"))
        Traceback (most recent call last):
        ...
        mmau.training.state.NotFiniteError: the loss is nan at step 3, on clip a.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"the {name.replace('_', ' ')} is {value} at {where}.")


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name the live tensors that change in training: trainable parameters, persistent buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in frozen}


@torch.no_grad()
def restore_tensors(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors in place, if names and shapes agree exactly; else touch nothing."""
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


def differing_settings(
    record: str | Path, settings: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> list[str]:
    """Compare the settings that a run was started with to those of now.

    Args:
        record: JSON file that the run left; absent means a new run.
        settings: Nested settings of now; JSON values, paths as text.
        ignore: Dotted names that may differ, such as `"data.jobs"`, with all that lies below.

    Returns:
        One phrase per difference, such as `"optim.lr: 0.001 there, 0.002 here"`; empty if none.

    Raises:
        ValueError: If the file is not a JSON object.

    Examples:
        >>> import tempfile
        >>> record = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = record.write_text('{"optim": {"lr": 0.001}, "out": "a"}')
        >>> differing_settings(record, {"optim": {"lr": 0.002}, "out": "b"}, ignore=["out"])
        ['optim.lr: 0.001 there, 0.002 here']
    """
    record = Path(record)
    if not record.is_file():
        return []
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is not valid JSON: {error}.") from error
    if not isinstance(there, dict):
        raise ValueError(f"{record} does not hold the settings of a run.")
    # Through JSON and back, so that a tuple here equals the list there.
    before, now = _flat(there), _flat(json.loads(json.dumps(settings, default=str)))
    skipped = tuple(ignore)
    return [
        f"{name}: {_shown(before, name)} there, {_shown(now, name)} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
        and not any(name == one or name.startswith(f"{one}.") for one in skipped)
    ]


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "nothing"


class HasState(Protocol):
    """An optimiser, a gradient scaler, an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore it."""


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
        """Restore the newest state, if there is one.

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
        """Return whether a score is the best so far; NaN never is."""
        better = score > self.score
        self.score = score if better else self.score
        self.since = 0 if better else self.since + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and how many scores ago it was."""
        return {"score": self.score, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called."""
        self.score, self.since = float(state["score"]), int(state["since"])


_FORMAT = "mmau.training-state"
_NAME = re.compile(r"step-(\d{8,})\.pt")


class StateFileError(RuntimeError):
    """A training state could not be written or read; the message says what is left."""


class StateFiles:
    """Keep the last states of a run in a folder, so that a killed run resumes where it was.

    A state is written under another name, flushed to the disk and renamed: after a kill, a power
    cut or a full disk there is the state before or the state after, never half of one. Tensors,
    numbers, strings and containers of them can be stored; they are read without running code.

    Args:
        folder: Where the states are; created by the first `save`.
        keep: How many to keep, at least 1; older ones are deleted after a new one is complete.

    Raises:
        ValueError: If `keep` is below 1.

    Examples:
        >>> import tempfile
        >>> states = StateFiles(Path(tempfile.mkdtemp()) / "states")
        >>> states.newest() is None
        True
        >>> for step in (5, 10, 15):
        ...     _ = states.save(step, {"weight": torch.tensor(float(step))})
        >>> [path.name for path in states.paths()]
        ['step-00000010.pt', 'step-00000015.pt']
        >>> step, state = states.load()
        >>> step, state
        (15, {'weight': tensor(15.)})
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        check_range("keep", keep, 1)
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """Return the files of the states, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def newest(self) -> Path | None:
        """Return the file of the last state, if there is one."""
        paths = self.paths()
        return paths[-1] if paths else None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state and delete those that are older than the last `keep`.

        Args:
            step: Steps taken so far, not negative.
            state: What is needed to resume.

        Returns:
            The file.

        Raises:
            StateFileError: If it cannot be written, such as on a full disk; the states before it
                are untouched.
            ValueError: If `step` is negative.
        """
        check_range("step", step, 0)
        path = self.folder / f"step-{step:08d}.pt"
        # Into memory first: torch reports a full disk as an internal error of its zip writer.
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "step": step, "state": dict(state)}, buffer)
        try:
            with atomic_write(path) as partial, partial.open("wb") as stream:
                stream.write(buffer.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            _flush_folder(self.folder)
        except OSError as error:
            last = self.newest()
            kept = f"the run can resume from {last}" if last else "there is no earlier state"
            raise StateFileError(
                f"the state of step {step} could not be written to {self.folder} "
                f"({error.strerror or error}); {kept}."
            ) from error
        killed = self.folder.glob(".step-*.partial.pt")  # what a kill in the middle left behind
        for old in [*self.paths()[: -self.keep], *killed]:
            old.unlink(missing_ok=True)
        return path

    def load(self, path: Path | None = None) -> tuple[int, dict[str, Any]]:
        """Read a state.

        Args:
            path: One of `paths`; the newest if left out.

        Returns:
            Step and state, its tensors on the CPU.

        Raises:
            FileNotFoundError: If there is none.
            StateFileError: If the file is damaged or something else.
        """
        path = path or self.newest()
        if path is None:
            raise FileNotFoundError(f"no training state in {self.folder}.")
        try:
            # From memory, so that any damage is an error here and not in the middle of training.
            content = io.BytesIO(path.read_bytes())
            stored = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            raise StateFileError(
                f"{path} is damaged ({type(error).__name__}); delete it to resume from the "
                "state before it."
            ) from error
        if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
            raise StateFileError(f"{path} is not a training state of mmau.")
        return stored["step"], stored["state"]

    def clear(self) -> None:
        """Delete all states, and the folder if nothing else is in it."""
        for path in self.paths():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not os.listdir(self.folder):
            self.folder.rmdir()


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be flushed."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
