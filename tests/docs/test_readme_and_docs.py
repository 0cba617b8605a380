"""The Python code of README.md and of the pages runs, and the tests that the pages name exist."""

import doctest
import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from mmau.cli import all_registries

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```py" in page.read_text(encoding="utf-8")]


class _FirstWord(CodeBlockParser):
    """Also takes ```python title="x"``` and {.python ...}, which the stock parser passes over."""

    def __call__(self, document):
        for region in self.lexers(document):
            words = region.lexemes["arguments"].strip("{} ").lstrip(".").split()
            if words and words[0] in {"python", "py", "pycon"}:
                region.parsed = region.lexemes["source"]
                region.evaluator = self._evaluator or self.evaluate
                yield region


class _Python(PythonCodeBlockParser):
    codeblock_parser_class = _FirstWord


FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SYBIL = Sybil(parsers=[_Python(doctest_optionflags=FLAGS), SkipParser()])


@pytest.fixture(autouse=True)
def _registries_unchanged():
    """What a page registers must not be seen by the tests that go over every registered name."""
    tables = all_registries()
    before = [dict(table._own) for table in tables]
    yield
    for table, own in zip(tables, before, strict=True):
        table._own.clear()
        table._own.update(own)


def _name(page):
    return page.relative_to(ROOT).as_posix()


def test_there_is_code_to_run():
    names = {_name(page) for page in WITH_CODE}
    assert {"docs/get_started.md", "docs/how_to/add_a_component.md"} <= names


@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
def test_code_blocks_run(page):
    document = SYBIL.parse(page)
    examples = list(document.examples())
    fences = len(re.findall(r"^```\W*py", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert len(examples) >= fences, "a code block was not recognised"
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name, _, test in re.findall(
        r"`((?:tests|src|examples|recipes|docs)/[\w./-]+)(::(\w+))?`", text
    ):
        assert (ROOT / name).exists(), f"{_name(page)} names {name}"
        if test:
            assert f"def {test}(" in (ROOT / name).read_text(encoding="utf-8"), (
                f"no {test} in {name}"
            )
