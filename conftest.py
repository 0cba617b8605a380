"""Doctests are collected from all of `src`, but for adapters whose library is not installed."""

from importlib.util import find_spec

ADAPTERS = {
    "triton": ["src/mmau/functional/selective_scan/_triton*.py"],
    "mediapipe": ["src/mmau/media/mediapipe_faces.py"],
    "transformers": ["src/mmau/encoders/dinov2.py", "src/mmau/encoders/wavlm.py"],
}

collect_ignore_glob = [
    path for library, paths in ADAPTERS.items() if find_spec(library) is None for path in paths
]
