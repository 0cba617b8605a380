"""One prepared video: aligned faces, landmarks and sound, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mmau._files import whole_file
from mmau.media.errors import MediaError

__all__ = ["TRIAL_FORMAT", "CacheError", "PreparedTrial", "is_prepared", "load_trial", "save_trial"]

TRIAL_FORMAT = "mmau.trial/1"
"""Written into every file; changes when the meaning of its content does."""


class CacheError(MediaError):
    """A prepared file is missing, corrupt, or was made from something else."""


@dataclass(frozen=True)
class PreparedTrial:
    """One video, ready for encoders: row `i` is the `i`-th decoded frame."""

    name: str
    """Name of the trial."""
    crops: NDArray[np.uint8]
    """`(t, s, s, 3)`, RGB, aligned faces; zeros where `valid` is False."""
    landmarks: NDArray[np.float32]
    """`(t, 68, 2)`, iBUG-68, in crop pixels; NaN where `valid` is False."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found."""
    confidence: NDArray[np.float32]
    """`(t,)`, in [0, 1]; 0 where `valid` is False."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds on the clock of the container."""
    waveform: NDArray[np.float32] | None
    """`(n,)`, 16 kHz mono in [-1, 1], or `None` for a video without sound."""
    audio_start: float
    """Seconds on the same clock; sample `j` is at `audio_start + j / 16000`. 0 without sound."""
    num_frames_announced: int | None
    """How many frames the container announced, or `None`."""
    warnings: tuple[str, ...] = field(default=())
    """What was odd about the source: missing frames, damaged packets."""

    def __post_init__(self) -> None:
        t, size = self.crops.shape[:2] if self.crops.ndim == 4 else (-1, -1)
        expected = {
            "crops": ((t, size, size, 3), np.uint8),
            "landmarks": ((t, 68, 2), np.float32),
            "valid": ((t,), np.bool_),
            "confidence": ((t,), np.float32),
            "timestamps": ((t,), np.float64),
        }
        for name, (shape, kind) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != kind:
                raise ValueError(
                    f"`{name}` must be {np.dtype(kind).name} {_show(shape)}; "
                    f"got {array.dtype.name} {array.shape}."
                )
        if self.waveform is not None and (
            self.waveform.ndim != 1 or self.waveform.dtype != np.float32
        ):
            raise ValueError(
                "`waveform` must be float32 (n,); "
                f"got {self.waveform.dtype.name} {self.waveform.shape}."
            )

    @property
    def num_frames(self) -> int:
        """Rows `t`."""
        return len(self.valid)

    @property
    def crop_size(self) -> int:
        """Side of the crops, in pixels."""
        return int(self.crops.shape[1])


def _show(shape: tuple[int, ...]) -> str:
    letters = {-1: "t"}
    return "(" + ", ".join(letters.get(size, str(size)) for size in shape) + ")"


def save_trial(
    trial: PreparedTrial, path: str | os.PathLike[str], *, fingerprint: str = ""
) -> Path:
    """Write a prepared trial as one safetensors file, complete or not at all.

    Args:
        trial: What to write.
        path: File to write or replace; its folder is made if need be.
        fingerprint: What it was made from, by `source_fingerprint`.

    Returns:
        The path.

    Examples:
        ```python
        save_trial(prepare_video("talk.mp4"), "prepared/talk.safetensors")
        ```
    """
    target = Path(path)
    arrays = _arrays(trial)
    metadata = {
        "format": TRIAL_FORMAT,
        "fingerprint": fingerprint,
        "sha256": _digest(arrays),
        "trial": json.dumps(
            {
                "name": trial.name,
                "audio_start": trial.audio_start,
                "num_frames_announced": trial.num_frames_announced,
                "warnings": trial.warnings,
            }
        ),
    }
    with whole_file(target) as partial, partial.open("wb") as stream:
        stream.write(safetensors.numpy.save(arrays, metadata=metadata))
        stream.flush()
        os.fsync(stream.fileno())
    return target


