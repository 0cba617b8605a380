"""One kind of file for everything that is kept on disk: named columns of rows, complete or absent.

Prepared trials and features are safetensors files that any program can read. Each says what it was
made from (`fingerprint`) and carries a checksum, so that what is stale or altered is noticed.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from mmau._files import atomic_write, lock_file, remove_abandoned
from mmau.media.errors import MediaError, check_file

SUFFIX = ".safetensors"
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Name of a dtype in numpy to its name in safetensors."""

Columns = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of a column to the shape of one row and its dtype, in the order of the file."""

_PADDING = "_padding"
_BUFFER = 1 << 20
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class CacheError(MediaError):
    """A file is missing, corrupt, or was made from something else."""


class DiskFullError(OSError):
    """The disk is full; files that were finished before are kept.

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


# --------------------------------------------------------------------------------------- writing
def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one row of a column."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def header_entries(columns: Columns, rows: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Where each column lies behind the header: every item at a multiple of its size."""
    entries: dict[str, dict[str, Any]] = {}
    position = 0
    for name, (shape, dtype) in columns.items():
        if missing := -position % np.dtype(dtype).itemsize:
            start, position = position, position + missing
            offsets = [start, position]
            entries[_PADDING] = {"dtype": "U8", "shape": [missing], "data_offsets": offsets}
        start, position = position, position + rows[name] * row_bytes(shape, dtype)
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": [rows[name], *shape],
            "data_offsets": [start, position],
        }
    return entries


def header_text(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The header, filled up to a multiple of eight bytes, since mapped arrays must be aligned."""
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def sha256(values: NDArray[Any]) -> str:
    """A checksum of an array; safetensors by itself notices cuts but not flipped bits."""
    return hashlib.sha256(_bytes(values)).hexdigest()


def _bytes(values: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class RowWriter:
    """Append rows to the columns of a file, to each at its own pace; made by `open_rows`.

    The first column goes straight into the file, and all do if the number of rows is known. The
    others wait in files without a name, so that memory does not grow.
    """

    def __init__(
        self,
        stream: IO[bytes],
        columns: Columns,
        header_bytes: int,
        num_rows: int | None,
        spools: ExitStack,
    ) -> None:
        self.columns = columns
        self.rows = dict.fromkeys(columns, 0)
        """Rows so far, by column."""
        self._stream = stream
        self._header_bytes = header_bytes
        self._digests = {name: hashlib.sha256() for name in columns}
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        stream.write(b" " * header_bytes)
        entries = header_entries(columns, dict.fromkeys(columns, num_rows or 0))
        for name in columns:
            if num_rows is not None or not self._places:
                self._places[name] = stream, header_bytes + entries[name]["data_offsets"][0]
            else:
                # Anonymous, so that nothing is left of it whatever happens.
                folder = os.path.dirname(stream.name)
                spool = tempfile.SpooledTemporaryFile(_BUFFER, dir=folder)  # noqa: SIM115
                self._places[name] = spools.enter_context(spool), 0

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Append rows to one column."""
        shape, dtype = self.columns[name]
        if values.shape[1:] != shape:
            raise ValueError(f"rows of {name!r} must have shape {shape}; got {values.shape[1:]}.")
        data = _bytes(np.asarray(values, dtype=dtype))
        stream, start = self._places[name]
        stream.seek(start + self.rows[name] * row_bytes(shape, dtype))
        stream.write(data)
        self._digests[name].update(data)
        self.rows[name] += len(values)

    def finish(
        self,
        metadata: Callable[[Mapping[str, str]], Mapping[str, str]],
        leave_out: Container[str] = (),
    ) -> None:
        """Put the columns one after the other and write the header, given checksums by column."""
        columns = {name: kind for name, kind in self.columns.items() if name not in leave_out}
        entries = header_entries(columns, self.rows)
        for name in columns:
            stream, _ = self._places[name]
            if stream is not self._stream:
                stream.seek(0)
                self._stream.seek(self._header_bytes + entries[name]["data_offsets"][0])
                shutil.copyfileobj(stream, self._stream, _BUFFER)
        text = header_text(
            entries, metadata({name: self._digests[name].hexdigest() for name in columns})
        )
        size = self._header_bytes - 8
        if len(text) > size:
            raise ValueError(f"names and warnings need {len(text)} bytes; there are {size}.")
        self._stream.seek(0)
        self._stream.write(size.to_bytes(8, "little") + text.ljust(size))
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def open_rows(
    path: Path, columns: Columns, *, header_bytes: int, num_rows: int | None = None
) -> Iterator[RowWriter]:
    """Open a file that takes its name when the block succeeds, and vanishes if it does not."""
    try:
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_write(path))
            remove_abandoned(path)
            stream = stack.enter_context(partial.open("wb"))
            lock_file(stream)
            yield RowWriter(stream, columns, header_bytes, num_rows, stack)
    except OSError as error:
        if isinstance(error, DiskFullError) or error.errno not in _FULL:
            raise
        raise DiskFullError(error.errno, path) from error


