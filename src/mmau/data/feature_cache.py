"""Features of a frozen encoder, computed once and kept in one file per trial.

Each file appears only when it is complete, carries a fingerprint of its source, encoder, options
and versions, and a checksum of everything in it. So a run that was killed goes on where it stopped,
and what is stale or altered is refused in a sentence. Several machines share the work by rank,
without talking to each other: each knows its share from the lengths of all trials.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmau._checks import check_choice, check_range
from mmau._files import atomic_write, lock_file, remove_abandoned
from mmau._version import __version__
from mmau.data.prepared import PreparedTrial, load_trial
from mmau.data.store import CacheError, DiskFullError
from mmau.functional.region_attention import region_pooling
from mmau.media.errors import MediaError, check_file
from mmau.progress import ProgressCallback

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
    """Compute the size of a file before it is written."""
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
    """Append rows to a file of features; made by `open_feature_file`."""

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
        """Append the rows of the frames that follow."""
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
        """Write the checksum."""
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
    """Open a file that takes its name when the block succeeds, and vanishes if it does not."""
    try:
        with atomic_write(path) as partial:
            remove_abandoned(path)
            with partial.open("wb") as stream:
                lock_file(stream)
                writer = FeatureFileWriter(stream, layout, num_frames, fingerprint)
                yield writer
                writer.finish()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(error.errno, path) from error


# --------------------------------------------------------------------------------------- reading
def read_header(path: Path) -> dict[str, str]:
    """Read what a file says about itself; notices a file that was cut."""
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
    """Read the arrays of a file."""
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


Encoder = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]
RegionMapper = Callable[..., tuple[Tensor, Tensor]]


def module_fingerprint(module: nn.Module) -> str:
    """Sum up the weights of a module, so that features are stale as soon as it is trained.

    Examples:
        >>> linear = nn.Linear(2, 2)
        >>> before = module_fingerprint(linear)
        >>> _ = linear.weight.data.add_(1)
        >>> before == module_fingerprint(linear)
        False
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module that keeps some
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def token_rows(
    source: FeatureSource,
    *,
    encoder: Encoder,
    regions: RegionMapper | None = None,
    frames_per_chunk: int = 64,
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Encode a prepared trial, chunk by chunk: all patch tokens, or their means by region.

    Frames without a face are not encoded: their tokens are zero and `valid` or `region_valid` is
    False. Memory is that of one chunk.
    """
    check_range("frames_per_chunk", frames_per_chunk, 1)
    if isinstance(encoder, nn.Module) and encoder.training:
        raise ValueError(
            "the encoder is in training mode, so its features would be noisy: call .eval() first."
        )
    trial = load_trial(source.path, memory_map=True)
    for start in range(0, trial.num_frames, frames_per_chunk):
        yield _rows(trial, slice(start, start + frames_per_chunk), encoder, regions, device)


def _rows(
    trial: PreparedTrial,
    part: slice,
    encoder: Encoder,
    regions: RegionMapper | None,
    device: str | torch.device,
) -> dict[str, Tensor]:
    valid = np.asarray(trial.valid[part])
    # A chunk without any face is encoded once, only to learn the shapes.
    kept = np.flatnonzero(valid) if valid.any() else np.zeros(1, dtype=np.int64)
    crops = torch.from_numpy(np.ascontiguousarray(trial.crops[part][kept])).to(device)
    tokens, grid_size = encoder(crops.movedim(-1, 1).float() / 255)
    where = torch.from_numpy(kept)
    seen = torch.from_numpy(valid.copy())
    if regions is None:
        return {"patch_tokens": _spread(tokens, where, seen), "valid": seen}
    landmarks = torch.from_numpy(np.ascontiguousarray(trial.landmarks[part][kept])).to(device)
    weights, known = regions(landmarks, grid_size, tuple(crops.shape[1:3]))
    local, overall = region_pooling(tokens, weights)
    return {
        "regions": _spread(local * known[..., None], where, seen),
        "overall": _spread(overall, where, seen),
        "region_valid": _spread(known, where, seen),
    }


def _spread(rows: Tensor, where: Tensor, seen: Tensor) -> Tensor:
    """Put rows at the frames that they belong to; zero or False everywhere else."""
    rows = rows.cpu()
    full = rows.new_zeros((len(seen), *rows.shape[1:]))
    full[where] = rows
    full[~seen] = 0
    return full


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
    """Describe prepared trials as sources, from their headers alone."""
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


@dataclass(frozen=True)
class FillJob:
    """One file to write; crosses the border to a worker process."""

    source: FeatureSource
    file: Path
    fingerprint: str
    layout: FeatureLayout


Encode = Callable[[FeatureSource], Iterable[Mapping[str, Any]]]


def shard_by_length(lengths: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Deal out trials so that every rank gets about the same number of frames.

    The longest goes first, to the rank that has least; the same input gives the same shares on
    every machine.

    Examples:
        >>> shard_by_length({"a": 1, "b": 5, "c": 3, "d": 3}, 2)
        [['b', 'a'], ['c', 'd']]
    """
    check_range("world_size", world_size, 1)
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name, length in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += length
    return shares


def run_fill_jobs(
    todo: Sequence[FillJob], encode: Encode, jobs: int
) -> Iterator[tuple[str, int, str | None]]:
    """Write the files."""
    if jobs == 1 or len(todo) <= 1:
        for job in todo:
            done = 0
            try:
                for frames in _write(job, encode):
                    done += frames
                    yield job.source.name, frames, None
            except MediaError as error:
                # The rest of its frames, so that the sum is that of all trials.
                yield job.source.name, job.source.num_frames - done, str(error)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(todo)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(encode,),
    )
    try:
        waiting: dict[Future[str | None], FillJob] = {pool.submit(_work, job): job for job in todo}
        for future in as_completed(waiting):
            source = waiting[future].source
            yield source.name, source.num_frames, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for lack of memory; finished files are kept, so the "
            "same call goes on from here. (A script that asks for several `jobs` must do so under "
            '`if __name__ == "__main__":`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(job: FillJob, encode: Encode) -> Iterator[int]:
    """Write one file; yields the number of frames after each chunk."""
    size = job.source.num_frames
    with open_feature_file(job.file, job.layout, size, job.fingerprint) as writer:
        for rows in encode(job.source):
            before = writer.rows
            writer.add(rows)
            yield writer.rows - before


