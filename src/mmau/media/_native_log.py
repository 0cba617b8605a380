"""What native libraries say on stderr while they start, kept back unless something fails."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["quiet_native_stderr"]

_stderr_lock = threading.Lock()


@contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Keep what native code writes to stderr for itself, unless the block fails.

    TensorFlow Lite and absl announce themselves on file descriptor 2 when a graph starts, before
    any of their own switches works. The descriptor is put back at once.
    """
    with _stderr_lock, tempfile.TemporaryFile() as captured:
        with suppress(AttributeError, ValueError):  # no stderr at all (pythonw), or closed
            sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(captured.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                captured.seek(0)
                os.write(2, captured.read())
