"""What the benchmarks wrote, as tables for the cards and for the page of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _markdown import number, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Excerpt:
    """Rows of one result file that a card shows."""

    name: str
    """Name of the file without `.json`."""
    script: str
    """The script in `benchmarks/` that writes it."""
    where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Column to the values that a row may have there."""
    columns: tuple[str, ...] = ()
    """Columns to show; all if empty. One that is not there is left out."""


COSTS: dict[str, tuple[Excerpt, ...]] = {
    "landmark_to_patch": (Excerpt("landmark_to_patch_modes", "landmark_to_patch"),),
    "hga": (
        Excerpt("region_attention_times", "region_attention", {"what": ("hga",)}),
        Excerpt("region_attention_memory", "region_attention", {"what": ("hga",)}),
    ),
    "asymmetric_cross_attention": (
        Excerpt("cross_attention_cases", "cross_attention", {"what": ("module",)}),
    ),
    "selective_scan": (
        Excerpt(
            "selective_scan_cases",
            "selective_scan",
            columns=("size", "what", "chunked", "compiled", "mambapy pscan"),
        ),
    ),
    "layers": (Excerpt("selective_scan_layers", "selective_scan"),),
    "losses": (Excerpt("asymmetric_loss_cases", "asymmetric_loss", {"target": ("float32",)}),),
    "predict": (
        Excerpt("predict_stages", "predict"),
        Excerpt("predict_memory", "predict"),
        Excerpt("predict_steps", "predict"),
    ),
}
"""Card to what it shows of the results."""

RIVALS: dict[str, tuple[str, tuple[str, ...], Callable[[Row], str]]] = {
    "selective_scan_cases": (
        "chunked",
        ("mambapy pscan", "transformers, slow path", "mamba, selective_scan_ref", "mamba-minimal"),
        lambda row: f"scan, {row['what'].split(',')[0]}, {_size(row['size'])}",
    ),
    "selective_scan_layers": (
        "AGSSM",
        ("TCN block", "LSTM", "GRU", "attention"),
        lambda row: f"layer, {row['what']}, width {row['width']}",
    ),
    "region_attention_times": (
        "mmau",
        ("nn.MultiheadAttention", "projected keys + SDPA"),
        lambda row: f"{row['what']}, {row['kind']}, {_size(row['size'])}",
    ),
    "cross_attention_cases": (
        "local, ms",
        ("dense, ms",),
        lambda row: f"cross-attention, {row['what']}, {row['kind']}, {_size(row['size'])}",
    ),
}
"""Result file to our column, the columns it is compared with, and the words for a row."""


def read_result(path: Path) -> Row:
    """Read a result and check that it says where it was measured."""
    result: Row = json.loads(path.read_text(encoding="utf-8"))
    if not result.get("stamp") or not result.get("rows"):
        raise ValueError(f"{path.name}: a benchmark result needs `stamp` and `rows`.")
    return result


def _size(value: Mapping[str, int] | Sequence[int]) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " x ".join(map(str, value))


def _flat(row: Row) -> dict[str, str]:
    """Give every number a column of its own, and every size one cell."""
    flat: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, list) or (
            isinstance(value, dict) and all(isinstance(part, int) for part in value.values())
        ):
            flat[key] = _size(value)
        elif isinstance(value, dict):
            flat |= {f"{name}, {key}": number(part) for name, part in value.items()}
        else:
            flat[key] = number(value)
    return flat


def rows_table(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Return result rows as a table."""
    flat = [_flat(row) for row in rows]
    present = list(dict.fromkeys(key for row in flat for key in row))
    shown = [column for column in columns if column in present] if columns else present
    return table(shown, [[row.get(column, "") for column in shown] for row in flat])


def _stamp(result: Row, keys: Sequence[str] = ()) -> str:
    chosen = {k: v for k, v in result["stamp"].items() if not keys or k in keys}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in chosen.items())


def cost(name: str, folder: Path = RESULTS) -> str:
    """Return the measured cost of a component, for its card."""
    if name not in COSTS:
        raise ValueError(f"no cost is known as {name!r}; there are: {', '.join(sorted(COSTS))}.")
    parts, missing = [], []
    for excerpt in COSTS[name]:
        path = folder / f"{excerpt.name}.json"
        if not path.exists():
            missing.append(excerpt.script)
            continue
        result = read_result(path)
        rows = [
            row
            for row in result["rows"]
            if all(row.get(key) in allowed for key, allowed in excerpt.where.items())
        ]
        if not rows:
            raise ValueError(f"{path.name} has no row with {dict(excerpt.where)}.")
        hidden = excerpt.where.keys() if len(rows[0]) > len(excerpt.where) else ()
        rows = [{key: v for key, v in row.items() if key not in hidden} for row in rows]
        parts += [
            f"**{result.get('title', excerpt.name)}.** {result.get('note', '')}".strip(),
            rows_table(rows, excerpt.columns),
            f"*{_stamp(result, ('cpu', 'threads', 'torch', 'commit'))}.*",
        ]
    for script in dict.fromkeys(missing):
        parts.append(
            "There is no result for this version yet. "
            f"`python benchmarks/{script}.py` measures, and this page then shows it."
        )
    return "\n\n".join(parts)


def benchmark_tables(folder: Path) -> str:
    """Return the recorded benchmark results."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        parts += [
            f"### {result.get('title', path.stem.replace('_', ' ').capitalize())}",
            rows_table(result["rows"]),
            f"Measured on: {_stamp(result)}.",
            result.get("note", ""),
        ]
    if not parts:
        return "No result has been recorded for this version."
    return "\n\n".join(part for part in parts if part)


def where_we_lose(folder: Path = RESULTS) -> str:
    """Return the measured cases in which something else takes less time than our default."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, (ours, rivals, words) in RIVALS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        for row in read_result(path)["rows"]:
            mine = row.get(ours)
            for rival in rivals:
                theirs = row.get(rival)
                if isinstance(mine, float) and isinstance(theirs, float) and theirs < mine:
                    found.setdefault((words(row), rival.removesuffix(", ms")), []).append(
                        mine / theirs
                    )
    if not found:
        return "In none of the recorded cases."
    rows = [
        (case, rival, " to ".join(dict.fromkeys(f"{r:.3g}" for r in (min(many), max(many)))))
        for (case, rival), many in found.items()
    ]
    return table(("Case", "What takes less", "Times less"), rows)
