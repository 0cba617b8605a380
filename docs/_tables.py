"""Tables of the documentation that are computed when the site is built."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from _markdown import plain, table
from _measured import benchmark_tables, cost, where_we_lose
from _sizes import encoder_table, size

from mmau.action_units import AU_DESCRIPTIONS
from mmau.cli import all_registries
from mmau.landmarks import ACTION_UNIT_REGIONS, LANDMARK_SCHEMES, LandmarkScheme

ROOT = Path(__file__).parent.parent

PURPOSES = {
    "mmau.face_detectors": "From a frame to the faces in it.",
    "mmau.landmark_extractors": "From a frame and a face to its landmarks.",
    "mmau.landmark_schemes": "Which points there are, and the regions that they form.",
    "mmau.visual_encoders": "From the face in each frame to patch tokens.",
    "mmau.audio_encoders": "From a waveform to features with their times.",
    "mmau.temporal_models": "From one vector per frame to one vector per frame.",
    "mmau.scan_backends": "Ways to compute the same selective scan.",
    "mmau.losses": "From logits and labels to a number.",
}

MUSCLES = {
    "AU1": "frontalis, inner part",
    "AU2": "frontalis, outer part",
    "AU4": "corrugator supercilii, depressor supercilii, procerus",
    "AU6": "orbicularis oculi, orbital part",
    "AU7": "orbicularis oculi, palpebral part",
    "AU10": "levator labii superioris",
    "AU12": "zygomaticus major",
    "AU15": "depressor anguli oris",
    "AU23": "orbicularis oris",
    "AU24": "orbicularis oris",
    "AU25": "depressor labii inferioris, or relaxed mentalis or orbicularis oris",
    "AU26": "relaxed masseter, temporalis and medial pterygoid",
}
"""The muscles that FACS names for each Action Unit (Ekman, Friesen and Hager, 2002)."""


def registry_tables(level: int = 2) -> str:
    """Return one table per registry: name, what it is, what it needs, the entry-point group."""
    parts = []
    for registry in all_registries():
        if registry.group not in PURPOSES:
            raise ValueError(f"docs/_tables.py does not say what {registry.group!r} is for.")
        rows: list[tuple[object, ...]] = [
            (
                f"`{info.name}`",
                info.summary,
                f'`pip install "mmau[{info.extra}]"`' if info.extra else "nothing more",
            )
            for info in registry.describe()
        ]
        heading = registry.kind.capitalize() + ("es" if registry.kind.endswith("s") else "s")
        parts += [
            f"{'#' * level} {heading}",
            f"{PURPOSES[registry.group]} Entry-point group `{registry.group}`.",
            table(("Name", "What it is", "Needs"), rows),
        ]
    return "\n\n".join(parts)


def action_units_table() -> str:
    """Return the Action Units in label order, with muscles and regions."""
    rows: list[tuple[object, ...]] = [
        (
            column,
            f"`{name}`",
            description,
            MUSCLES[name],
            ", ".join(region.replace("_", " ") for region in ACTION_UNIT_REGIONS[name]),
        )
        for column, (name, description) in enumerate(AU_DESCRIPTIONS.items())
    ]
    return table(("Column", "Name", "FACS name", "Muscles", "Regions in which it shows"), rows)


def region_tables() -> str:
    """Return the regions, with the number of points that each landmark scheme has in them."""
    schemes = [LANDMARK_SCHEMES.get(name) for name in sorted(LANDMARK_SCHEMES)]
    # A plug-in may bring regions of its own; this table is about the ones that are shared.
    schemes = [s for s in schemes if s.region_names == schemes[0].region_names]

    def points(scheme: LandmarkScheme, region: str) -> str:
        own = [index for index in scheme.regions[region] if index < scheme.num_points]
        derived = len(scheme.regions[region]) - len(own)
        return f"{len(own)}" + (f" and {derived} derived" if derived else "")

    rows: list[tuple[object, ...]] = [
        (
            row,
            f"`{region}`",
            *(points(scheme, region) for scheme in schemes),
            ", ".join(au for au, regions in ACTION_UNIT_REGIONS.items() if region in regions),
        )
        for row, region in enumerate(schemes[0].region_names)
    ]
    names = (f"Points of `{scheme.name}`" for scheme in schemes)
    return table(("Row", "Region", *names, "Action Units"), rows)


def api_directives(module: str) -> str:
    """Return one mkdocstrings directive for every public name of a module."""
    names = getattr(importlib.import_module(module), "__all__", ())
    if not names:
        raise ValueError(f"`{module}.__all__` lists no public name.")
    return "\n\n".join(_directive(module, name) for name in names if not name.startswith("__"))


def _directive(module: str, name: str) -> str:
    """Return the directive of one name.

    A function that has the name of its module would be taken for the module, with all that is in
    it; so the function inside is asked for, and the shorter path becomes an anchor before it.
    """
    path = f"{module}.{name}"
    room = hasattr(importlib.import_module(module), "__path__")
    if not room or importlib.util.find_spec(path) is None:
        return f"::: {path}"
    return f"[](){{ #{path} }}\n\n::: {path}.{name}"


# ------------------------------------------------------------------ configuration
def _default(node: ast.expr | None) -> str:
    """Write a default as its author did; a factory as what it makes."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default_factory" in given:
            factory = ast.unparse(given["default_factory"])
            return {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory, f"{factory}()")
        node = given.get("default")
    return "required" if node is None else ast.unparse(node)


