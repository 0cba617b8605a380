"""One prepared video: aligned faces, landmarks and sound, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mmau.data._prepared_stream import PreparedChunk
from mmau.data._trial_writer import (
    TRIAL_FORMAT,
    DiskFullError,
    combined_digest,
    open_trial,
    trial_columns,
)
from mmau.media.errors import MediaError

__all__ = [
    "TRIAL_FORMAT",
    "CacheError",
    "DiskFullError",
    "PreparedTrial",
    "is_prepared",
    "load_trial",
    "read_about",
    "save_trial",
]

_ROWS_AT_ONCE = 256


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
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """`(t, 4)`, left, top, right, bottom of the landmarks in pixels of the upright frame; NaN where
    `valid` is False, and everywhere if left out."""
    face_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """`(t,)`, number of the person, -1 where `valid` is False; 0 for all if left out."""

    def __post_init__(self) -> None:
        t, size = self.crops.shape[:2] if self.crops.ndim == 4 else (-1, -1)
        if t > 0 and not len(self.boxes):
            object.__setattr__(self, "boxes", np.full((t, 4), np.nan, np.float32))
        if t > 0 and not len(self.face_ids):
            object.__setattr__(self, "face_ids", np.where(self.valid, 0, -1).astype(np.int32))
        for name, (row, kind) in trial_columns(size).items():
            array = getattr(self, name)
            if name != "waveform" and (array.shape != (t, *row) or array.dtype != kind):
                raise ValueError(
                    f"`{name}` must be {kind.name} {_show((t, *row))}; "
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

    @property
    def shortfall(self) -> int:
        """Frames that the container announced and that did not come; 0 if it does not say."""
        return max(0, (self.num_frames_announced or 0) - self.num_frames)

    def rows(self, start: int, stop: int) -> PreparedChunk:
        """Return some frames; of a memory-mapped trial no others are read.

        Args:
            start: First frame.
            stop: One past the last.

        Returns:
            The rows.
        """
        part = slice(start, stop)
        return PreparedChunk(
            crops=self.crops[part],
            landmarks=self.landmarks[part],
            valid=self.valid[part],
            confidence=self.confidence[part],
            timestamps=self.timestamps[part],
            boxes=self.boxes[part],
            face_ids=self.face_ids[part],
            first_frame=start,
        )

    def about(self) -> dict[str, Any]:
        """What a prepared file says besides the arrays."""
        return {
            "name": self.name,
            "audio_start": self.audio_start,
            "num_frames_announced": self.num_frames_announced,
            "warnings": self.warnings,
        }


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
    with open_trial(target, trial.crop_size) as writer:
        for start in range(0, trial.num_frames, _ROWS_AT_ONCE):
            writer.add(trial.rows(start, start + _ROWS_AT_ONCE))
        if trial.waveform is not None:
            writer.add_sound(trial.waveform)
        writer.finish(
            fingerprint=fingerprint, has_sound=trial.waveform is not None, about=trial.about()
        )
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
        arrays.pop("_padding", None)
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
            boxes=arrays["boxes"],
            face_ids=arrays["face_ids"],
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


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a prepared file says besides the arrays, without them.

    Args:
        path: File written by `save_trial` or `prepare_dataset`.

    Returns:
        `name`, `audio_start`, `num_frames_announced`, `warnings` and, from `prepare_dataset`,
        `incomplete`: whether frames are missing or damaged.

    Raises:
        CacheError: If the file is missing, cut, or of another version.
    """
    about: dict[str, Any] = json.loads(_read_metadata(Path(path))["trial"])
    return about


_NUMPY_TYPES = {
    "U8": np.uint8,
    "BOOL": np.bool_,
    "I32": np.int32,
    "F32": np.float32,
    "F64": np.float64,
}


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
    """A checksum of the content; safetensors by itself notices cuts but not flipped bits."""
    return combined_digest(
        {
            name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
            for name, array in arrays.items()
        }
    )


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
