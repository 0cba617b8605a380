"""Features of a frozen encoder, computed once and kept in one file per trial.

Each file appears only when it is complete, carries a fingerprint of its source, encoder, options
and versions, and a checksum of everything in it. So a run that was killed resumes where it stopped,
and what is stale or altered raises an error that says so. Several machines share the work by rank,
without talking to each other: each knows its share from the lengths of all trials.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmau._checks import check_choice, check_range
from mmau._pool import ProcessDiedError, Work, run_in_processes, share_longest_first
from mmau._version import __version__
from mmau.data.prepared import PreparedTrial, load_trial
from mmau.data.store import (
    DTYPES,
    SUFFIX,
    CacheError,
    file_in,
    header_entries,
    header_text,
    installed_versions,
    open_rows,
    raise_if_stale,
    read_columns,
    read_metadata,
    row_bytes,
    sha256,
    source_stamp,
)
from mmau.functional.region_attention import region_pooling
from mmau.media.errors import MediaError
from mmau.progress import ProgressCallback

FEATURE_FORMAT = "mmau.features/1"
"""Written into every file; changes when the meaning of its content does."""

_KIND = "file of features"

Rows = Mapping[str, "Tensor | NDArray[Any]"]
"""Consecutive frames: name of an array to `(n, ...)`."""


@dataclass(frozen=True)
class FeatureLayout:
    """Which arrays a file of features holds, and the shape of one frame in each of them.

    Args:
        arrays: Name to shape of a row and dtype: `float16`, `float32`, `float64`, `int64`, `int32`,
            `uint8` or `bool`.

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
            check_choice(f"dtype of {name!r}", dtype, DTYPES)
            for size in shape:
                check_range(f"sizes of {name!r}", size, 1)
        # Wide types first, so that every array starts at a multiple of its item.
        ordered = sorted(self.arrays.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
        object.__setattr__(self, "arrays", {k: (tuple(s), d) for k, (s, d) in ordered})

    @classmethod
    def patches(cls, num_patches: int, d_visual: int, *, dtype: str = "float16") -> FeatureLayout:
        """All patch tokens of a frame, `patch_tokens (t, p, d)`, and `valid (t)`.

        Args:
            num_patches: Patches per frame `p`.
            d_visual: Width of a token `d`.
            dtype: Type of the tokens.

        Returns:
            What `token_rows` yields without `regions`.
        """
        return cls({"patch_tokens": ((num_patches, d_visual), dtype), "valid": ((), "bool")})

    @classmethod
    def regions(cls, num_regions: int, d_visual: int, *, dtype: str = "float16") -> FeatureLayout:
        """The mean token of each region, `regions (t, m, d)`, and of the frame, `overall (t, d)`.

        Args:
            num_regions: Regions per frame `m`.
            d_visual: Width of a token `d`.
            dtype: Type of the tokens.

        Returns:
            What `token_rows` yields with `regions`; `region_valid (t, m)` besides.
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
        return sum(row_bytes(shape, dtype) for shape, dtype in self.arrays.values())

    def as_json(self) -> dict[str, Any]:
        """Return plain lists, for fingerprints."""
        return {name: [list(shape), dtype] for name, (shape, dtype) in self.arrays.items()}


@dataclass(frozen=True)
class FeatureSource:
    """What the features of one trial are computed from."""

    name: str
    """Name of the trial; may contain `/`, for sub-folders."""
    path: Path
    """A prepared trial, or any other file."""
    num_frames: int
    """Rows that the features will have."""


def prepared_sources(files: Mapping[str, str | os.PathLike[str]]) -> list[FeatureSource]:
    """Describe prepared trials as sources, from their headers alone."""
    return [
        FeatureSource(name, Path(path), load_trial(path, verify=False, memory_map=True).num_frames)
        for name, path in files.items()
    ]


# ------------------------------------------------------------------------------------- one file
Encode = Callable[[FeatureSource], Iterable[Rows]]


@dataclass(frozen=True)
class FillJob:
    """One file to write; crosses the border to a worker process."""

    source: FeatureSource
    file: Path
    fingerprint: str
    layout: FeatureLayout

    @property
    def header_bytes(self) -> int:
        """Bytes before the arrays; known before anything is computed."""
        counts = dict.fromkeys(self.layout.arrays, self.source.num_frames)
        text = header_text(header_entries(self.layout.arrays, counts), self.metadata("0" * 64))
        return 8 + len(text)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.header_bytes + self.source.num_frames * self.layout.bytes_per_frame

    def metadata(self, digest: str) -> dict[str, str]:
        """What the file says about itself."""
        return {"format": FEATURE_FORMAT, "fingerprint": self.fingerprint, "sha256": digest}

    def write(self, encode: Encode) -> Iterator[int]:
        """Compute and write the file; yields the number of frames after each chunk."""
        total, done = self.source.num_frames, 0
        with open_rows(
            self.file, self.layout.arrays, header_bytes=self.header_bytes, num_rows=total
        ) as writer:
            for rows in encode(self.source):
                ready = _converted(rows, self.layout, done)
                count = len(next(iter(ready.values())))
                if done + count > total:
                    raise ValueError(f"there are more rows, {done + count}, than frames, {total}.")
                for name, values in ready.items():
                    writer.add(name, values)
                done += count
                yield count
            if done != total:
                raise ValueError(f"there are {done} rows for {total} frames.")
            writer.finish(
                lambda digests: self.metadata(
                    _sealed(self.fingerprint, self.layout, total, digests)
                )
            )


def _converted(rows: Rows, layout: FeatureLayout, first: int) -> dict[str, NDArray[Any]]:
    """The rows of one chunk in the types of a file; only finite numbers are kept."""
    if rows.keys() != layout.arrays.keys():
        raise ValueError(f"the rows must hold {', '.join(layout.arrays)}; got {', '.join(rows)}.")
    lengths = {name: len(values) for name, values in rows.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"all arrays must have the same number of rows; got {listed}.")
    ready: dict[str, NDArray[Any]] = {}
    for name, values in rows.items():
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            # numpy has no bfloat16
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        with np.errstate(over="ignore"):
            ready[name] = np.asarray(values, dtype=layout.arrays[name][1])
        if ready[name].dtype.kind == "f" and not np.isfinite(ready[name]).all():
            cause = "it overflows float16" if np.isfinite(values).all() else "it is so already"
            raise CacheError(
                f"a value of {name!r} is NaN or infinite in rows {first} to "
                f"{first + len(values) - 1} ({cause})."
            )
    return ready


def _sealed(
    fingerprint: str, layout: FeatureLayout, num_frames: int, digests: Mapping[str, str]
) -> str:
    """One checksum of everything that a file says."""
    parts = [FEATURE_FORMAT, fingerprint, json.dumps(layout.as_json()), str(num_frames)]
    parts += [digests[name] for name in layout.arrays]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_features(
    path: Path, layout: FeatureLayout, metadata: Mapping[str, str], verify: bool, memory_map: bool
) -> dict[str, NDArray[Any]]:
    arrays = read_columns(path, memory_map=memory_map)
    found = {name: (array.shape[1:], array.dtype.name) for name, array in arrays.items()}
    lengths = {len(array) for array in arrays.values()}
    if found != layout.arrays or len(lengths) != 1:
        raise CacheError(f"the file holds other arrays than it should; delete it: {path}")
    if verify:
        digests = {name: sha256(array) for name, array in arrays.items()}
        digest = _sealed(metadata["fingerprint"], layout, lengths.pop(), digests)
        if digest != metadata["sha256"]:
            raise CacheError(f"the content was altered after it was written; delete it: {path}")
    return {name: arrays[name] for name in layout.arrays}


# ------------------------------------------------------------------- from trials to their tokens
Encoder = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]
RegionMapper = Callable[..., tuple[Tensor, Tensor]]


def module_fingerprint(module: nn.Module) -> str:
    """Sum up the weights of a module, so that features are stale as soon as it is trained."""
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


# ---------------------------------------------------------------------------------- many files
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
class CacheEstimate:
    """What a call of `fill` will write; exact, since sizes follow from the layout."""

    num_trials: int
    """Trials of the share of this rank."""
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
        """Whether what is missing fits on the disk."""
        return self.missing_bytes <= self.free_bytes

    def __str__(self) -> str:
        return (
            f"{self.num_trials} trials, {size_in_words(self.total_bytes)}; {self.num_done} are "
            f"ready, {size_in_words(self.missing_bytes)} to be written, "
            f"{size_in_words(self.free_bytes)} free"
        )


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


def _run(
    todo: Sequence[FillJob], encode: Encode, jobs: int
) -> Iterator[tuple[str, int, str | None]]:
    """Write the files."""
    if jobs == 1 or len(todo) <= 1:
        for job in todo:
            done = 0
            try:
                for frames in job.write(encode):
                    done += frames
                    yield job.source.name, frames, None
            except MediaError as error:
                # The rest of its frames, so that the sum is that of all trials.
                yield job.source.name, job.source.num_frames - done, str(error)
        return
    by_name = {job.source.name: job for job in todo}
    for name, future in run_in_processes(by_name, _start_worker, encode, jobs):
        reason = None
        try:
            future.result()
        except (MediaError, ProcessDiedError) as error:
            reason = str(error)
        yield name, by_name[name].source.num_frames, reason


def _start_worker(encode: Encode) -> Work[FillJob, None]:
    """Receive the encoder once per process, which uses one core."""
    torch.set_num_threads(1)

    def work(job: FillJob, _: ProgressCallback) -> None:
        for _num_frames in job.write(encode):
            pass

    return work


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
            **installed_versions("torch", "transformers"),
        }
        json.dumps(self._made_by)  # raises what has no JSON, before any work

    def file_of(self, name: str) -> Path:
        """Return where the features of the trial of this name are, or will be."""
        return file_in(self.folder, name)

    def fingerprint(self, source: FeatureSource) -> str:
        """Describe everything that the features of a trial depend on, as JSON.

        Of a prepared trial its checksum counts, so that it may be copied to another machine; of
        other files, size and modification time.
        """
        about: dict[str, Any] = source_stamp(source.path)
        if source.path.suffix == SUFFIX:
            digest = read_metadata(source.path).get("sha256")
            if digest is not None:
                about = {"source_sha256": digest}
        # The number of frames is part of it, since it is not always that of the file.
        about["num_frames"] = source.num_frames
        return json.dumps({**self._made_by, **about}, sort_keys=True)

    def _fresh_metadata(self, source: FeatureSource) -> dict[str, str]:
        """What the file of a trial says about itself; raises if it is missing, cut or stale."""
        file = self.file_of(source.name)
        metadata = read_metadata(file, FEATURE_FORMAT, _KIND)
        raise_if_stale(file, metadata["fingerprint"], self.fingerprint(source), _KIND)
        return metadata

    def is_done(self, source: FeatureSource) -> bool:
        """Tell whether the features of a trial are there; raises if they are stale or cut."""
        return self.file_of(source.name).exists() and bool(self._fresh_metadata(source))

    def _job(self, source: FeatureSource) -> FillJob:
        file = self.file_of(source.name)
        return FillJob(source, file, self.fingerprint(source), self.layout)

    def estimate(
        self, sources: Sequence[FeatureSource], *, rank: int = 0, world_size: int = 1
    ) -> CacheEstimate:
        """Compute how many trials and bytes `fill` will write, from the same arguments."""
        share = self._share(sources, rank, world_size)
        sizes = {source.name: self._job(source).file_bytes for source in share}
        done = [source.name for source in share if self.is_done(source)]
        total = sum(sizes.values())
        missing = total - sum(sizes[name] for name in done)
        parents = self.folder, *self.folder.absolute().parents
        existing = next(path for path in parents if path.exists())
        free = shutil.disk_usage(existing).free
        return CacheEstimate(len(share), len(done), total, missing, free)

    def fill(
        self,
        sources: Sequence[FeatureSource],
        encode: Encode,
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
            rank: Which share is this process's, 0 to `world_size - 1`.
            world_size: Number of shares; machines need nothing in common but the sources.
            jobs: Processes, started by spawn: a script that uses more than one must do its work
                under `if __name__ == "__main__":`.
            overwrite: Whether to replace stale or corrupt files, instead of raising.
            progress: Called as `progress(done, total)`, in frames.

        Returns:
            Name to file, of the share of this rank.

        Raises:
            CacheError: If a file is stale or corrupt, or the disk too small, before anything is
                done.
            FeatureCacheError: After all others, if some trials could not be encoded; names them.
            DiskFullError: If the disk is full; files that were finished are kept.
            ValueError: If a number is out of range, two sources share a name, or the rows are not
                what the layout says.
            RuntimeError: If worker processes cannot start.
        """
        check_range("jobs", jobs, 1)
        share = self._share(sources, rank, world_size)
        files = {source.name: self.file_of(source.name) for source in share}
        todo, failures = [], {}
        for source in share:
            try:
                job = self._job(source)
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
                todo.append(job)
        self._check_free_bytes(todo)
        total = sum(source.num_frames for source in share)
        done = total - sum(job.source.num_frames for job in todo)
        if progress is not None:
            progress(done, total)
        for name, frames, reason in _run(todo, encode, jobs):
            if reason is not None:
                failures[name] = reason
            done += frames
            if progress is not None:
                progress(done, total)
        if failures:
            raise FeatureCacheError(failures, {n: f for n, f in files.items() if n not in failures})
        return files

    def _check_free_bytes(self, todo: Sequence[FillJob]) -> None:
        needed = sum(job.file_bytes for job in todo)
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
        metadata = self._fresh_metadata(source)
        file = self.file_of(source.name)
        return _read_features(file, self.layout, metadata, verify, memory_map)

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

    def find_broken(self, sources: Sequence[FeatureSource]) -> dict[str, str]:
        """Read all files in full; returns name to reason of those that cannot be used."""
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
        return [by_name[name] for name in share_longest_first(lengths, world_size)[rank]]
