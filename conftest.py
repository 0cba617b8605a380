"""Doctests are collected from all of `src`, but for adapters whose library is not installed."""

from importlib.util import find_spec

ADAPTERS = {
    "triton": ["src/mmau/scan/triton.py"],
    "mediapipe": ["src/mmau/media/mediapipe*.py"],
    "transformers": ["src/mmau/encoders/vision.py", "src/mmau/encoders/speech.py"],
}

collect_ignore_glob = [
    path for library, paths in ADAPTERS.items() if find_spec(library) is None for path in paths
]
