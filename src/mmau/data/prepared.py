"""One prepared video: aligned faces, landmarks and sound, and the file that keeps them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mmau._files import atomic_write, lock_file, remove_abandoned
from mmau.media.errors import MediaError


@dataclass(frozen=True)
class PreparedChunk:
    """Consecutive frames of one trial: row `i` is frame `first_frame + i`.

    A frame without a face is a row too: `valid` is False, its crop is black, and its landmarks and
    box are NaN, so that it cannot pass for a face by mistake.
    """

    crops: NDArray[np.uint8]
    """`(t, s, s, 3)`, RGB, aligned faces."""
    landmarks: NDArray[np.float32]
    """`(t, 68, 2)`, iBUG-68, in crop pixels."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found."""
    confidence: NDArray[np.float32]
    """`(t,)`, in [0, 1]; 0 where `valid` is False."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds on the clock of the container."""
    boxes: NDArray[np.float32]
    """`(t, 4)`, left, top, right, bottom of the landmarks, in pixels of the upright frame."""
    face_ids: NDArray[np.int32]
    """`(t,)`, number of the person, -1 where `valid` is False."""
    first_frame: int
    """Number of the first row's frame, counted from 0."""

    @property
    def num_frames(self) -> int:
        """Rows `t`."""
        return len(self.valid)

    @property
    def face_id(self) -> int:
        """Number of the person in most frames of the chunk, -1 if there is nobody."""
        numbers, counts = np.unique(self.face_ids[self.valid], return_counts=True)
        return int(numbers[counts.argmax()]) if len(numbers) else -1


_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TrialTarget:
    """Names of files of one video; one trial, or one per person."""

    folder: Path
    """Where all trials lie."""
    name: str
    """Name of the video's trial."""
    all_faces: bool
    """Whether each person is a trial of its own."""

    @classmethod
    def of(cls, folder: Path, name: str, *, all_faces: bool) -> TrialTarget:
        """Check a name."""
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a trial name must stay inside the folder; got {name!r}.")
        if all_faces and re.search(r"_face\d+$", name):
            raise ValueError(
                f"with `face='all'` a trial name must not end in _face and a number; got {name!r}."
            )
        return cls(folder, name, all_faces)

    def file(self, number: int = 0) -> Path:
        """The trial of the video, or of the person of this number."""
        return self.folder / f"{self.trial(number)}{_SUFFIX}"

    def trial(self, number: int = 0) -> str:
        """The name of that trial."""
        return f"{self.name}_face{number}" if self.all_faces else self.name

    @property
    def _list_of_people(self) -> Path:
        return self.folder / f"{self.name}.faces.json"

    def trials(self) -> dict[str, Path]:
        """Name to file of what is there, once it is done."""
        if not self.all_faces:
            return {self.name: self.file()}
        numbers = json.loads(self._list_of_people.read_text())["faces"]
        return {self.trial(number): self.file(number) for number in numbers}

    def is_done(self, fingerprint: str, *, overwrite: bool) -> bool:
        """Tell whether the trials are there and were made from this source with these options."""
        try:
            if self.all_faces and not self._list_of_people.exists():
                return False
            return all(is_prepared(file, fingerprint) for file in self.trials().values())
        except (CacheError, json.JSONDecodeError, KeyError) as error:
            if overwrite:
                return False
            if not isinstance(error, CacheError):
                error = CacheError(f"not a list of people; delete it: {self._list_of_people}")
            raise CacheError(f"{error}; `overwrite=True` replaces it") from error

    def finish(self, numbers: list[int]) -> None:
        """Note who there is, when all files are complete."""
        if self.all_faces:
            with atomic_write(self._list_of_people) as partial:
                partial.write_text(json.dumps({"faces": sorted(numbers)}))


TRIAL_FORMAT = "mmau.trial/2"
"""Written into every file; changes when the meaning of its content does."""

# Room for the header, which is only known when the last row is written. The format allows blanks
# after it. The sentences in `warnings`, with their paths, are what varies.
_HEADER_BYTES = 1 << 16
_IN_MEMORY = 1 << 20
_TYPE_NAMES = {"uint8": "U8", "bool": "BOOL", "float32": "F32", "float64": "F64", "int32": "I32"}


class DiskFullError(OSError):
    """There is no room for a prepared trial; those that were finished before are kept.

    Args:
        number: What the system said: `errno.ENOSPC` or another.
        path: The file that was to be written.
    """

    def __init__(self, number: int | None, path: Path) -> None:
        super().__init__(number, f"the disk is full; this file was not written: {path}")
        self._arguments = number, path

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[DiskFullError], tuple[int | None, Path]]:
        return type(self), self._arguments  # it comes back from worker processes


