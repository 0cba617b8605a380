"""The computed parts of the documentation say what the library says."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from mmau.action_units import AU_NAMES
from mmau.cli import all_registries
from mmau.cli.parser import build_parser
from mmau.landmarks import IBUG68
from mmau.models import DetectorConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import _markdown  # noqa: E402
import _measured  # noqa: E402
import _tables  # noqa: E402

STAMP = {"cpu": "a CPU", "threads": 1, "commit": "0000000"}
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
CHOOSER = PAGES[ROOT / "docs" / "components.md"]
CARDS = sorted((ROOT / "docs" / "components").glob("*.md"))


def _rows(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    bar = r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)"  # neither escaped nor in code
    return [[c.strip() for c in re.split(bar, line)[1:-1]] for line in lines[2:]]


def test_bars_are_escaped_but_not_in_code():
    text = _markdown.table(("a", "b"), [("`int | None`", "one | two")])
    assert text.splitlines()[-1] == r"| `int | None` | one \| two |"


def _write(folder, name, rows, **more):
    content = {"title": name, "stamp": STAMP, "rows": rows, **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


# ------------------------------------------------------------------ tables of the library
def test_every_marker_of_every_page_is_computed():
    used = set()
    for path, text in PAGES.items():
        for name, argument in re.findall(r"<!-- (\w[\w-]*)(?:: ([\w./]+))? -->", text):
            if name in {"skip", "include"}:
                continue
            assert name in _tables.COMPUTED, f"{path.name} asks for {name}"
            assert _tables.COMPUTED[name](argument).strip()
            used.add(name)
    assert used == set(_tables.COMPUTED), "something is computed that no page asks for"


def test_every_registry_and_every_name_has_its_row():
    text = _tables.registry_tables()
    for registry in all_registries():
        assert f"`{registry.group}`" in text
        assert all(f"| `{info.name}` |" in text for info in registry.describe())


def test_action_units_have_muscles_and_regions():
    rows = _rows(_tables.action_units_table())
    assert [row[1].strip("`") for row in rows] == list(AU_NAMES)
    assert [row[0] for row in rows] == [str(column) for column in range(12)]
    assert all(all(row) for row in rows)
    assert set(_tables.MUSCLES) == set(AU_NAMES)


def test_regions_count_own_and_derived_points():
    rows = {row[1].strip("`"): row for row in _rows(_tables.region_tables())}
    assert list(rows) == list(IBUG68.region_names)
    assert rows["nose"][2] == "9"
    assert rows["left_cheek"][2] == "0 and 7 derived"
    assert "AU12" in rows["left_cheek"][4]


def test_the_config_page_has_every_field_with_its_default():
    text = _tables.config_tables("src/mmau/models/config.py")
    rows = {row[0].strip("`"): row for row in _rows(text.partition("`DetectorConfig`")[2])}
    fields = {field.name: field for field in dataclasses.fields(DetectorConfig)}
    assert list(rows) == list(fields)
    assert rows["d_region"][2] == f"`{fields['d_region'].default}`"
    assert rows["frames_per_chunk"][1] == "`int | None`"
    assert rows["merge"][2] == f"`{fields['merge'].default!r}`"
    assert all(row[3] for row in rows.values())


def test_the_config_page_refuses_what_has_no_config():
    with pytest.raises(ValueError, match="there is no file"):
        _tables.config_tables("src/mmau/absent.py")
    with pytest.raises(ValueError, match="no dataclass"):
        _tables.config_tables("src/mmau/action_units.py")


def test_the_command_line_page_has_every_option():
    text = _tables.command_line()
    parser = build_parser()
    (commands,) = (a for a in parser._actions if hasattr(a, "choices") and a.dest == "command")
    for name, command in commands.choices.items():
        part = text.partition(f"## `mmau {name}`")[2].partition("\n## ")[0]
        for action in command._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert option in part, f"mmau {name} {option}"


# ------------------------------------------------------------------ what was measured
def test_a_cost_that_was_not_measured_names_a_script_that_exists(tmp_path):
    for name, excerpts in _measured.COSTS.items():
        text = _measured.cost(name, tmp_path)
        for excerpt in excerpts:
            assert f"python benchmarks/{excerpt.script}.py" in text
            assert (ROOT / "benchmarks" / f"{excerpt.script}.py").is_file()


def test_a_cost_shows_the_rows_that_are_meant(tmp_path):
    rows = [{"what": "hga", "ms": 1.23456, "size": {"b": 2}}, {"what": "attention", "ms": 9.0}]
    _write(tmp_path, "region_attention_times", rows)
    text = _measured.cost("hga", tmp_path)
    assert "1.23" in text
    assert "b 2" in text
    assert "9" not in "".join(map("".join, _rows(text)))
    assert "commit 0000000" in text
    assert "region_attention.py" in text, "the memory is still missing"


def test_a_cost_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="no cost is known as 'nothing'"):
        _measured.cost("nothing", tmp_path)
    _write(tmp_path, "region_attention_times", [{"what": "other", "ms": 1.0}])
    with pytest.raises(ValueError, match="has no row with"):
        _measured.cost("hga", tmp_path)
    (tmp_path / "region_attention_times.json").write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match="needs `stamp` and `rows`"):
        _measured.benchmark_tables(tmp_path)


def test_where_something_else_is_faster_is_found(tmp_path):
    assert "none" in _measured.where_we_lose(tmp_path)
    row = {"width": 64, "what": "forward", "AGSSM": 2.0, "GRU": 3.0}
    rows = [{**row, "frames": 1, "LSTM": 1.0}, {**row, "frames": 2, "LSTM": 0.5}]
    _write(tmp_path, "selective_scan_layers", rows)
    (found,) = _rows(_measured.where_we_lose(tmp_path))
    assert found == ["layer, forward, width 64", "LSTM", "2 to 4"]


# ------------------------------------------------------------------ cards
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_says_all_that_a_card_has_to(card):
    text = card.read_text(encoding="utf-8")
    for part in ("| **For** |", "| **Not for** |", "| **Takes** |", "| **Gives** |"):
        assert part in text, f"{card.name} lacks {part}"
    for part in ("```python", "## Guarded by", "**Cite**"):
        assert part in text, f"{card.name} lacks {part}"
    assert re.search(r"^(## .*[Cc]ost|\*\*Cost\*\*)", text, re.M), f"{card.name} lacks its cost"
    assert len(re.findall(r"`tests/[\w/]+\.py::\w+`", text)) >= 2
    assert f"components/{card.name}" in CHOOSER, "not in the chooser"


def test_the_chooser_leads_to_examples_that_exist():
    links = re.findall(r"gallery/(\w+)\.md", CHOOSER)
    assert len(links) > 10
    assert all((ROOT / "examples" / f"{name}.py").is_file() for name in links)


def test_a_size_is_that_of_the_part_or_an_error():
    assert _tables.COMPUTED["size"]("hga") == "5.7 M"
    with pytest.raises(ValueError, match=r"no size is known of 'gha'; there are: hga, "):
        _tables.COMPUTED["size"]("gha")
