"""Where the prepared trial, or trials, of one video lie, and whether they are there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mmau._files import whole_file
from mmau.data.prepared_trial import CacheError, is_prepared

__all__ = ["TrialTarget"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TrialTarget:
    """Names of files of one video; one trial, or one per person."""

    folder: Path
    """Where all trials lie."""
    name: str
    """Name of the video's trial."""
    everybody: bool
    """Whether each person is a trial of its own."""

    @classmethod
    def of(cls, folder: Path, name: str, *, everybody: bool) -> TrialTarget:
        """Check a name.

        Args:
            folder: Where all trials lie.
            name: Name of the video's trial.
            everybody: Whether each person is a trial of its own.

        Returns:
            The target.

        Raises:
            ValueError: If the name leads out of the folder, or could be that of a person.
        """
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a trial name must stay inside the folder; got {name!r}.")
        if everybody and re.search(r"_face\d+$", name):
            raise ValueError(
                f"with `face='all'` a trial name must not end in _face and a number; got {name!r}."
            )
        return cls(folder, name, everybody)

    def file(self, number: int = 0) -> Path:
        """The trial of the video, or of the person of this number.

        Args:
            number: Number of the person; of no importance if there is one trial.

        Returns:
            The path.
        """
        return self.folder / f"{self.trial(number)}{_SUFFIX}"

    def trial(self, number: int = 0) -> str:
        """The name of that trial.

        Args:
            number: Number of the person.

        Returns:
            The name.
        """
        return f"{self.name}_face{number}" if self.everybody else self.name

    @property
    def _list_of_people(self) -> Path:
        return self.folder / f"{self.name}.faces.json"

    def trials(self) -> dict[str, Path]:
        """Name to file of what is there, once it is done."""
        if not self.everybody:
            return {self.name: self.file()}
        numbers = json.loads(self._list_of_people.read_text())["faces"]
        return {self.trial(number): self.file(number) for number in numbers}

    def is_done(self, fingerprint: str, *, overwrite: bool) -> bool:
        """Tell whether the trials are there and were made from this source with these options.

        Args:
            fingerprint: What they must have been made from.
            overwrite: Whether a stale or corrupt file counts as absent.

        Returns:
            Whether nothing has to be done.

        Raises:
            CacheError: If a file is stale or corrupt and not to be replaced.
        """
        try:
            if self.everybody and not self._list_of_people.exists():
                return False
            return all(is_prepared(file, fingerprint) for file in self.trials().values())
        except (CacheError, json.JSONDecodeError, KeyError) as error:
            if overwrite:
                return False
            if not isinstance(error, CacheError):
                error = CacheError(f"not a list of people; delete it: {self._list_of_people}")
            raise CacheError(f"{error}; `overwrite=True` replaces it") from error

    def finish(self, numbers: list[int]) -> None:
        """Note who there is, when all files are complete.

        Args:
            numbers: Numbers of the people.
        """
        if self.everybody:
            with whole_file(self._list_of_people) as partial:
                partial.write_text(json.dumps({"faces": sorted(numbers)}))
