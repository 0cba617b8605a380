"""Measure attention of few regions over many patches, and HGA, against the usual way.

    python benchmarks/region_attention.py        # ten minutes on one idle core
    python benchmarks/region_attention.py --quick

prints tables, says which demands are met and where we lose, and (unless `--quick`) writes
`benchmarks/results/region_attention*.json`. The peers have the same weights:
`nn.MultiheadAttention` without its attention map, and projected keys and values around torch's
fused kernel; for HGA each of them with a concatenation and one matrix. What is compared is CPU time
on one thread, the smallest of several runs taken in turns within one process. Memory is the peak
resident size of a fresh process for each case beyond its inputs, outputs and gradients included.
"frozen" means that the tokens get no gradient, but all weights do.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from _measure import peak_alone, rise_of, smallest_times, stamp
from _region_peers import MHA, NAMES, NUM_HEADS, OURS, SDPA, build, inputs, once
from _report import RESULTS, Row, show, write

from mmau.functional.region_attention import choose_region_attention

KINDS = {
    "forward": {"backward": False, "frozen": True},
    "forward+backward": {"backward": True, "frozen": False},
    "forward+backward, frozen": {"backward": True, "frozen": True},
}
REGIONS = (8, 10, 12, 24, 68)
WIDTHS = (768, 1024)
FRAMES = {256: 16, 1369: 4}
"""Patches of 224 and of 518 pixels at 14 pixels a patch, and frames at a time."""
DEMANDED = {"b": 16, "m": 10, "p": 256, "d": 768}
MEMORY_FRAMES = 64


def measure_times(
    what: str, sizes: Iterable[dict[str, int]], repeats: int, implementations: Iterable[str] = ()
) -> list[Row]:
    """Measure everyone at every size, in milliseconds; `implementations` are ours, by name."""
    rows = []
    for size in sizes:
        m, p, d = (size[letter] for letter in "mpd")
        modules = {name: build(what, name, d) for name in NAMES}
        modules |= {name: build(what, OURS, d, name) for name in implementations}
        for kind, options in KINDS.items():
            given = inputs(what, size, frozen=options["frozen"])
            runs = {
                name: functools.partial(once, module, given, backward=options["backward"])
                for name, module in modules.items()
            }
            times = {k: 1e3 * v for k, v in smallest_times(runs, repeats=repeats).items()}
            row: Row = {"what": what, "size": size, "kind": kind, **times}
            row["times faster"] = min(times[MHA], times[SDPA]) / times[OURS]
            row["auto"] = choose_region_attention(m, p, d, d, NUM_HEADS)
            rows.append(row)
    return rows


def memory_here(case: Row) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    what, size, options = case["what"], case["size"], KINDS[case["kind"]]
    module = build(what, case["name"], size["d"])
    small = inputs(what, {**size, "b": 1}, frozen=options["frozen"])
    once(module, small, backward=options["backward"])
    given = inputs(what, size, frozen=options["frozen"])
    return rise_of(lambda: once(module, given, backward=options["backward"]))


def measure_memory(whats: Iterable[str], sizes: Iterable[dict[str, int]]) -> list[Row]:
    """Measure the peak of everyone at every size, in megabytes."""
    rows = []
    for what in whats:
        for size in sizes:
            for kind in KINDS:
                case = {"what": what, "size": size, "kind": kind}
                peaks = {name: peak_alone(__file__, {**case, "name": name}) for name in NAMES}
                part = peaks[OURS] / min(peaks[MHA], peaks[SDPA])
                rows.append({**case, **peaks, "part of the smaller": part})
    return rows


def largest_differences(what: str) -> tuple[float, float]:
    """Return how far outputs and gradients are from `nn.MultiheadAttention` in float64.

    Relative to the largest value of each tensor; gradients are those of inputs and of all weights.
    """
    size = {**DEMANDED, "b": 2}
    results = []
    for name in (MHA, OURS):
        module = build(what, name, size["d"]).double()
        given = inputs(what, size, frozen=False, dtype=torch.float64)
        out = module(*given)
        direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * direction).sum().backward()
        gradients = {key: p.grad for key, p in module.named_parameters()}
        found = [x.grad for x in given if x.grad is not None]
        results.append((out, found, gradients))
    (out, inner, theirs), (our_out, our_inner, ours) = results
    ours = {key.removeprefix("hga."): value for key, value in ours.items()}
    attention = "attend.attention." if what == "hga" else "attention."
    query, key, value = theirs[f"{attention}in_proj_weight"].chunk(3)
    query_bias, _, value_bias = theirs[f"{attention}in_proj_bias"].chunk(3)
    pairs = [
        *zip(our_inner, inner, strict=True),
        (ours["to_query.weight"], query),
        (ours["to_query.bias"], query_bias),
        (ours["to_key.weight"], key),
        (ours["to_value.weight"], value),
        (ours["to_value.bias"], value_bias),
        (ours["to_output.weight"], theirs[f"{attention}out_proj.weight"]),
        (ours["to_output.bias"], theirs[f"{attention}out_proj.bias"]),
    ]
    if what == "hga":
        layers = ("hidden_attended", "hidden_local", "hidden_overall")
        split = torch.cat([ours[f"{layer}.weight"] for layer in layers], dim=1)
        pairs += [
            (split, theirs["first.weight"]),
            (ours["hidden_attended.bias"], theirs["first.bias"]),
            (ours["to_token.weight"], theirs["second.weight"]),
            (ours["to_token.bias"], theirs["second.bias"]),
        ]

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).abs().max() / other.abs().max()).item()

    return apart(our_out, out), max(apart(*pair) for pair in pairs)


def demands(times: list[Row], memory: list[Row]) -> list[Row]:
    """Hold what was measured against what was asked for."""
    rows: list[Row] = []

    def add(what: str, demand: str, value: float) -> None:
        bound = float(demand.split()[1])
        met = value >= bound if demand.startswith(">=") else value <= bound
        rows.append(
            {"what": what, "demand": demand, "measured": value, "met": "yes" if met else "MISSED"}
        )

    for what, kind, demand in (
        ("attention", "forward", ">= 4"),
        ("attention", "forward+backward", ">= 3.8"),
        ("hga", "forward", ">= 3.5"),
        ("hga", "forward+backward", ">= 3.5"),
        ("hga", "forward+backward, frozen", ">= 3.5"),
    ):
        row = next(r for r in times if (r["what"], r["kind"], r["size"]) == (what, kind, DEMANDED))
        for peer in (MHA, SDPA):
            ratio = row[peer] / row[OURS]
            add(f"{what}, {kind}: times faster than {peer}", demand, ratio)
    for row in memory:
        demand = {"forward+backward": "<= 0.55", "forward+backward, frozen": "<= 0.3"}
        if row["kind"] in demand and row["size"] == {**DEMANDED, "b": MEMORY_FRAMES}:
            for peer in (MHA, SDPA):
                what = f"{row['what']}, {row['kind']}: peak memory as a part of {peer}"
                add(what, demand[row["kind"]], row[OURS] / row[peer])
    for what in ("attention", "hga"):
        output, gradient = largest_differences(what)
        add(f"{what}: float64 difference of the output", "<= 1e-12", output)
        add(f"{what}: largest float64 difference of a gradient", "<= 1e-12", gradient)
    return rows


def losses(times: list[Row]) -> list[str]:
    """Say where the usual way is faster than ours."""
    return [
        f"{row['what']} {tuple(row['size'].values())} {row['kind']}: {row['times faster']:.2f}x"
        for row in times
        if row["times faster"] < 1
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute, one size, no files")
    parser.add_argument("--repeats", type=int, help="turns of which the smallest counts")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_case:
        print(memory_here(json.loads(arguments.memory_case)))
        return

    quick = arguments.quick
    repeats = arguments.repeats or (5 if quick else 7)
    where = stamp()
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()))
    sizes = [DEMANDED] if quick else [
        {"b": b, "m": m, "p": p, "d": d}
        for d in WIDTHS for p, b in FRAMES.items() for m in REGIONS
    ]  # fmt: skip
    times = measure_times("attention", sizes, repeats, () if quick else ("folded", "sdpa"))
    show("Attention, ms; sizes are (frames, regions, patches, width)", times)
    hga_sizes = [DEMANDED] if quick else [
        DEMANDED, {**DEMANDED, "m": 12}, {**DEMANDED, "d": 1024}, {**DEMANDED, "b": 64}
    ]  # fmt: skip
    whole = measure_times("hga", hga_sizes, repeats)
    show("Whole HGA, ms", whole)
    memory_size = {**DEMANDED, "b": MEMORY_FRAMES}
    memory = measure_memory(
        ("attention", "hga"),
        [memory_size] if quick else [memory_size, {"b": 8, "m": 10, "p": 1369, "d": 1024}],
    )
    show("Peak memory, MB", memory)
    asked_for = demands(times + whole, memory)
    show("Demands", asked_for)
    lost = losses(times + whole)
    print("\nWhere we lose\n  " + ("\n  ".join(lost) if lost else "nowhere"))

    folder = arguments.output or (None if quick else RESULTS)
    if folder is None:
        return
    how = "CPU time of one thread, the smallest of several runs taken in turns in one process. "
    peers = "All have the same weights. Sizes are (frames, regions, patches, width). "
    write(
        folder / "region_attention.json",
        "Attention of few regions, and HGA: demands",
        f"{how}{peers}At 16 frames; memory at {MEMORY_FRAMES}.",
        where,
        asked_for,
    )
    write(
        folder / "region_attention_times.json",
        "Attention of few regions, and HGA: milliseconds",
        f"{how}{peers}`mmau` runs what `auto` chooses.",
        where,
        times + whole,
    )
    write(
        folder / "region_attention_memory.json",
        "Attention of few regions, and HGA: peak memory in megabytes",
        f"{peers}The peak of one fresh process beyond the inputs.",
        where,
        memory,
    )


if __name__ == "__main__":
    main()