def config_tables(path: str, level: int = 3) -> str:
    """Return one table per dataclass of a file: field, type, default, what it says.

    The file is read and not imported, so that a default stands here as it was written.
    """
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no file {path}.")
    parts = []
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or "dataclass" not in "".join(
            ast.unparse(decorator) for decorator in node.decorator_list
        ):
            continue
        rows: list[tuple[object, ...]] = []
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            said = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                said = " ".join(str(after.value.value).split())
            kind = ast.unparse(field.annotation)
            rows.append((f"`{field.target.id}`", f"`{kind}`", f"`{_default(field.value)}`", said))
        if rows and any(row[3] for row in rows):
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            header = ("Field", "Type", "Default", "Meaning")
            parts += [f"{'#' * level} `{node.name}`", summary, table(header, rows)]
    if not parts:
        raise ValueError(f"{path} has no dataclass with documented fields.")
    return "\n\n".join(part for part in parts if part)


# ------------------------------------------------------------------ command line
def _arguments(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    rows: list[tuple[object, ...]] = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        said = plain(formatter._expand_help(action)) if action.help else ""
        rows.append((f"`{formatter._format_action_invocation(action)}`", said))
    return table(("Argument", "Meaning"), rows)


def command_line(level: int = 2) -> str:
    """Return every command of `mmau` with its usage and its arguments."""
    from mmau.cli.parser import build_parser

    parser = build_parser()
    commands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if commands is None or not commands.choices:
        raise ValueError("the command line has no commands.")
    said = {action.dest: action.help for action in commands._choices_actions}
    parts = []
    for name, command in commands.choices.items():
        formatter = argparse.HelpFormatter(command.prog, width=72)
        groups = command._mutually_exclusive_groups
        formatter.add_usage(command.usage, command._actions, groups, prefix="")
        usage = formatter.format_help().strip()
        text = plain(" ".join((command.description or said.get(name) or "").split())).rstrip(".")
        parts += [
            f"{'#' * level} `{command.prog}`",
            f"{text[:1].upper()}{text[1:]}.",
            f"```text\n{usage}\n```",
            _arguments(command),
        ]
    if parser.epilog:
        words = parser.epilog.removeprefix("exit codes:").strip("\n")
        parts += [f"{'#' * level} Exit codes", f"```text\n{words}\n```"]
    return "\n\n".join(parts)


COMPUTED: dict[str, Callable[[str], str]] = {
    "registries": lambda _: registry_tables(),
    "action-units": lambda _: action_units_table(),
    "regions": lambda _: region_tables(),
    "api": api_directives,
    "config": config_tables,
    "command-line": lambda _: command_line(),
    "size": size,
    "encoders": encoder_table,
    "cost": cost,
    "benchmarks": lambda folder: benchmark_tables(ROOT / folder),
    "where-we-lose": lambda _: where_we_lose(),
}
"""What a page asks for with `<!-- name -->` or `<!-- name: argument -->`."""
