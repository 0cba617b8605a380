"""Measure attention of few regions over many patches, and HGA, against the usual way.

    python benchmarks/region_attention.py        # ten minutes on one idle core
    python benchmarks/region_attention.py --quick

prints tables and (unless `--quick`) writes `benchmarks/results/region_attention*.json`. The peers
have the same weights: `nn.MultiheadAttention` without its attention map, and projected keys and
values around torch's fused kernel; for HGA each of them with a concatenation and one matrix. What
is compared is CPU time on one thread, the smallest of several runs taken in turns within one
process. Memory is the peak resident size of a fresh process for each case beyond its inputs,
outputs and gradients included. "frozen" means that the tokens get no gradient, but all weights do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from _measure import peak_alone, rise_of, smallest_times
from _region_peers import MHA, NAMES, NUM_HEADS, OURS, SDPA, build, inputs, once
from _report import ONE_PROCESS, Row, start, write

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
SIZE = {"b": 16, "m": 10, "p": 256, "d": 768}
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
    size = {**SIZE, "b": 2}
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


def measure_agreement() -> list[Row]:
    """Measure how far the fast way is from the usual one in float64."""
    rows = []
    for what in ("attention", "hga"):
        output, gradient = largest_differences(what)
        rows.append({"what": what, "output": output, "largest of the gradients": gradient})
    return rows


def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__, memory_here)
    repeats = 5 if quick else 7
    peers = "All have the same weights. Sizes are (frames, regions, patches, width)."
    sizes = [SIZE] if quick else [
        {"b": b, "m": m, "p": p, "d": d}
        for d in WIDTHS for p, b in FRAMES.items() for m in REGIONS
    ]  # fmt: skip
    hga_sizes = [SIZE] if quick else [
        SIZE, {**SIZE, "m": 12}, {**SIZE, "d": 1024}, {**SIZE, "b": 64}
    ]  # fmt: skip
    times = measure_times("attention", sizes, repeats, () if quick else ("folded", "sdpa"))
    write(
        folder,
        "region_attention_times",
        "Attention of few regions, and HGA: milliseconds",
        f"{ONE_PROCESS} {peers} `mmau` runs what `auto` chooses.",
        where,
        times + measure_times("hga", hga_sizes, repeats),
    )
    memory_sizes = [{**SIZE, "b": MEMORY_FRAMES}, {"b": 8, "m": 10, "p": 1369, "d": 1024}]
    write(
        folder,
        "region_attention_memory",
        "Attention of few regions, and HGA: peak memory in megabytes",
        f"{peers} The peak of one fresh process beyond the inputs.",
        where,
        measure_memory(("attention", "hga"), memory_sizes[: 1 if quick else 2]),
    )
    write(
        folder,
        "region_attention_agreement",
        "Attention of few regions, and HGA: largest relative difference in float64",
        "Against `nn.MultiheadAttention` with the same weights.",
        where,
        measure_agreement(),
    )


if __name__ == "__main__":
    main()