# --------------------------------------------------------------------------------------- reading
def read_metadata(path: Path, file_format: str | None = None, kind: str = "file") -> dict[str, str]:
    """Read what a file says about itself; notices a file that was cut, or is of another kind."""
    if not path.is_file():
        raise CacheError(f"no such {kind}: {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise CacheError(f"not a complete {kind}; delete it: {path} ({error})") from error
    if file_format is None:
        return metadata
    found = metadata.get("format", "something else")
    if found != file_format or not {"fingerprint", "sha256"} <= set(metadata):
        raise CacheError(f"not a {kind} of this version ({file_format}) but {found!r}: {path}")
    return metadata


def read_columns(path: Path, *, memory_map: bool) -> dict[str, NDArray[Any]]:
    """Read the columns of a file whose header was checked; mapped ones are not written back to."""
    dtypes = {there: here for here, there in DTYPES.items()}
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(size))
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in entries.items():
        if name in ("__metadata__", _PADDING):
            continue
        if entry["dtype"] not in dtypes:
            raise CacheError(f"{name!r} is of unknown type {entry['dtype']}; delete it: {path}")
        dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
        if 0 in shape:  # nothing cannot be mapped
            arrays[name] = np.zeros(shape, dtype)
            continue
        # Copy on write: torch warns about arrays that it could not write to.
        start = 8 + size + entry["data_offsets"][0]
        mapped: NDArray[Any] = np.memmap(path, dtype=dtype, mode="c", offset=start, shape=shape)
        arrays[name] = mapped if memory_map else np.array(mapped)
    return arrays


def raise_if_stale(path: Path, found: str, wanted: str, kind: str) -> None:
    """Say what is different between two fingerprints."""
    if found == wanted:
        return
    try:
        before, now = json.loads(found), json.loads(wanted)
    except json.JSONDecodeError:
        before, now = {}, {}
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    raise CacheError(
        f"the {kind} is stale ({', '.join(changed) or 'no record of its source'}); delete it or "
        f"use another folder: {path}"
    )


# ----------------------------------------------------------------------- names and fingerprints
def file_in(folder: Path, name: str) -> Path:
    """The file of a trial; a name may contain `/`, for sub-folders, but not lead out of them."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a trial name must stay inside the folder; got {name!r}.")
    return folder / f"{name}{SUFFIX}"


def source_stamp(path: str | os.PathLike[str]) -> dict[str, int]:
    """Size and modification time of a source, for fingerprints."""
    status = check_file(path).stat()
    return {"source_bytes": status.st_size, "source_modified_ns": status.st_mtime_ns}


def installed_versions(*packages: str) -> dict[str, str]:
    """Package to its version, "none" if it is not installed, for fingerprints."""
    found = dict.fromkeys(packages, "none")
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
