"""What features are computed from, what they will take up, and how they are read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from mmau.data.prepared_trial import CacheError

__all__ = [
    "CacheEstimate",
    "CachedTrials",
    "FeatureCacheError",
    "FeatureSource",
    "prepared_sources",
    "size_in_words",
]


class FeatureCacheError(CacheError):
    """The features of some trials could not be computed; those of the others were.

    Args:
        failures: Name to reason.
        files: Name to file, of those that are ready.
    """

    def __init__(self, failures: Mapping[str, str], files: Mapping[str, Path]) -> None:
        self.failures = dict(failures)
        self.files = dict(files)
        listed = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
        total = len(self.failures) + len(self.files)
        super().__init__(f"no features of {len(self.failures)} of {total} trials: {listed}")


@dataclass(frozen=True)
class FeatureSource:
    """What the features of one trial are computed from."""

    name: str
    """Name of the trial; may contain `/`, for sub-folders."""
    path: Path
    """A prepared trial, or any other file."""
    num_frames: int
    """Rows that the features will have."""


@dataclass(frozen=True)
class CacheEstimate:
    """What a call of `fill` will write; exact, since sizes follow from the layout."""

    num_trials: int
    """Trials of this rank's share."""
    num_done: int
    """Those that are ready."""
    total_bytes: int
    """Bytes of all files of the share."""
    missing_bytes: int
    """Bytes that are still to be written."""
    free_bytes: int
    """Bytes that are free on the disk of the folder."""

    @property
    def fits(self) -> bool:
        """Whether there is room for what is missing."""
        return self.missing_bytes <= self.free_bytes

    def __str__(self) -> str:
        total, missing, free = (
            size_in_words(number)
            for number in (self.total_bytes, self.missing_bytes, self.free_bytes)
        )
        return (
            f"{self.num_trials} trials, {total}; {self.num_done} are ready, {missing} to be "
            f"written, {free} free"
        )


def prepared_sources(files: Mapping[str, str | os.PathLike[str]]) -> list[FeatureSource]:
    """Describe prepared trials as sources, from their headers alone.

    Args:
        files: Name to prepared file, as `prepare_dataset` returns them.

    Returns:
        One source per file, in their order.

    Raises:
        CacheError: If a file is missing, cut, or no prepared trial.
    """
    sources = []
    for name, given in files.items():
        path = Path(given)
        if not path.is_file():
            raise CacheError(f"no such prepared file: {path}")
        try:
            with safetensors.safe_open(path, framework="numpy") as stream:
                length = stream.get_slice("valid").get_shape()[0]
        except safetensors.SafetensorError as error:
            raise CacheError(f"not a complete prepared file: {path} ({error})") from error
        sources.append(FeatureSource(name, path, int(length)))
    return sources


class CachedTrials(Mapping[str, Mapping[str, Any]]):
    """Trials with cached features, mapped into memory when they are asked for.

    A file is opened, and its checksum computed, the first time, once per process.

    Args:
        load: Reads a trial.
        sources: The trials.
        extra: Name to further arrays with one row per frame.
    """

    def __init__(
        self,
        load: Callable[[FeatureSource], dict[str, Any]],
        sources: Sequence[FeatureSource],
        extra: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.extra = extra
        self._load = load
        self._sources = {source.name: source for source in sources}
        self._open: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array that is sent to a worker would arrive as a copy in memory.
        return {**vars(self), "_open": {}}

    @property
    def lengths(self) -> dict[str, int]:
        """Name to number of frames."""
        return {name: source.num_frames for name, source in self._sources.items()}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._open:
            self._open[name] = self._load(self._sources[name])
        return {**self._open[name], **self.extra.get(name, {})}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def size_in_words(number: int) -> str:
    """Write bytes in the unit that leaves three digits at most.

    Args:
        number: Bytes.

    Returns:
        Such as `12.3 GB`.

    Examples:
        >>> size_in_words(999), size_in_words(1_234_567)
        ('999 B', '1.2 MB')
    """
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
