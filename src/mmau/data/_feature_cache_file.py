"""One file of features: rows are appended while they are made, and it says if it was altered.

A safetensors file whose header is complete but for its checksum before the first row is written:
the number of frames is known, so every array has its place, and memory does not grow with it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_choice, check_range
from mmau._files import hold, remove_abandoned, whole_file
from mmau.data.prepared_trial import CacheError, DiskFullError

__all__ = [
    "FEATURE_FORMAT",
    "FeatureFileWriter",
    "FeatureLayout",
    "file_bytes",
    "open_feature_file",
    "read_features",
    "read_header",
]

FEATURE_FORMAT = "mmau.features/1"
"""Written into every file; changes when the meaning of its content does."""

_TYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}
_NO_DIGEST = "0" * 64
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class FeatureLayout:
    """Which arrays a file of features holds, and the shape of one frame in each of them.

    Args:
        arrays: Name to shape of a row and dtype: `float16`, `float32`, `float64`, `int64`, `uint8`
            or `bool`.

    Raises:
        ValueError: If there is no array, a dtype is unknown, or a size is below 1.

    Examples:
        >>> FeatureLayout.regions(13, 1024).bytes_per_frame
        28685
        >>> FeatureLayout.patches(256, 1024).bytes_per_frame  # 1.4 TB for 2.6 million frames
        524289
    """

    arrays: Mapping[str, tuple[tuple[int, ...], str]]

    def __post_init__(self) -> None:
        if not self.arrays:
            raise ValueError("`arrays` must name at least one array.")
        for name, (shape, dtype) in self.arrays.items():
            check_choice(f"dtype of {name!r}", dtype, _TYPE_NAMES)
            for size in shape:
                check_range(f"sizes of {name!r}", size, 1)
        # Wide types first, so that every array starts at a multiple of its item.
        ordered = sorted(self.arrays.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
        object.__setattr__(self, "arrays", {k: (tuple(s), d) for k, (s, d) in ordered})

    @classmethod
    def patches(cls, num_patches: int, d_visual: int, *, dtype: str = "float16") -> FeatureLayout:
        """All patch tokens of a frame, and whether there was a face.

        Args:
            num_patches: Patches per frame.
            d_visual: Width of a token.
            dtype: Type of the tokens.

        Returns:
            `patch_tokens (t, p, d)` and `valid (t)`.
        """
        return cls({"patch_tokens": ((num_patches, d_visual), dtype), "valid": ((), "bool")})

    @classmethod
    def regions(cls, num_regions: int, d_visual: int, *, dtype: str = "float16") -> FeatureLayout:
        """The mean token of each facial region and of the whole frame.

        Args:
            num_regions: Regions per frame.
            d_visual: Width of a token.
            dtype: Type of the tokens.

        Returns:
            `regions (t, m, d)`, `overall (t, d)` and `region_valid (t, m)`.
        """
        return cls(
            {
                "regions": ((num_regions, d_visual), dtype),
                "overall": ((d_visual,), dtype),
                "region_valid": ((num_regions,), "bool"),
            }
        )

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one row of all arrays."""
        return sum(self.row_bytes(name) for name in self.arrays)

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of one array.

        Args:
            name: Name of the array.

        Returns:
            The number.
        """
        shape, dtype = self.arrays[name]
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize

    def as_json(self) -> dict[str, Any]:
        """Return plain lists, for fingerprints."""
        return {name: [list(shape), dtype] for name, (shape, dtype) in self.arrays.items()}


def _header(layout: FeatureLayout, num_frames: int, fingerprint: str, digest: str) -> bytes:
    entries: dict[str, Any] = {
        "__metadata__": {"format": FEATURE_FORMAT, "fingerprint": fingerprint, "sha256": digest}
    }
    position = 0
    for name, (shape, dtype) in layout.arrays.items():
        end = position + num_frames * layout.row_bytes(name)
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": [num_frames, *shape],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # mapped arrays want aligned data
    return len(text).to_bytes(8, "little") + text


def file_bytes(layout: FeatureLayout, num_frames: int, fingerprint: str) -> int:
    """Compute the size of a file before it is written.

    Args:
        layout: Its arrays.
        num_frames: Its frames.
        fingerprint: What it is made from.

    Returns:
        Bytes, exactly.
    """
    header = _header(layout, num_frames, fingerprint, _NO_DIGEST)
    return len(header) + num_frames * layout.bytes_per_frame


def _bytes(values: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _seal(fingerprint: str, layout: FeatureLayout, num_frames: int, data: Mapping[str, str]) -> str:
    """One checksum of everything that a file says."""
    parts = [FEATURE_FORMAT, fingerprint, json.dumps(layout.as_json()), str(num_frames)]
    parts += [data[name] for name in layout.arrays]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FeatureFileWriter:
    """Append rows to a file of features; made by `open_feature_file`.

    Args:
        stream: An empty file.
        layout: Its arrays.
        num_frames: Rows that it will have.
        fingerprint: What it is made from.
    """

    def __init__(
        self, stream: IO[bytes], layout: FeatureLayout, num_frames: int, fingerprint: str
    ) -> None:
        self._stream = stream
        self._layout = layout
        self._fingerprint = fingerprint
        self.num_frames = num_frames
        self.rows = 0
        header = _header(layout, num_frames, fingerprint, _NO_DIGEST)
        stream.write(header)
        self._place, position = {}, len(header)
        for name in layout.arrays:
            self._place[name] = position
            position += num_frames * layout.row_bytes(name)
        self._digests = {name: hashlib.sha256() for name in layout.arrays}

    def add(self, rows: Mapping[str, Tensor | NDArray[Any]]) -> None:
        """Append the rows of the frames that follow.

        Args:
            rows: Name to `(n, ...)`, for every array of the layout.

        Raises:
            ValueError: If an array is missing, unknown or of another shape, or there are too many.
            CacheError: If a value is NaN or infinite, or becomes so in the type of the file.
        """
        if rows.keys() != self._layout.arrays.keys():
            raise ValueError(
                f"the rows must hold {', '.join(self._layout.arrays)}; got {', '.join(rows)}."
            )
        ready = {name: self._converted(name, values) for name, values in rows.items()}
        lengths = {len(values) for values in ready.values()}
        if len(lengths) != 1:
            raise ValueError(
                "all arrays must have the same number of rows; got "
                f"{', '.join(f'{name} {len(values)}' for name, values in ready.items())}."
            )
        count = lengths.pop()
        if self.rows + count > self.num_frames:
            raise ValueError(
                f"there are more rows, {self.rows + count}, than frames, {self.num_frames}."
            )
        for name, values in ready.items():
            if values.size:
                data = _bytes(values)
                self._stream.seek(self._place[name] + self.rows * self._layout.row_bytes(name))
                self._stream.write(data)
                self._digests[name].update(data)
        self.rows += count

    def _converted(self, name: str, values: Tensor | NDArray[Any]) -> NDArray[Any]:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            # numpy has no bfloat16
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        shape, dtype = self._layout.arrays[name]
        if values.shape[1:] != shape:
            raise ValueError(f"rows of {name!r} must have shape {shape}; got {values.shape[1:]}.")
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(values, dtype=dtype)
        if converted.dtype.kind == "f" and not np.isfinite(converted).all():
            cause = "it overflows float16" if np.isfinite(values).all() else "it is so already"
            raise CacheError(
                f"a value of {name!r} is NaN or infinite in rows {self.rows} to "
                f"{self.rows + len(values) - 1} ({cause})."
            )
        return converted

    def finish(self) -> None:
        """Write the checksum.

        Raises:
            ValueError: If rows are missing.
        """
        if self.rows != self.num_frames:
            raise ValueError(f"there are {self.rows} rows for {self.num_frames} frames.")
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        seal = _seal(self._fingerprint, self._layout, self.num_frames, digests)
        self._stream.seek(0)
        self._stream.write(_header(self._layout, self.num_frames, self._fingerprint, seal))
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def open_feature_file(
    path: Path, layout: FeatureLayout, num_frames: int, fingerprint: str
) -> Iterator[FeatureFileWriter]:
    """Open a file that takes its name when the block succeeds, and vanishes if it does not.

    Args:
        path: File to write or replace; its folder is made if need be.
        layout: Its arrays.
        num_frames: Rows that it will have.
        fingerprint: What it is made from.

    Yields:
        The writer.

    Raises:
        DiskFullError: If the disk is full.
    """
    try:
        with whole_file(path) as partial:
            remove_abandoned(path)
            with partial.open("wb") as stream:
                hold(stream)
                writer = FeatureFileWriter(stream, layout, num_frames, fingerprint)
                yield writer
                writer.finish()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(error.errno, path) from error


# --------------------------------------------------------------------------------------- reading
def read_header(path: Path) -> dict[str, str]:
    """Read what a file says about itself; notices a file that was cut.

    Args:
        path: File of features.

    Returns:
        `format`, `fingerprint` and `sha256`.

    Raises:
        CacheError: If there is no such file, or it is cut or something else.
    """
    if not path.is_file():
        raise CacheError(f"no such file of features: {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise CacheError(f"not a complete file of features; delete it: {path} ({error})") from error
    if metadata.get("format") != FEATURE_FORMAT or not {"fingerprint", "sha256"} <= set(metadata):
        raise CacheError(
            f"not a file of features of this version ({FEATURE_FORMAT}) but "
            f"{metadata.get('format', 'something else')!r}: {path}"
        )
    return metadata


def read_features(
    path: Path, layout: FeatureLayout, *, verify: bool, memory_map: bool
) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file.

    Args:
        path: File of features.
        layout: What it must hold.
        verify: Whether to compute its checksum, which reads all of it.
        memory_map: Whether the arrays stay on disk until they are used.

    Returns:
        Name to `(t, ...)`.

    Raises:
        CacheError: If it is missing, cut, altered, or holds something else.
    """
    metadata = read_header(path)
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(size))
    del entries["__metadata__"]
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    lengths = {shape[0] for shape in shapes.values() if shape}
    num_frames = lengths.pop() if len(lengths) == 1 else -1
    expected = {
        name: (_TYPE_NAMES[dtype], (num_frames, *shape))
        for name, (shape, dtype) in layout.arrays.items()
    }
    found = {name: (entry["dtype"], shapes[name]) for name, entry in entries.items()}
    if found != expected:
        raise CacheError(f"the file holds other arrays than it should; delete it: {path}")
    arrays: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in layout.arrays.items():
        start, end = (8 + size + offset for offset in entries[name]["data_offsets"])
        if start == end:  # an empty file cannot be mapped
            arrays[name] = np.zeros((num_frames, *shape), dtype=dtype)
            continue
        # Copy on write: torch warns about arrays that it could not write to.
        mapped: NDArray[Any] = np.memmap(
            path, dtype=dtype, mode="c", offset=start, shape=(num_frames, *shape)
        )
        arrays[name] = mapped if memory_map else np.array(mapped)
    if verify:
        digests = {
            name: hashlib.sha256(_bytes(array)).hexdigest() for name, array in arrays.items()
        }
        if _seal(metadata["fingerprint"], layout, num_frames, digests) != metadata["sha256"]:
            raise CacheError(f"the content was altered after it was written; delete it: {path}")
    return arrays
