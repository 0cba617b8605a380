"""What MkDocs cannot do by itself: gallery pages, computed tables, links from code, formulas.

A page asks for computed content with a comment, `<!-- registries -->` and the like; `_COMPUTED`
lists them. Whatever cannot be computed fails the build.
"""

from __future__ import annotations

import importlib
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _markdown import grid
from _math import FormulaError, render_formulas
from _tables import COMPUTED
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "build" / "gallery"
_EXAMPLES: dict[str, dict[str, Any]] = {}

_MARKER = re.compile(r"<!-- (\w[\w-]*)(?:: ([\w./]+))? -->")
_DIRECTIVE = re.compile(r"^::: ([\w.]+)(?:\n    .*)*", re.MULTILINE)


def _include(name: str) -> str:
    """Return a file from the top of the repository, with its links made to work from `docs/`."""

    def mend(link: re.Match[str]) -> str:
        words, target = link[1], link[2]
        if target.startswith("docs/"):
            return f"[{words}]({target.removeprefix('docs/')})"
        return words if words.startswith("`") else f"`{words}`"

    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"there is no file {name} at the top of the repository to include.")
    text = path.read_text(encoding="utf-8")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)", mend, text)


_COMPUTED: dict[str, Callable[[str], str]] = {**COMPUTED, "include": _include}


def on_config(config: Any) -> Any:
    """Read what the gallery driver has written, and refuse it when it is out of date."""
    manifest = GALLERY / "manifest.json"
    command = "python docs/_gallery.py examples build/gallery"
    if not manifest.exists():
        raise PluginError(f"the gallery has not been built: run `{command}` first.")
    _EXAMPLES.clear()
    _EXAMPLES.update(json.loads(manifest.read_text(encoding="utf-8")))
    scripts = {path.stem: path.read_bytes() for path in (ROOT / "examples").glob("plot_*.py")}
    built = {path.stem: path.read_bytes() for path in GALLERY.glob("plot_*.py")}
    if scripts != built:
        raise PluginError(f"the gallery is out of date: run `{command}`.")
    for item in config.nav:
        if "Gallery" in item:
            item["Gallery"] = ["gallery/index.md", *(f"gallery/{stem}.md" for stem in _EXAMPLES)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the gallery's pages, pictures, scripts and notebooks."""
    for path in sorted(GALLERY.rglob("*")):
        if path.is_file() and path.suffix in {".md", ".png", ".py", ".ipynb"}:
            name = "gallery/" + path.relative_to(GALLERY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def _resolve(path: str) -> Any:
    """Return the object of a dotted path, or `None`."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def _with_examples(markdown: str, prefix: str) -> str:
    """Under every API directive put the examples that use this very object."""
    used = {
        stem: {id(_resolve(path)) for path in example["api"]} for stem, example in _EXAMPLES.items()
    }

    def add(directive: re.Match[str]) -> str:
        target = _resolve(directive[1])
        users = [e for s, e in _EXAMPLES.items() if target is not None and id(target) in used[s]]
        if not users:
            return directive[0]
        caption = f"Examples that use <code>{directive[1].rpartition('.')[2]}</code>"
        return f"{directive[0]}\n\n{grid(users, prefix, caption=caption)}\n"

    return _DIRECTIVE.sub(add, markdown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the computed parts."""

    def compute(marker: re.Match[str]) -> str:
        if marker[1] == "skip":  # a note to the test of the code blocks
            return marker[0]
        if marker[1] not in _COMPUTED:
            known = ", ".join(sorted(_COMPUTED))
            raise PluginError(
                f"{page.file.src_uri}: no computed part {marker[1]!r}; there are: {known}."
            )
        try:
            return _COMPUTED[marker[1]](marker[2] or "")
        except (ImportError, ValueError) as error:
            raise PluginError(f"{page.file.src_uri}: {marker[0]}: {error}") from error

    here = posixpath.dirname(page.file.src_uri) or "."
    prefix = posixpath.relpath("gallery", here) + "/"
    return _with_examples(_MARKER.sub(compute, markdown), prefix)


def _link_names(content: str, names: dict[str, str]) -> str:
    """Make the library's names in highlighted code lead to the API; autorefs resolves them."""
    dot = r'<span class="o">\.</span>'
    patterns = {
        dot.join(
            rf'<span class="n[a-z]?">{re.escape(part)}</span>' for part in used.split(".")
        ): target
        for used, target in sorted(names.items(), key=lambda item: -len(item[0]))
    }
    if not patterns:
        return content
    any_name = re.compile("|".join(f"({pattern})" for pattern in patterns))
    targets = list(patterns.values())
    return any_name.sub(
        lambda m: f'<autoref identifier="{targets[m.lastindex - 1]}" optional>{m[0]}</autoref>',
        content,
    )


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Render the formulas, and link the names in the code of examples."""
    try:
        content = render_formulas(content)
    except FormulaError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
    if page.file.src_uri.startswith("gallery/plot_"):
        content = _link_names(content, _EXAMPLES[Path(page.file.src_uri).stem]["names"])
    return content


def on_post_build(config: Any) -> None:
    """Write the search index as a script too: a page opened from a folder may not fetch it."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    text = index.read_text(encoding="utf-8")
    index.with_suffix(".js").write_text(f"var __index = {text}", encoding="utf-8")


def on_serve(server: Any, config: Any, builder: Any) -> Any:
    """Rebuild when the library changes."""
    server.watch(str(ROOT / "src"))
    return server