def trial_columns(size: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape of a row and type of every column, in the order of the file."""
    return {
        "crops": ((size, size, 3), np.dtype(np.uint8)),
        "timestamps": ((), np.dtype(np.float64)),
        "landmarks": ((68, 2), np.dtype(np.float32)),
        "boxes": ((4,), np.dtype(np.float32)),
        "confidence": ((), np.dtype(np.float32)),
        "face_ids": ((), np.dtype(np.int32)),
        "waveform": ((), np.dtype(np.float32)),
        "valid": ((), np.dtype(np.bool_)),
    }


def combined_digest(digests: dict[str, str]) -> str:
    """One checksum of several, so that each column can be read in its own time."""
    listed = "".join(f"{name}={digests[name]};" for name in sorted(digests))
    return hashlib.sha256(listed.encode()).hexdigest()


class _Column:
    """One array: crops go straight into the trial, the others wait in a file without a name."""

    def __init__(self, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.stream = stream
        self.shape = shape
        self.dtype = dtype
        self.rows = 0
        self.bytes = 0
        self._digest = hashlib.sha256()

    def add(self, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if values.shape[1:] != self.shape:
            raise ValueError(
                f"rows of a trial must have shape {self.shape}; got {values.shape[1:]}."
            )
        if values.size:
            data = values.data.cast("B")
            self.stream.write(data)
            self._digest.update(data)
            self.bytes += len(data)
        self.rows += len(values)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class TrialWriter:
    """Append rows to a prepared trial; memory does not grow with their number.

    Made by `open_trial`.
    """

    def __init__(self, stream: IO[bytes], stack: ExitStack, folder: Path, crop_size: int) -> None:
        self._stream = stream
        self._stack = stack
        self._crop_size = crop_size
        self._columns: dict[str, _Column] = {}
        stream.write(b" " * _HEADER_BYTES)
        for name, (shape, dtype) in trial_columns(crop_size).items():
            beside = stream
            if name != "crops":
                # Anonymous, so that nothing is left of it whatever happens.
                spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder))  # noqa: SIM115
                beside = stack.enter_context(spool)
            self._columns[name] = _Column(beside, shape, dtype)

    @property
    def num_frames(self) -> int:
        """Rows so far."""
        return self._columns["timestamps"].rows

    def add(self, chunk: PreparedChunk) -> None:
        """Append the rows of a chunk."""
        if chunk.first_frame != self.num_frames:
            raise ValueError(
                f"the next chunk must start at frame {self.num_frames}; got {chunk.first_frame}."
            )
        for name, column in self._columns.items():
            if name != "waveform":
                column.add(getattr(chunk, name))

    def add_absence(self, timestamps: Sequence[float], *, at_once: int = 256) -> None:
        """Append frames in which there is no face."""
        size = self._crop_size
        for start in range(0, len(timestamps), at_once):
            times = np.asarray(timestamps[start : start + at_once], dtype=np.float64)
            t = len(times)
            self.add(
                PreparedChunk(
                    crops=np.zeros((t, size, size, 3), np.uint8),
                    landmarks=np.full((t, 68, 2), np.nan, np.float32),
                    valid=np.zeros(t, np.bool_),
                    confidence=np.zeros(t, np.float32),
                    timestamps=times,
                    boxes=np.full((t, 4), np.nan, np.float32),
                    face_ids=np.full(t, -1, np.int32),
                    first_frame=self.num_frames,
                )
            )

    def add_sound(self, waveform: NDArray[np.float32]) -> None:
        """Append samples."""
        self._columns["waveform"].add(waveform)

    def finish(self, *, fingerprint: str, has_sound: bool, about: dict[str, Any]) -> None:
        """Put the columns one after the other and write the header."""
        header: dict[str, Any] = {"__metadata__": {}}
        digests = {}
        position = 0
        for name, column in self._columns.items():
            if name == "waveform" and not has_sound:
                continue
            if name == "timestamps":
                position += self._pad(header, position)
            if column.stream is not self._stream:
                column.stream.seek(0)
                shutil.copyfileobj(column.stream, self._stream, 1 << 20)
            header[name] = {
                "dtype": _TYPE_NAMES[column.dtype.name],
                "shape": [column.rows, *column.shape],
                "data_offsets": [position, position + column.bytes],
            }
            digests[name] = column.digest
            position += column.bytes
        header["__metadata__"] = {
            "format": TRIAL_FORMAT,
            "fingerprint": fingerprint,
            "sha256": combined_digest(digests),
            "trial": json.dumps(about),
        }
        data = json.dumps(header).encode()
        room = _HEADER_BYTES - 8
        if len(data) > room:
            raise ValueError(
                f"names and warnings of the trial need {len(data)} bytes; {room} are there."
            )
        self._stream.seek(0)
        self._stream.write(room.to_bytes(8, "little") + data.ljust(room))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _pad(self, header: dict[str, Any], position: int) -> int:
        """Fill up to eight bytes, which mapped floats need; a column by the rules of the format."""
        missing = -position % 8
        if missing:
            self._stream.write(bytes(missing))
            header["_padding"] = {
                "dtype": "U8",
                "shape": [missing],
                "data_offsets": [position, position + missing],
            }
        return missing


@contextmanager
def open_trial(path: Path, crop_size: int) -> Iterator[TrialWriter]:
    """Open a file that takes its name when the block succeeds, and vanishes if it does not."""
    try:
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_write(path))
            remove_abandoned(path)
            stream = stack.enter_context(partial.open("wb"))
            lock_file(stream)
            yield TrialWriter(stream, stack, path.parent, crop_size)
    except OSError as error:
        if isinstance(error, DiskFullError) or error.errno not in _FULL:
            raise
        raise DiskFullError(error.errno, path) from error


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


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
        mmau.data.prepared.CacheError: no such prepared file: prepared/nobody.safetensors
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
    """Read what a prepared file says besides the arrays, without them."""
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
