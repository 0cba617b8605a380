"""Files that are either complete or absent: write to a temporary name, then rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def _temporary(path: Path) -> Path:
    # The suffix stays, since writers choose the format by it; the process id keeps workers apart.
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` if the block succeeds.

    Examples:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "table.csv"
        >>> with atomic_write(target) as partial:
        ...     _ = partial.write_text("done")
        >>> target.read_text()
        'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder and let it take the place of `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def lock_file(stream: IO[bytes]) -> bool:
    """Lock a file while its writer lives, so that it is not taken for abandoned."""
    try:
        import fcntl  # not on Windows, where open files cannot be removed anyway
    except ImportError:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is locked, or the file system has no locks: then leave it alone
        return False
    return True


def remove_abandoned(path: Path) -> None:
    """Delete what killed processes left of earlier attempts at a file."""
    start, end = f".{path.stem}.", f".partial{path.suffix}"
    for left in path.parent.iterdir():
        if left.name.startswith(start) and left.name.endswith(end):
            with suppress(OSError), left.open("r+b") as stream:
                if lock_file(stream):
                    left.unlink(missing_ok=True)
