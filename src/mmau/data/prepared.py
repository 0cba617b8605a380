"""One prepared video: aligned faces, landmarks and sound, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmau._files import atomic_write
from mmau.data.store import (
    CacheError,
    RowWriter,
    file_in,
    open_rows,
    raise_if_stale,
    read_columns,
    read_metadata,
    sha256,
)
from mmau.media.faces import FaceTrack


# --------------------------------------------------------------------------------------- columns
class Column(NamedTuple):
    """One array of a prepared video, with a row for every frame."""

    row: tuple[int, ...]
    """Shape of a row; -1 stands for the side of the crops."""
    dtype: str
    """Its type, by numpy's name."""
    no_face: float
    """What a frame without a face has."""
    face: str | None
    """Which attribute of a found face it takes, or `None` if it says nothing of a face."""
    left_out: float | None
    """What a face has if the column is left out, or `None` if it must be there."""
    stored: bool
    """Whether files keep it; what they do not keep is `None` in their trials."""

    def shape(self, num_frames: int, crop_size: int) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (num_frames, *(crop_size if size < 0 else size for size in self.row))

    def without_face(self, num_frames: int, crop_size: int) -> NDArray[Any]:
        """The array of frames in which there is no face."""
        return np.full(self.shape(num_frames, crop_size), self.no_face, self.dtype)


def _column(
    row: tuple[int, ...],
    dtype: str,
    *,
    no_face: float,
    face: str | None = None,
    left_out: float | None = None,
    stored: bool = True,
) -> dict[str, Column]:
    return {"column": Column(row, dtype, no_face, face, left_out, stored)}


_LEFT_OUT: Any = None


@dataclass(frozen=True, kw_only=True)
class PreparedChunk:
    """Consecutive frames of one trial: row `i` is frame `first_frame + i`.

    A frame without a face is a row too: `valid` is False, its crop is black, and its landmarks and
    box are NaN, so that it cannot pass for a face by mistake.
    """

    # The only list of columns. To add one, declare it here and give `FaceTrack` the value that it
    # takes (`face`): chunks, files and trials follow, through `COLUMNS`.
    crops: NDArray[np.uint8] = field(metadata=_column((-1, -1, 3), "uint8", no_face=0, face="crop"))
    """`(t, s, s, 3)`, RGB, aligned faces; zeros where `valid` is False."""
    landmarks: NDArray[np.float32] = field(
        metadata=_column((68, 2), "float32", no_face=np.nan, face="landmarks")
    )
    """`(t, 68, 2)`, iBUG-68, in crop pixels; NaN where `valid` is False."""
    valid: NDArray[np.bool_] = field(metadata=_column((), "bool", no_face=False))
    """`(t,)`, whether a face was found."""
    timestamps: NDArray[np.float64] = field(metadata=_column((), "float64", no_face=np.nan))
    """`(t,)`, seconds on the clock of the container."""
    boxes: NDArray[np.float32] = field(
        default=_LEFT_OUT,
        metadata=_column((4,), "float32", no_face=np.nan, face="box", left_out=np.nan),
    )
    """`(t, 4)`, left, top, right, bottom of the landmarks in pixels of the upright frame; NaN where
    `valid` is False, and everywhere if left out."""
    confidence: NDArray[np.float32] = field(
        metadata=_column((), "float32", no_face=0, face="confidence")
    )
    """`(t,)`, in [0, 1]; 0 where `valid` is False."""
    face_ids: NDArray[np.int32] = field(
        default=_LEFT_OUT, metadata=_column((), "int32", no_face=-1, face="face_id", left_out=0)
    )
    """`(t,)`, number of the person, -1 where `valid` is False; 0 for all faces if left out."""
    frame_landmarks: NDArray[np.float32] | None = field(
        default=None,
        metadata=_column((68, 2), "float32", no_face=np.nan, face="frame_landmarks", stored=False),
    )
    """`(t, 68, 2)`, in pixels of the upright frame; not kept in files, which leave it `None`."""
    first_frame: int = 0
    """Number of the first row's frame, counted from 0."""

    def __post_init__(self) -> None:
        t, size = self.crops.shape[:2] if self.crops.ndim == 4 else (-1, -1)
        for name, column in COLUMNS.items():
            array = getattr(self, name)
            if array is None and not column.stored:
                continue
            if array is None:
                array = column.without_face(t, size)
                array[self.valid] = column.left_out
                object.__setattr__(self, name, array)
            wanted = column.shape(t, size)
            if array.shape != wanted or array.dtype != column.dtype:
                shown = ", ".join("t" if size < 0 else str(size) for size in wanted)
                raise ValueError(
                    f"`{name}` must be {column.dtype} ({shown}); got {array.dtype} {array.shape}."
                )

    @classmethod
    def without_face(
        cls, timestamps: Sequence[float] | NDArray[np.float64], crop_size: int, first_frame: int = 0
    ) -> PreparedChunk:
        """Make the rows of frames in which there is no face; `set_face` fills one in.

        Args:
            timestamps: `(t,)`, seconds.
            crop_size: Side of the crops, in pixels.
            first_frame: Number of the first frame, counted from 0.

        Returns:
            The rows.
        """
        rows: dict[str, Any] = {
            name: column.without_face(len(timestamps), crop_size)
            for name, column in COLUMNS.items()
        }
        rows["timestamps"][:] = timestamps
        return PreparedChunk(**rows, first_frame=first_frame)

    def set_face(self, row: int, face: FaceTrack) -> None:
        """Write the face of one frame into the arrays.

        Args:
            row: Row of the frame, counted from 0.
            face: What was found.
        """
        for name, array in self.arrays().items():
            attribute = COLUMNS[name].face
            if attribute is not None:
                array[row] = getattr(face, attribute)
        self.valid[row] = np.isfinite(self.landmarks[row]).all()

    def rows(self, start: int, stop: int) -> PreparedChunk:
        """Return some frames; of a memory-mapped trial no others are read.

        Args:
            start: First row.
            stop: One past the last.

        Returns:
            The rows.
        """
        rows: dict[str, Any] = {name: array[start:stop] for name, array in self.arrays().items()}
        return PreparedChunk(**rows, first_frame=self.first_frame + start)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name to array, of the columns that are there."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def num_frames(self) -> int:
        """Rows `t`."""
        return len(self.valid)

    @property
    def crop_size(self) -> int:
        """Side of the crops, in pixels."""
        return int(self.crops.shape[1])

    @property
    def face_id(self) -> int:
        """Number of the person in most frames of the chunk, -1 if there is no face."""
        numbers, counts = np.unique(self.face_ids[self.valid], return_counts=True)
        return int(numbers[counts.argmax()]) if len(numbers) else -1