_encode: Encode | None = None


def _start_worker(encode: Encode) -> None:
    """Receive the encoder once per process, which uses one core."""
    global _encode  # an executor offers no other place
    torch.set_num_threads(1)
    _encode = encode


def _work(job: FillJob) -> str | None:
    if _encode is None:
        raise RuntimeError("a worker has no encoder; this is a bug of mmau.")
    try:
        for _ in _write(job, _encode):
            pass
    except MediaError as error:
        return str(error)
    return None


_SUFFIX = ".safetensors"
_MANIFEST = "manifest.json"

Rows = Iterable[Mapping[str, "Tensor | NDArray[Any]"]]


class FeatureCache:
    """A folder with the features of one encoder, one file per trial.

    Args:
        folder: Where `<name>.safetensors` are written.
        layout: Which arrays, and the shape of a frame in them.
        encoder: What computes them, in words that change when the result does: for trained weights
            include `module_fingerprint(encoder)`.
        options: What else the result depends on, as JSON: crop size, precision, regions.

    Raises:
        TypeError: If `encoder` or `options` cannot be written as JSON.

    Examples:
        Region tokens of a frozen encoder, for one of four machines.

        ```python
        cache = FeatureCache(
            "features", FeatureLayout.regions(13, encoder.d_out),
            encoder={"name": "dinov2", "weights": module_fingerprint(encoder)},
        )
        sources = prepared_sources(prepare_dataset(videos, "prepared"))
        encode = functools.partial(token_rows, encoder=encoder, regions=LandmarkToPatch())
        print(cache.estimate(sources, rank=0, world_size=4))
        cache.fill(sources, encode, rank=0, world_size=4)
        tokens = cache.load(sources[0])["regions"]
        ```
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        layout: FeatureLayout,
        *,
        encoder: str | Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.layout = layout
        self._made_by = {
            "format": FEATURE_FORMAT,
            "layout": layout.as_json(),
            "encoder": encoder if isinstance(encoder, str) else dict(encoder),
            "options": dict(options or {}),
            "mmau": __version__,
            **{package: _version(package) for package in ("torch", "transformers")},
        }
        json.dumps(self._made_by)  # refuses what has no JSON, before any work

    def file_of(self, name: str) -> Path:
        """Return where the features of a trial are, or will be.

        Args:
            name: Name of the trial.

        Returns:
            The path.

        Raises:
            ValueError: If the name leads out of the folder.
        """
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a trial name must stay inside the folder; got {name!r}.")
        return self.folder / f"{name}{_SUFFIX}"

    def fingerprint(self, source: FeatureSource) -> str:
        """Describe everything that the features of a trial depend on.

        Args:
            source: What they are computed from. Of a prepared trial its checksum counts, so that it
                may be copied to another machine; of other files, size and modification time.

        Returns:
            JSON.

        Raises:
            MediaError: If the source is missing.
        """
        status = check_file(source.path).stat()
        about: dict[str, Any] = {
            "source_bytes": status.st_size,
            "source_modified_ns": status.st_mtime_ns,
        }
        if source.path.suffix == _SUFFIX:
            try:
                with safetensors.safe_open(source.path, framework="numpy") as stream:
                    digest = (stream.metadata() or {}).get("sha256")
            except safetensors.SafetensorError as error:
                raise CacheError(f"not a complete file: {source.path} ({error})") from error
            if digest is not None:
                about = {"source_sha256": digest}
        # The number of frames is part of it, since it is not always that of the file.
        about["num_frames"] = source.num_frames
        return json.dumps({**self._made_by, **about}, sort_keys=True)

    def is_done(self, source: FeatureSource) -> bool:
        """Tell whether the features of a trial are there; reads the header only.

        Args:
            source: What they are computed from.

        Returns:
            False if there is no file.

        Raises:
            CacheError: If there is one, but cut, of another version, or stale.
            MediaError: If the source is missing.
        """
        file = self.file_of(source.name)
        if not file.exists():
            return False
        self._check_fresh(file, source)
        return True

    def _check_fresh(self, file: Path, source: FeatureSource) -> None:
        """Refuse a file that was made from something else, and say what is different."""
        found, wanted = read_header(file)["fingerprint"], self.fingerprint(source)
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
            f"the features are stale ({', '.join(changed) or 'no record of their source'}); delete "
            f"them or use another folder: {file}"
        )

    def estimate(
        self, sources: Sequence[FeatureSource], *, rank: int = 0, world_size: int = 1
    ) -> CacheEstimate:
        """Compute what will be written, before anything is.

        Args:
            sources: All trials, of all ranks.
            rank: Which share is ours.
            world_size: Number of shares.

        Returns:
            Numbers of trials and bytes.

        Raises:
            ValueError: If a number is out of range, or two sources share a name.
            CacheError: If a file is stale or cut.
        """
        total = missing = done = 0
        share = self._share(sources, rank, world_size)
        for source in share:
            size = file_bytes(self.layout, source.num_frames, self.fingerprint(source))
            total += size
            if self.is_done(source):
                done += 1
            else:
                missing += size
        existing = next(path for path in (self.folder, *self.folder.absolute().parents)
                        if path.exists())  # fmt: skip
        free = shutil.disk_usage(existing).free
        return CacheEstimate(len(share), done, total, missing, free)

    def fill(
        self,
        sources: Sequence[FeatureSource],
        encode: Callable[[FeatureSource], Rows],
        *,
        rank: int = 0,
        world_size: int = 1,
        jobs: int = 1,
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
    ) -> dict[str, Path]:
        """Compute what is not there yet, longest trials first; one broken trial stops no other.

        Stop it at any time and start it again.

        Args:
            sources: All trials, of all ranks: a rank knows its share from the lengths of all.
            encode: Yields the rows of a trial, chunk by chunk in the order of its frames, as name
                to `(n, ...)`. With several `jobs` it must be picklable.
            rank: Which share is ours, 0 to `world_size - 1`.
            world_size: Number of shares; machines need nothing in common but the sources.
            jobs: Processes, started by spawn: a script that uses more than one must do its work
                under `if __name__ == "__main__":`.
            overwrite: Whether to replace stale or corrupt files, instead of refusing them.
            progress: Called as `progress(done, total)`, in frames.

        Returns:
            Name to file, of this rank's share.

        Raises:
            CacheError: If a file is stale or corrupt, or there is no room, before anything is done.
            FeatureCacheError: After all others, if some trials could not be encoded; names them.
            DiskFullError: If the disk is full; files that were finished are kept.
            ValueError: If a number is out of range, two sources share a name, or the rows are not
                what the layout says.
            RuntimeError: If a worker process was killed.
        """
        check_range("jobs", jobs, 1)
        share = self._share(sources, rank, world_size)
        files, todo, failures = {}, [], {}
        for source in share:
            files[source.name] = self.file_of(source.name)
            try:
                fingerprint = self.fingerprint(source)
            except MediaError as error:
                failures[source.name] = str(error)
                continue
            try:
                ready = self.is_done(source)
            except CacheError as error:
                if not overwrite:
                    raise CacheError(f"{error}; `overwrite=True` replaces it") from error
                ready = False
            if not ready:
                todo.append(FillJob(source, files[source.name], fingerprint, self.layout))
        self._check_room(todo)
        total = sum(source.num_frames for source in share)
        done = total - sum(job.source.num_frames for job in todo)
        if progress is not None:
            progress(done, total)
        for name, frames, reason in run_fill_jobs(todo, encode, jobs):
            if reason is not None:
                failures[name] = reason
            done += frames
            if progress is not None:
                progress(done, total)
        if failures:
            raise FeatureCacheError(failures, {n: f for n, f in files.items() if n not in failures})
        return files

    def _check_room(self, todo: Sequence[FillJob]) -> None:
        needed = sum(file_bytes(self.layout, j.source.num_frames, j.fingerprint) for j in todo)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"the features of {len(todo)} trials need {size_in_words(needed)}, but "
                f"{size_in_words(free)} are free where they are to be written: {self.folder}"
            )

    def load(
        self, source: FeatureSource, *, verify: bool = True, memory_map: bool = True
    ) -> dict[str, NDArray[Any]]:
        """Read the features of a trial.

        Args:
            source: What they were computed from.
            verify: Whether to compute the checksum, which reads the whole file.
            memory_map: Whether the arrays stay on disk until they are used.

        Returns:
            Name to `(t, ...)`.

        Raises:
            CacheError: If the file is missing, cut, altered or stale.
            MediaError: If the source is missing.
        """
        file = self.file_of(source.name)
        read_header(file)  # a missing file is not called stale
        self._check_fresh(file, source)
        return read_features(file, self.layout, verify=verify, memory_map=memory_map)

    def trials(
        self,
        sources: Sequence[FeatureSource],
        extra: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        verify: bool = True,
    ) -> CachedTrials:
        """Make what `ClipDataset` takes: trials that are read from disk when they are asked for.

        Args:
            sources: Trials whose features are there.
            extra: Name to further arrays with one row per frame, such as labels.
            verify: Whether each process reads a file in full before it first uses it, to compute
                its checksum; else use `find_broken` once.

        Returns:
            A mapping; its `lengths` go to `ClipDataset`, too.
        """
        return CachedTrials(partial(self.load, verify=verify), sources, extra or {})

    def write_manifest(self, sources: Sequence[FeatureSource]) -> Path:
        """Write `manifest.json`: each file with its bytes, frames and checksum, for copies.

        Args:
            sources: Trials whose features are there, of all ranks.

        Returns:
            Path of the manifest.

        Raises:
            CacheError: If a file is missing, cut or stale.
        """
        entries = {}
        for source in sorted(sources, key=lambda source: source.name):
            file = self.file_of(source.name)
            digest = read_header(file)["sha256"]
            self._check_fresh(file, source)
            entries[f"{source.name}{_SUFFIX}"] = {
                "bytes": file.stat().st_size,
                "num_frames": source.num_frames,
                "sha256_of_content": digest,
            }
        path = self.folder / _MANIFEST
        with atomic_write(path) as unfinished:
            unfinished.write_text(
                json.dumps({"made_by": self._made_by, "files": entries}, indent=1)
            )
        return path

    def find_broken(self, sources: Sequence[FeatureSource]) -> dict[str, str]:
        """Read every file in full and list what cannot be used; reads all of the cache.

        Args:
            sources: Trials to look at.

        Returns:
            Name to reason; empty if all is well.
        """
        broken = {}
        for source in sources:
            try:
                self.load(source)
            except MediaError as error:
                broken[source.name] = str(error)
        return broken

    def _share(
        self, sources: Sequence[FeatureSource], rank: int, world_size: int
    ) -> list[FeatureSource]:
        check_range("world_size", world_size, 1)
        check_range("rank", rank, 0, world_size - 1)
        by_name = {source.name: source for source in sources}
        if len(by_name) != len(sources):
            names = [source.name for source in sources]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two sources are called {twice!r}.")
        lengths = {name: source.num_frames for name, source in by_name.items()}
        return [by_name[name] for name in shard_by_length(lengths, world_size)[rank]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
