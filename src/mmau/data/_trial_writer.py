"""Writing a prepared trial while its rows are still being made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mmau._files import hold, remove_abandoned, whole_file
from mmau.data._prepared_stream import PreparedChunk

__all__ = [
    "TRIAL_FORMAT",
    "DiskFullError",
    "TrialWriter",
    "combined_digest",
    "open_trial",
    "trial_columns",
]

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
    """Shape of a row and type of every column, in the order of the file.

    Args:
        size: Side of the crops, in pixels.

    Returns:
        Name to shape and type. Wide types come first after the crops, so that all are aligned.
    """
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
    """One checksum of several, so that each column can be read in its own time.

    Args:
        digests: Name of a column to the sha256 of its bytes.

    Returns:
        The sha256 of names and checksums.
    """
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

    Args:
        stream: An empty file.
        stack: Closes what waits on disk beside it.
        folder: Where that waits.
        crop_size: Side of the crops, in pixels.
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
        """Append the rows of a chunk.

        Args:
            chunk: The frames that follow those already there.

        Raises:
            ValueError: If frames are missing in between.
        """
        if chunk.first_frame != self.num_frames:
            raise ValueError(
                f"the next chunk must start at frame {self.num_frames}; got {chunk.first_frame}."
            )
        for name, column in self._columns.items():
            if name != "waveform":
                column.add(getattr(chunk, name))

    def add_absence(self, timestamps: Sequence[float], *, at_once: int = 256) -> None:
        """Append frames in which there is no face.

        Args:
            timestamps: Their times, in seconds.
            at_once: Rows per write.
        """
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
        """Append samples.

        Args:
            waveform: `(n,)`.
        """
        self._columns["waveform"].add(waveform)

    def finish(self, *, fingerprint: str, has_sound: bool, about: dict[str, Any]) -> None:
        """Put the columns one after the other and write the header.

        Args:
            fingerprint: What the trial was made from.
            has_sound: Whether there is a waveform, be it empty.
            about: What else `load_trial` needs, as JSON.

        Raises:
            ValueError: If names and warnings are too long for the header.
        """
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
    """Open a file that takes its name when the block succeeds, and vanishes if it does not.

    Args:
        path: File to write or replace; its folder is made if need be.
        crop_size: Side of the crops, in pixels.

    Yields:
        The writer; `finish` must be called.

    Raises:
        DiskFullError: If the disk is full.
    """
    try:
        with ExitStack() as stack:
            partial = stack.enter_context(whole_file(path))
            remove_abandoned(path)
            stream = stack.enter_context(partial.open("wb"))
            hold(stream)
            yield TrialWriter(stream, stack, path.parent, crop_size)
    except OSError as error:
        if isinstance(error, DiskFullError) or error.errno not in _FULL:
            raise
        raise DiskFullError(error.errno, path) from error


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