COLUMNS: dict[str, Column] = {
    declared.name: declared.metadata["column"]
    for declared in fields(PreparedChunk)
    if "column" in declared.metadata
}
"""Name of each array of `PreparedChunk` to what it holds."""


@dataclass(frozen=True, kw_only=True)
class PreparedTrial(PreparedChunk):
    """One video, ready for encoders: row `i` of the arrays is the `i`-th decoded frame.

    The arrays are those of `PreparedChunk`.
    """

    name: str
    """Name of the trial."""
    waveform: NDArray[np.float32] | None
    """`(n,)`, 16 kHz mono in [-1, 1], or `None` for a video without sound."""
    audio_start: float
    """Seconds on the same clock; sample `j` is at `audio_start + j / 16000`. 0 without sound."""
    num_frames_announced: int | None
    """How many frames the container announced, or `None`."""
    warnings: tuple[str, ...] = ()
    """What was odd about the source: missing frames, damaged packets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sound = self.waveform
        if sound is not None and (sound.ndim != 1 or sound.dtype != np.float32):
            raise ValueError(f"`waveform` must be float32 (n,); got {sound.dtype} {sound.shape}.")

    @property
    def shortfall(self) -> int:
        """Frames that the container announced and that did not come; 0 if it does not say."""
        return max(0, (self.num_frames_announced or 0) - self.num_frames)

    def about(self) -> dict[str, Any]:
        """What a prepared file says besides the arrays."""
        names = ("name", "audio_start", "num_frames_announced", "warnings")
        return {name: getattr(self, name) for name in names}


# ----------------------------------------------------------------------------------------- files
TRIAL_FORMAT = "mmau.trial/2"
"""Written into every file; changes when the meaning of its content does."""

# The header is only known when the last row is written; what varies in it are the warnings.
_HEADER_BYTES = 1 << 16
_ROWS_AT_ONCE = 256
_KIND = "prepared file"


def trial_columns(crop_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The columns of a file: crops, which are written as they come, then wide types first."""
    columns = {n: (c.shape(0, crop_size)[1:], c.dtype) for n, c in COLUMNS.items() if c.stored}
    first = {"crops": columns.pop("crops")}
    columns["waveform"] = (), "float32"
    widest_first = sorted(columns.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
    return first | dict(widest_first)


def _trial_digest(digests: Mapping[str, str]) -> str:
    listed = "".join(f"{name}={digests[name]};" for name in sorted(digests))
    return hashlib.sha256(listed.encode()).hexdigest()


class TrialWriter:
    """Append rows to a prepared trial; memory does not grow with their number."""

    def __init__(self, file: RowWriter, crop_size: int) -> None:
        self._file = file
        self._crop_size = crop_size

    @property
    def num_frames(self) -> int:
        """Rows so far."""
        return self._file.rows["timestamps"]

    def add(self, chunk: PreparedChunk) -> None:
        """Append the rows of a chunk."""
        if chunk.first_frame != self.num_frames:
            raise ValueError(
                f"the next chunk must start at frame {self.num_frames}; got {chunk.first_frame}."
            )
        for name, array in chunk.arrays().items():
            if COLUMNS[name].stored:
                self._file.add(name, array)

    def add_absence(self, timestamps: Sequence[float]) -> None:
        """Append frames in which there is no face."""
        for start in range(0, len(timestamps), _ROWS_AT_ONCE):
            times = timestamps[start : start + _ROWS_AT_ONCE]
            self.add(PreparedChunk.without_face(times, self._crop_size, self.num_frames))

    def add_sound(self, waveform: NDArray[np.float32]) -> None:
        """Append samples."""
        self._file.add("waveform", waveform)

    def finish(self, *, fingerprint: str, has_sound: bool, about: Mapping[str, Any]) -> None:
        """Write the header."""
        self._file.finish(
            lambda digests: {
                "format": TRIAL_FORMAT,
                "fingerprint": fingerprint,
                "sha256": _trial_digest(digests),
                "trial": json.dumps(about),
            },
            leave_out=() if has_sound else ("waveform",),
        )


@contextmanager
def open_trial(path: Path, crop_size: int) -> Iterator[TrialWriter]:
    """Open a file that takes its name when the block succeeds, and vanishes if it does not."""
    with open_rows(path, trial_columns(crop_size), header_bytes=_HEADER_BYTES) as file:
        yield TrialWriter(file, crop_size)


def save_trial(
    trial: PreparedTrial, path: str | os.PathLike[str], *, fingerprint: str = ""
) -> Path:
    """Write a prepared trial as one safetensors file, complete or not at all; returns its path."""
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
        >>> load_trial("prepared/absent.safetensors")
        Traceback (most recent call last):
        ...
        mmau.data.store.CacheError: no such prepared file: prepared/absent.safetensors
    """
    file = Path(path)
    metadata = read_metadata(file, TRIAL_FORMAT, _KIND)
    if fingerprint is not None:
        raise_if_stale(file, metadata["fingerprint"], fingerprint, _KIND)
    arrays: dict[str, Any] = read_columns(file, memory_map=memory_map)
    if verify:
        digests = {name: sha256(array) for name, array in arrays.items()}
        if _trial_digest(digests) != metadata["sha256"]:
            raise CacheError(f"the content was altered after it was written; delete it: {file}")
    try:
        about = json.loads(metadata["trial"])
        return PreparedTrial(
            **{name: arrays[name] for name in COLUMNS if name in arrays},
            waveform=arrays.get("waveform"),
            name=about["name"],
            audio_start=about["audio_start"],
            num_frames_announced=about["num_frames_announced"],
            warnings=tuple(about["warnings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"not a complete {_KIND}; delete it: {file} ({error})") from error


def is_prepared(path: str | os.PathLike[str], fingerprint: str) -> bool:
    """Tell whether a file is there and was made from this source with these options."""
    file = Path(path)
    if not file.exists():
        return False
    found = read_metadata(file, TRIAL_FORMAT, _KIND)["fingerprint"]
    raise_if_stale(file, found, fingerprint, _KIND)
    return True


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a prepared file says besides the arrays, without them."""
    about: dict[str, Any] = json.loads(read_metadata(Path(path), TRIAL_FORMAT, _KIND)["trial"])
    return about


@dataclass(frozen=True)
class TrialTarget:
    """Names of the files of one video: one trial, or one per person."""

    folder: Path
    """Where all trials lie."""
    name: str
    """Name of the video's trial."""
    all_faces: bool
    """Whether each person is a trial of its own."""

    @classmethod
    def of(cls, folder: Path, name: str, *, all_faces: bool) -> TrialTarget:
        """Check a name."""
        file_in(folder, name)
        if all_faces and re.search(r"_face\d+$", name):
            raise ValueError(
                f"with `face='all'` a trial name must not end in _face and a number; got {name!r}."
            )
        return cls(folder, name, all_faces)

    def trial(self, number: int = 0) -> str:
        """Name of the trial of the video, or of the person of this number."""
        return f"{self.name}_face{number}" if self.all_faces else self.name

    def file(self, number: int = 0) -> Path:
        """The file of that trial."""
        return file_in(self.folder, self.trial(number))

    @property
    def _list_of_faces(self) -> Path:
        return self.folder / f"{self.name}.faces.json"

    def trials(self) -> dict[str, Path]:
        """Name to file of what is there, once it is done."""
        if not self.all_faces:
            return {self.name: self.file()}
        numbers = json.loads(self._list_of_faces.read_text())["faces"]
        return {self.trial(number): self.file(number) for number in numbers}

    def is_done(self, fingerprint: str, *, overwrite: bool) -> bool:
        """Tell whether the trials are there and were made from this source with these options."""
        try:
            if self.all_faces and not self._list_of_faces.exists():
                return False
            return all(is_prepared(file, fingerprint) for file in self.trials().values())
        except (CacheError, json.JSONDecodeError, KeyError) as error:
            if overwrite:
                return False
            if not isinstance(error, CacheError):
                error = CacheError(f"not a list of people; delete it: {self._list_of_faces}")
            raise CacheError(f"{error}; `overwrite=True` replaces it") from error

    def finish(self, numbers: list[int]) -> None:
        """Note who there is, when all files are complete."""
        if self.all_faces:
            with atomic_write(self._list_of_faces) as partial:
                partial.write_text(json.dumps({"faces": sorted(numbers)}))
