"""Run the examples and write one Markdown page, one notebook and one thumbnail for each.

    python docs/_gallery.py examples build/gallery

sphinx-gallery parses, executes and scrapes; the pages are ours, so any site generator can take
them. A failing example, and a warning in one, ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from textwrap import dedent
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))

from _markdown import grid

STYLE = {
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
# Third-party notices that no change of ours can silence; the tests ignore the same ones.
KNOWN_WARNINGS = (
    r".*SymbolDatabase.GetPrototype.*",
    r"Protobuf gencode version.*",
    r".*torch.jit.script.*",
)
_IMAGE = "\x00image\x00"
_INDENTED = r"\n\n((?:    .*\n|[ \t]*\n)+)"


class ExampleError(RuntimeError):
    """An example raised, warned, drew nothing or has no title."""


def _scrape(block: Any, variables: dict[str, Any], conf: dict[str, Any], **options: Any) -> str:
    """Save the figures as sphinx-gallery does, but return marked lines instead of reST."""
    from sphinx_gallery import scrapers

    saved = len(variables["image_path_iterator"])
    rest = scrapers.matplotlib_scraper(block, variables, conf, **options)
    names = [Path(path).name for path in variables["image_path_iterator"].paths[saved:]]
    texts = re.findall(r":alt: (.*)", rest)
    texts += [""] * (len(names) - len(texts))
    return "".join(f"{_IMAGE}{name}\t{text}\n" for name, text in zip(names, texts, strict=True))


def _same_start(conf: dict[str, Any], name: str) -> None:
    """Give every example the same figure style and the same seed."""
    import matplotlib as mpl

    mpl.rcParams.update(STYLE)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _configuration(examples: Path) -> dict[str, Any]:
    from sphinx_gallery import gen_gallery

    conf: dict[str, Any] = gen_gallery._fill_gallery_conf_defaults(
        {
            "image_scrapers": (_scrape,),
            "reset_modules": ("matplotlib", _same_start),
            "abort_on_example_error": True,
            "capture_repr": ("_repr_html_", "__repr__"),
            "ignore_repr_types": r"matplotlib|list|tuple|NoneType",
            "remove_config_comments": True,
            "thumbnail_size": (640, 320),
        }
    )
    conf["src_dir"] = str(examples)
    conf["plot_gallery"] = True
    return conf


def _output_markdown(rest: str) -> str:
    """Turn what a block produced (figures, text, HTML) into Markdown."""
    parts = []
    lines = rest.splitlines()
    images = [line[len(_IMAGE) :].split("\t") for line in lines if line.startswith(_IMAGE)]
    if images:
        pictures = "\n".join(
            f"![{text.translate(str.maketrans('[]', '()'))}](images/{name}){{ loading=lazy }}"
            for name, text in images
        )
        parts.append(
            f'<div class="gl-img" data-n="{len(images)}" markdown>\n\n{pictures}\n\n</div>'
        )
    rest = "\n".join(line for line in lines if not line.startswith(_IMAGE)) + "\n"
    if printed := re.search(r"\.\. code-block:: none" + _INDENTED, rest):
        text = dedent(printed[1]).strip("\n")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        parts.append(f"{fence} {{ .text .no-copy .gl-out }}\n{text}\n{fence}")
    if shown := re.search(r"\.\. raw:: html" + _INDENTED, rest):
        parts.append("\n".join(line for line in dedent(shown[1]).splitlines() if line.strip()))
    return "\n\n".join(parts)


def _title_and_lead(docstring: str, script: Path) -> tuple[str, str]:
    lines = docstring.strip("\n").splitlines()
    if len(lines) < 2 or not re.fullmatch(r"=+", lines[1].strip()):
        raise ExampleError(f"{script}: its docstring must start with a title underlined by '='.")
    return lines[0].strip(), "\n".join(lines[2:]).strip()


def _library_names(
    blocks: list[Any], variables: dict[str, Any], node: Any, package: str
) -> dict[str, str]:
    """Map each public name of the library, as the example writes it, to its path."""
    from sphinx_gallery.backreferences import identify_names

    def public(module: str, name: str) -> bool:
        return name in getattr(sys.modules.get(module), "__all__", ())

    reference = rf"\]\[({package}(?:\.\w+)*)\]"
    found = identify_names(blocks, reference, variables["example_globals"], node)
    names: dict[str, str] = {}
    for used, objects in found.items():
        for candidate in objects:
            module, name = candidate["module_short"], candidate["name"]
            if module.split(".")[0] == package and public(module, name):
                names.setdefault(used, f"{module}.{name}")
                break
    return names


def _write_notebook(blocks: list[Any], title: str, lead: str, path: Path) -> None:
    from sphinx_gallery import notebook

    book = notebook.jupyter_notebook_skeleton()
    notebook.add_code_cell(book, "%matplotlib inline")
    for number, block in enumerate(blocks):
        if block.type == "code":
            if block.content.strip():
                notebook.add_code_cell(book, block.content)
            continue
        text = f"# {title}\n\n{lead}" if number == 0 else block.content
        # A notebook has no API to link to: keep the words of `[words][mmau.Name]`.
        notebook.add_markdown_cell(book, re.sub(r"\[([^\]]+)\]\[[\w.]*\]", r"\1", text))
    notebook.save_notebook(book, path)


def _page(
    stem: str, title: str, lead: str, blocks: list[Any], outputs: list[str], seconds: float
) -> list[str]:
    page = [
        f"# {title} {{ #gallery-{stem} }}",
        lead,
        '<div class="gl-bar" markdown>\n'
        f"[:material-language-python: Script]({stem}.py){{ download }} "
        f"[:material-notebook: Notebook]({stem}.ipynb){{ download }} "
        f"<span>ran in {seconds:.1f} s when this page was built</span>\n</div>",
    ]
    for block, output in list(zip(blocks, outputs, strict=True))[1:]:
        if block.type == "text":
            page.append(block.content.rstrip())
        elif block.content.strip():
            page.append("```python\n" + block.content.strip("\n") + "\n```")
            if shown := _output_markdown(output):
                page.append(shown)
    return page


def _run(script: Path, out: Path, conf: dict[str, Any], package: str) -> dict[str, Any]:
    """Run one example and write everything that belongs to it."""
    from sphinx_gallery import gen_rst, py_source_parser, scrapers

    stem, images = script.stem, out / "images"
    images.mkdir(parents=True, exist_ok=True)
    # sphinx-gallery wants file names as `str`.
    settings, blocks, node = py_source_parser.split_code_and_text_blocks(
        str(script), return_node=True
    )
    title, lead = _title_and_lead(blocks[0].content, script)
    template = str(images / f"sphx_glr_{stem}_{{0:03}}.png")
    variables = {
        "execute_script": True,
        "image_path_iterator": scrapers.ImagePathIterator(template),
        "src_file": str(script),
        "target_file": str(out / script.name),
    }
    shutil.copyfile(script, out / script.name)
    scrapers.clean_modules(conf, script.name, "before")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            outputs, seconds = gen_rst.execute_script(blocks, variables, conf, settings)
    except Exception as error:
        raise ExampleError(f"{script}: {type(error).__name__}: {error}") from error
    if not len(variables["image_path_iterator"]):
        raise ExampleError(f"{script}: it drew no figure.")
    blocks, outputs = gen_rst._clean_script_blocks(conf, py_source_parser, blocks, outputs)

    names = _library_names(blocks, variables, node, package)
    _write_notebook(blocks, title, lead, out / f"{stem}.ipynb")
    gen_rst.save_thumbnail(template, str(script), variables, settings, conf)
    thumb = next((images / "thumb").glob(f"sphx_glr_{stem}_thumb.*"))

    page = _page(stem, title, lead, blocks, outputs, seconds)
    api = sorted(set(names.values()))
    if api:
        links = ", ".join(f"[`{name}`][{name}]" for name in api)
        page.append(f"---\n\n**API used here:** {links}")
    (out / f"{stem}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return {
        "stem": stem,
        "title": title,
        "intro": " ".join(lead.split("\n\n")[0].split()),
        "thumb": thumb.relative_to(out).as_posix(),
        "names": names,
        "api": api,
        "seconds": round(seconds, 3),
    }


def build(examples: Path, out: Path, package: str) -> None:
    """Make the gallery anew; `ExampleError` if an example fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    conf = _configuration(examples)
    entries = {}
    for script in sorted(examples.glob("plot_*.py")):
        entries[script.stem] = entry = _run(script, out, conf, package)
        print(f"gallery: ran {script.name} in {entry['seconds']:.1f} s", flush=True)
    head = (examples / "README.md").read_text(encoding="utf-8").rstrip()
    cards = grid(list(entries.values()))
    (out / "index.md").write_text(f"{head}\n\n{cards}\n", encoding="utf-8")
    # Last: without it the site is not built.
    (out / "manifest.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def main() -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("examples", type=Path, help="folder with plot_*.py and README.md")
    parser.add_argument("out", type=Path, help="folder to write anew")
    parser.add_argument("--package", default="mmau", help="top-level name of the library")
    given = parser.parse_args()
    try:
        build(given.examples.resolve(), given.out.resolve(), given.package)
    except ExampleError as error:
        print(f"gallery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
