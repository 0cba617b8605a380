"""Every public name is in the reference, in the inventory of the site, and in code that runs."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import types
import zlib
from pathlib import Path

import griffe
import pytest

import mmau

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SITE", ROOT / "site"))


def _public_modules():
    """The package, its rooms, and the modules beside them; not the files inside of a room."""
    found = {"mmau": mmau}
    for info in pkgutil.walk_packages(mmau.__path__, "mmau."):
        inside = info.name.removeprefix("mmau.").split(".")
        if any(part.startswith("_") for part in inside) or (len(inside) > 1 and not info.ispkg):
            continue
        module = importlib.import_module(info.name)
        parent, _, name = info.name.rpartition(".")
        # `mmau.functional.selective_scan` is the function; a former place only hands names on.
        former = (inspect.getdoc(module) or "").startswith("The former place")
        if getattr(importlib.import_module(parent), name, module) is module and not former:
            found[info.name] = module
    return found


MODULES = _public_modules()


def _documented():
    """Path to object, of everything that a page of the reference lists."""
    found = {}
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for module in re.findall(r"^<!-- api: ([\w.]+) -->$", page.read_text(), re.MULTILINE):
            for name in importlib.import_module(module).__all__:
                path = f"{module}.{name}"
                assert path not in found, f"{path} is on two pages"
                found[path] = getattr(importlib.import_module(module), name)
    return found


DOCUMENTED = _documented()


def _names(module):
    return [name for name in module.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("path", MODULES)
def test_every_public_name_is_in_the_reference(path):
    module = MODULES[path]
    assert _names(module), f"{path} lists no public name"
    known = {id(thing) for thing in DOCUMENTED.values()}
    missing = [n for n in _names(module) if id(getattr(module, n)) not in known]
    assert not missing, f"no page under docs/reference lists {', '.join(missing)} of {path}"


def test_the_check_would_find_a_missing_name():
    module = types.ModuleType("module")
    module.__all__, module.new = ["new"], object()
    assert id(module.new) not in {id(thing) for thing in DOCUMENTED.values()}
    assert len(MODULES) >= 15


@pytest.mark.browser
@pytest.mark.parametrize("path", MODULES)
def test_every_public_name_is_in_the_inventory_of_the_site(path):
    inventory = SITE / "objects.inv"
    if not inventory.is_file():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"there is no built site at {SITE}")
        pytest.skip(f"there is no built site at {SITE}: run `make docs`")
    packed = inventory.read_bytes().split(b"\n", 4)[4]
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    # A function with the name of its module is listed inside of it.
    missing = [
        name
        for name in _names(MODULES[path])
        if not listed & {f"{path}.{name}", f"{path}.{name}.{name}"}
    ]
    assert not missing, f"{path}: objects.inv lacks {', '.join(missing)}"


def _used_in_code(code):
    """Names that a piece of code uses, whichever way they were imported."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set()
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return loaded | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _used_in_doctests():
    parser, used = doctest.DocTestParser(), set()
    for path in (ROOT / "src" / "mmau").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for example in parser.get_examples(ast.get_docstring(node) or ""):
                    used |= _used_in_code(example.source)
    return used


def test_every_name_of_the_package_is_in_code_that_runs():
    """In the gallery, in a docstring, or in a block of these pages; all of them are run."""
    used = _used_in_doctests()
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            used |= _used_in_code(block)
    for example in (ROOT / "examples").glob("plot_*.py"):
        used |= _used_in_code(example.read_text(encoding="utf-8"))
    missing = [name for name in _names(mmau) if name not in used]
    assert not missing, f"no example, docstring or page uses {', '.join(missing)}"


def test_every_function_and_class_has_a_docstring():
    bare = [
        path
        for path, thing in DOCUMENTED.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not inspect.getdoc(thing)
    ]
    assert not bare


def _callables(path, thing):
    """A function, or a class with its public methods; each with what its docstring documents."""
    if inspect.isfunction(thing):
        yield path, thing, inspect.getdoc(thing)
    elif inspect.isclass(thing):
        if "__init__" in vars(thing) and not dataclasses.is_dataclass(thing):
            yield path, thing.__init__, inspect.getdoc(thing)
        for name, member in vars(thing).items():
            method = getattr(member, "__func__", member)
            if inspect.isfunction(method) and not name.startswith("_"):
                yield f"{path}.{name}", method, inspect.getdoc(method)


def _differences(function, doc):
    """Arguments that a docstring with a list of them lacks, has too many of, or puts elsewhere."""
    parsed = griffe.parse_google(griffe.Docstring(doc or ""), warnings=False)
    listed = [
        argument.name.lstrip("*")
        for section in parsed
        if section.kind is griffe.DocstringSectionKind.parameters
        for argument in section.value
    ]
    taken = [name for name in inspect.signature(function).parameters if name not in {"self", "cls"}]
    full = any(section.kind is not griffe.DocstringSectionKind.text for section in parsed)
    return (listed, taken) if full and listed != taken else None


def test_docstrings_list_the_arguments_of_the_signature():
    wrong = {
        name: _differences(function, doc)
        for path, thing in DOCUMENTED.items()
        for name, function, doc in _callables(path, thing)
        if _differences(function, doc)
    }
    assert not wrong


def test_a_docstring_without_one_of_the_arguments_is_found():
    def add(a, b):
        """Add.

        Args:
            a: First.
        """
        return a + b

    assert _differences(add, inspect.getdoc(add)) == (["a"], ["a", "b"])


def _used_by():
    """Words of the recipes, the command line, the examples and the pages."""
    used = set()
    for folder in (ROOT / "recipes", ROOT / "src" / "mmau" / "cli", ROOT / "examples"):
        for path in folder.rglob("*.py"):
            used |= _used_in_code(path.read_text(encoding="utf-8"))
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        used |= set(re.findall(r"\w+", page.read_text(encoding="utf-8")))
    return used


def test_every_public_name_has_a_caller():
    used = _used_by()
    idle = [path for path in DOCUMENTED if path.rpartition(".")[2] not in used]
    assert not idle, "no recipe, command, example or page uses " + ", ".join(idle)
    assert "AGSSM" in used
    assert "absent_name_of_nothing" not in used
