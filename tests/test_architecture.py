"""The house, enforced: imports only run downwards, `import mmau` is light."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mmau"

# Floor of every room, from the ground up. A file may import from its own room and from lower
# floors; rooms of one floor may use each other only where SAME_FLOOR says so.
FLOORS = [
    {"_autocast", "_checks", "_files", "_version", "action_units"},
    {"_pool", "registry"},
    {"_optional", "scan"},
    {"progress", "functional"},
    {"landmarks", "evaluation", "tables"},
    {"modules", "encoders", "media", "plot", "metrics", "calibration"},
    {"models", "synthetic", "testing"},
    {"data", "training"},
    {"inference"},
    {"cli"},
]
SAME_FLOOR: set[tuple[str, str]] = set()
HEAVY = {
    "av", "cv2", "huggingface_hub", "matplotlib", "mediapipe", "onnxruntime", "pandas",
    "peft", "pyarrow", "rich", "scipy", "skimage", "sklearn", "torchaudio",
    "torchvision", "transformers", "tyro", "uniface",
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"the room {room!r} stands on no floor; add it to FLOORS")


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "mmau":
                renamed = {"__version__": "_version"}
                names = [f"mmau.{renamed.get(alias.name, alias.name)}" for alias in node.names]
            else:
                names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mmau" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_downwards(path):
    here = room_of(path)
    for there in imported_rooms(path) - {here}:
        allowed = floor_of(there) < floor_of(here) or (here, there) in SAME_FLOOR
        assert allowed, f"{path.relative_to(SOURCE)} ({here}) must not import mmau.{there}"


def imported_files(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their dotted names."""
    return {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmau.")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_imports_a_private_file_of_another_package(path):
    for module in imported_files(path):
        package, _, name = module.rpartition(".")
        private = name.startswith("_") and package != "mmau"
        assert not private or package == f"mmau.{room_of(path)}", f"{path} imports {module}"


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
