"""`mmau components`: every registered part, and whether it can be used here."""

from __future__ import annotations

import argparse
from typing import Any

from mmau.cli.console import Console
from mmau.registry import Registry


def all_registries() -> list[Registry[Any]]:
    """Return every registry of the library, in the order in which a system is built.

    Returns:
        Face detectors first, losses last.
    """
    from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
    from mmau.landmarks import LANDMARK_SCHEMES
    from mmau.media.faces import FACE_DETECTORS, LANDMARK_EXTRACTORS
    from mmau.modules.losses import LOSSES
    from mmau.modules.temporal import TEMPORAL_MODELS
    from mmau.scan.backend import SCAN_BACKENDS

    return [
        FACE_DETECTORS,
        LANDMARK_EXTRACTORS,
        LANDMARK_SCHEMES,
        VISUAL_ENCODERS,
        AUDIO_ENCODERS,
        TEMPORAL_MODELS,
        SCAN_BACKENDS,
        LOSSES,
    ]


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "components", parents=parents, help="list every registered component"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    del arguments
    for registry in all_registries():
        plural = f"{registry.kind}es" if registry.kind.endswith("s") else f"{registry.kind}s"
        console.result(f"{plural}  (entry-point group {registry.group})")
        rows = registry.describe()
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            origin = "" if row.source == "mmau" else f" [from {row.source}]"
            console.result(f"  {row.name:<{width}}  {row.summary}{origin}")
            console.result(f"  {'':<{width}}  {row.status}")
        console.result("")
    return 0
