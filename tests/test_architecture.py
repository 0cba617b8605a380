"""Imports only run downwards and never in a circle, `import mmau` is light, names are the field's.

    python tests/test_architecture.py

writes the diagram of the layers into CONTRIBUTING.md.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mmau"

# The layers from the ground up: packages, and what the layer is for. A file may import from its own
# package and from lower layers.
LAYERS = [
    ("_autocast _checks _files _version action_units", "checks, whole files, Action Units"),
    ("_pool registry", "processes, parts by name, plug-ins"),
    ("_optional scan", "the selective scan and its backends"),
    ("progress functional", "tensors in, tensors out"),
    ("landmarks evaluation tables", "points and regions, scores and decisions, label files"),
    ("modules encoders media plot", "nn.Modules, adapters to heavy libraries, images of results"),
    ("models synthetic testing", "the detector, rendered clips, contracts for plug-ins"),
    ("data training", "data sets on disk, parts of a training loop"),
    ("inference", "a video or a camera in, a table out"),
    ("cli", "`mmau`"),
]
LAYER_OF = {name: level for level, (names, _) in enumerate(LAYERS) for name in names.split()}
HEAVY = {
    "av", "cv2", "huggingface_hub", "matplotlib", "mediapipe", "onnxruntime", "pandas",
    "peft", "pyarrow", "rich", "scipy", "skimage", "sklearn", "torchaudio",
    "torchvision", "transformers", "tyro", "uniface",
}  # fmt: skip
# Words that the field does not use for these things. (`hold` and `slope` are left to the reader: a
# movement has a hold, a linear bias over time a slope.)
DIALECT = {
    "heard", "hears", "sees", "senses", "picture", "film", "everybody", "nobody", "deaf", "taught",
    "untaught", "mood", "knobs", "stretch", "filler", "floors", "widths", "spare",
    "whole_file", "whole_folder", "guide", "audio_query", "reach_of", "seen_chunk",
    "person_stream", "piece_worker", "cross_fitted", "goes_on", "room", "house", "mend", "piece",
    "pull", "away", "engine", "minus", "deal",
}  # fmt: skip


def _is_former_place(path: Path) -> bool:
    return ast.get_docstring(ast.parse(path.read_text())).startswith("The former place")


FILES = [
    path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py" and not _is_former_place(path)
]


def _named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules of the library that a file imports, anywhere in it, by their dotted names."""
    known = {_module(file) for file in SOURCE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inside]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "mmau"}
    return found


@_named(FILES)
def test_imports_run_downwards(path):
    here = _package(_module(path))
    for module in imported(path) - {"mmau"}:
        there = _package(module)
        assert there == here or LAYER_OF[there] < LAYER_OF[here], f"{path} must not import {module}"


@_named(FILES)
def test_no_file_imports_a_private_file_of_another_package(path):
    for module in imported(path):
        package, _, name = module.rpartition(".")
        private = name.startswith("_") and package != "mmau"
        assert not private or package == _module(path.parent), f"{path} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    arrows = {_module(path): imported(path) for path in FILES if path.name != "__init__.py"}
    while free := [module for module, needs in arrows.items() if not needs & set(arrows)]:
        for module in free:
            del arrows[module]
    assert not arrows


def _bound_names(path: Path) -> set[str]:
    """Names that a file gives to something."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def _dialect_in(name: str) -> set[str]:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    return {word for word in DIALECT if re.search(rf"(?:^|_){word}(?:_|$)", words)}


@_named([*FILES, *sorted((ROOT / "recipes").glob("*.py"))])
def test_names_are_the_words_of_the_field(path):
    found = {name: _dialect_in(name) for name in _bound_names(path)}
    assert not {name: words for name, words in found.items() if words}


def test_the_search_for_words_finds_parts_of_names():
    assert _dialect_in("SeenChunkReader") == {"seen_chunk"}
    assert _dialect_in("_audio_heard") == {"heard"}
    assert not _dialect_in("bedroom")


def fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_mmau_loads_no_heavy_library():
    loaded = fresh(
        "import sys, mmau.functional, mmau.modules, mmau.landmarks, mmau.encoders, mmau.models;"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    assert not HEAVY & set(loaded.split())


def test_import_mmau_adds_little_to_torch():
    """Counted in modules, not in seconds, so that a busy machine cannot fail it."""
    torch_modules, all_modules = map(
        int,
        fresh(
            "import sys, torch; n = len(sys.modules); import mmau; print(n, len(sys.modules))"
        ).split(),
    )
    assert all_modules < 1.25 * torch_modules


def test_every_public_name_exists_and_is_documented():
    import mmau

    for name in mmau.__all__:
        assert getattr(mmau, name).__doc__, name
    assert mmau.__version__ == importlib.metadata.version("mmau")


def diagram() -> str:
    """Draw the layers, from the top down."""
    rows = [("recipes examples", "choose parts by name, own every configuration"), *LAYERS[::-1]]
    return "```text\n" + "".join(f"{names:50}{what}\n" for names, what in rows) + "```"


def _contributing(drawn: str | None = None) -> str:
    """CONTRIBUTING.md, with another diagram if one is given."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text if drawn is None else re.sub(r"```text\n.*?```", lambda _: drawn, text, flags=re.S)


def test_the_diagram_of_contributing_is_that_of_the_table():
    assert _contributing() == _contributing(diagram())


if __name__ == "__main__":
    (ROOT / "CONTRIBUTING.md").write_text(_contributing(diagram()))