def load_trial(
    path: str | os.PathLike[str],
    *,
    fingerprint: str | None = None,
    verify: bool = True,
    memory_map: bool = False,
) -> PreparedTrial:
    """Read a prepared trial.

    Args:
        path: File written by `save_trial`.
        fingerprint: What it must have been made from, or `None` for anything.
        verify: Whether to check the content against its checksum, which reads all of it.
        memory_map: Leave the arrays on disk until a part of them is used, so that clips of a data
            set that does not fit into memory can be cut from it. Changes are not written back.

    Returns:
        The trial.

    Raises:
        CacheError: If the file is missing, cut, altered, not a prepared trial, of another version,
            or stale.

    Examples:
        >>> load_trial("prepared/nobody.safetensors")
        Traceback (most recent call last):
        ...
        mmau.data.prepared_trial.CacheError: no such prepared file: prepared/nobody.safetensors
    """
    file = Path(path)
    metadata = _read_metadata(file)
    _check_fresh(file, metadata, fingerprint)
    try:
        arrays = _map_arrays(file) if memory_map else safetensors.numpy.load_file(file)
        about = json.loads(metadata["trial"])
        if verify and _digest(arrays) != metadata["sha256"]:
            raise CacheError(f"the content was altered after it was written; delete it: {file}")
        return PreparedTrial(
            name=about["name"],
            crops=arrays["crops"],
            landmarks=arrays["landmarks"],
            valid=arrays["valid"],
            confidence=arrays["confidence"],
            timestamps=arrays["timestamps"],
            waveform=arrays.get("waveform"),
            audio_start=about["audio_start"],
            num_frames_announced=about["num_frames_announced"],
            warnings=tuple(about["warnings"]),
        )
    except CacheError:
        raise
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CacheError(f"not a complete prepared file; delete it: {file} ({error})") from error


def is_prepared(path: str | os.PathLike[str], fingerprint: str) -> bool:
    """Tell whether a file is there and was made from this source with these options.

    Args:
        path: File written by `save_trial`.
        fingerprint: What it must have been made from.

    Returns:
        False if there is no such file.

    Raises:
        CacheError: If there is one, but cut, of another version, or stale.

    Examples:
        >>> is_prepared("prepared/nobody.safetensors", "")
        False
    """
    file = Path(path)
    if not file.exists():
        return False
    _check_fresh(file, _read_metadata(file), fingerprint)
    return True


def _arrays(trial: PreparedTrial) -> dict[str, NDArray[Any]]:
    named = {part.name: getattr(trial, part.name) for part in fields(trial)}
    return {
        name: np.ascontiguousarray(value)
        for name, value in named.items()
        if isinstance(value, np.ndarray)
    }


_NUMPY_TYPES = {"U8": np.uint8, "BOOL": np.bool_, "F32": np.float32, "F64": np.float64}


def _map_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Arrays that lie in the file: behind 8 bytes of length and a JSON header with their places."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(
            file,
            dtype=_NUMPY_TYPES[entry["dtype"]],
            # Copy on write: torch warns about arrays that it could not write to.
            mode="c",
            offset=8 + size + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """A checksum of names and contents; safetensors by itself notices cuts but not flipped bits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read_metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise CacheError(f"no such prepared file: {file}")
    try:
        with safetensors.safe_open(file, framework="numpy") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CacheError(f"not a complete prepared file; delete it: {file} ({error})") from error
    if metadata.get("format") != TRIAL_FORMAT:
        raise CacheError(
            f"not a prepared trial of this version ({TRIAL_FORMAT}) but "
            f"{metadata.get('format', 'something else')!r}: {file}"
        )
    return metadata


def _check_fresh(file: Path, metadata: Mapping[str, str], fingerprint: str | None) -> None:
    if fingerprint is None or metadata["fingerprint"] == fingerprint:
        return
    try:
        before, now = json.loads(metadata["fingerprint"]), json.loads(fingerprint)
    except json.JSONDecodeError:
        before, now = {}, {}
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    raise CacheError(
        f"the prepared file is stale ({', '.join(changed) or 'no record of its source'}); "
        f"delete it or use another folder: {file}"
    )
