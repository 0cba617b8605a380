"""Training states on disk: complete or absent, newest first, never a step that was not finished."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmau._checks import check_range
from mmau._files import whole_file

__all__ = ["StateFileError", "StateFiles"]

_FORMAT = "mmau.training-state"
_NAME = re.compile(r"step-(\d{8,})\.pt")


class StateFileError(RuntimeError):
    """A training state could not be written or read; the message says what is left."""


class StateFiles:
    """Keep the last states of a run in a folder, so that a killed run goes on where it was.

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
        """List the states, oldest first.

        Returns:
            Their files.
        """
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def newest(self) -> Path | None:
        """Return the file of the last state.

        Returns:
            Its path, or `None` if there is none.
        """
        paths = self.paths()
        return paths[-1] if paths else None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state and delete those that are older than the last `keep`.

        Args:
            step: Steps taken so far, not negative.
            state: What is needed to go on.

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
            with whole_file(path) as partial, partial.open("wb") as stream:
                stream.write(buffer.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            _flush_folder(self.folder)
        except OSError as error:
            last = self.newest()
            kept = f"the run can go on from {last}" if last else "there is no earlier state"
            raise StateFileError(
                f"the state of step {step} could not be written to {self.folder} "
                f"({error.strerror or error}); {kept}."
            ) from error
        killed = self.folder.glob(".step-*.partial.pt")  # what a kill in the middle left behind
        for old in [*self.paths()[: -self.keep], *killed]:
            old.unlink(missing_ok=True)
        return path

    def load(
        self, path: Path | None = None, *, device: str | torch.device = "cpu"
    ) -> tuple[int, dict[str, Any]]:
        """Read a state.

        Args:
            path: One of `paths`; the newest if left out.
            device: Where its tensors shall be.

        Returns:
            Step and state.

        Raises:
            FileNotFoundError: If there is none.
            StateFileError: If the file is damaged or something else.
        """
        path = path or self.newest()
        if path is None:
            raise FileNotFoundError(f"no training state in {self.folder}.")
        try:
            # From memory, so that any damage is an error here and not in the middle of training.
            stored = torch.load(
                io.BytesIO(path.read_bytes()), map_location=device, weights_only=True
            )
        except Exception as error:  # a damaged file raises nearly anything
            raise StateFileError(
                f"{path} is damaged ({type(error).__name__}); delete it to go on from the state "
                "before it."
            ) from error
        if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
            raise StateFileError(f"{path} is not a training state of mmau.")
        return stored["step"], stored["state"]

    def clear(self) -> None:
        """Delete all states, and the folder if nothing else is in it."""
        for path in self.paths():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
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
