"""`python -m mmau.cli`."""

from __future__ import annotations

import sys

from mmau.cli import main

__all__: list[str] = []

if __name__ == "__main__":  # a worker that is spawned imports this file too
    sys.exit(main())
