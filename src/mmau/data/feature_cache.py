"""Features of a frozen encoder, computed once and kept in one file per trial.

Each file appears only when it is complete, carries a fingerprint of its source, encoder, options
and versions, and a checksum of everything in it. So a run that was killed goes on where it stopped,
and what is stale or altered is refused in a sentence. Several machines share the work by rank,
without talking to each other: each knows its share from the lengths of all trials.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_range
from mmau._files import whole_file
from mmau._version import __version__
from mmau.data._feature_cache_file import (
    FEATURE_FORMAT,
    FeatureLayout,
    file_bytes,
    read_features,
    read_header,
)
from mmau.data._feature_cache_jobs import FillJob, run_fill_jobs, shard_by_length
from mmau.data._feature_cache_source import (
    CachedTrials,
    CacheEstimate,
    FeatureCacheError,
    FeatureSource,
    prepared_sources,
    size_in_words,
)
from mmau.data._feature_tokens import module_fingerprint, token_rows
from mmau.data.prepared_trial import CacheError
from mmau.media.errors import MediaError, check_file
from mmau.progress import ProgressCallback

__all__ = [
    "CacheEstimate",
    "CachedTrials",
    "FeatureCache",
    "FeatureCacheError",
    "FeatureLayout",
    "FeatureSource",
    "module_fingerprint",
    "prepared_sources",
    "shard_by_length",
    "token_rows",
]

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
        with whole_file(path) as unfinished:
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
