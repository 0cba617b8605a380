"""Measure the selective scan against its peers, and one layer of it against other layers.

    pip install mambapy transformers           # the peers; neither is needed by mmau
    python benchmarks/selective_scan.py        # four minutes on one idle core
    python benchmarks/selective_scan.py --quick

prints tables and (unless `--quick`) writes `benchmarks/results/selective_scan*.json` and a figure
of cost against length. What is compared is CPU time on one thread, the smallest of several runs
taken in turns within one process: ratios hold even on a machine that does other things too, times
are those of this machine. Memory is the peak resident size of a fresh process for each case, beyond
its inputs, outputs and gradients included. Ours computes exact zero-order hold, which costs more
than the Euler step of all peers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from _accuracy import differences, errors
from _layers import build_layers
from _layers import once as layer_once
from _measure import (
    make_inputs,
    measure_memory_here,
    once,
    peak_alone,
    smallest_times,
)
from _peers import LOADERS, LOOPS, OURS, Scan, available
from _report import ONE_PROCESS, Row, start, write

from mmau._files import atomic_write

CASES = {
    "long clips": {"b": 2, "d": 256, "n": 16, "t": 4096},
    "a very long clip": {"b": 1, "d": 256, "n": 16, "t": 16384},
    "the paper's batch": {"b": 16, "d": 64, "n": 16, "t": 256},
    "the smallest": {"b": 1, "d": 64, "n": 16, "t": 256},
}
QUICK_CASES = ("the paper's batch", "the smallest")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LONGEST_LOOP = 1024
"""Frames up to which the peers with a quadratic backward are measured; beyond they take minutes."""
KINDS = (("forward", False), ("forward+backward", True))


def memory_here(case: Row) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    return measure_memory_here(LOADERS[case["name"]](), case["size"], case["backward"])


def scan_times(
    scans: dict[str, Scan], size: dict[str, int], repeats: int, backward: bool, longest_loop: int
) -> Row:
    """Return the CPU time of each scan in milliseconds."""
    inputs = make_inputs(**size)
    runs = {
        name: functools.partial(once, run, inputs, backward=backward)
        for name, run in scans.items()
        if name not in LOOPS or size["t"] <= longest_loop
    }
    times = smallest_times(runs, repeats=repeats)
    return {name: 1e3 * times[name] if name in times else "not run" for name in scans}


def measure_cases(
    scans: dict[str, Scan], names: Iterable[str], repeats: int, *, quick: bool
) -> list[Row]:
    """Measure time and memory of every scan ."""
    rows = []
    for case in names:
        size = CASES[case]
        for what, backward in KINDS:
            times = scan_times(scans, size, repeats, backward, LONGEST_LOOP)
            rows.append({"case": case, "size": size, "what": f"{what}, ms", **times})
        megabytes = {
            name: peak_alone(__file__, {"name": name, "size": size, "backward": True})
            if name not in LOOPS or (size["t"] <= LONGEST_LOOP and not quick)
            else "not run"
            for name in scans
        }
        rows.append({"case": case, "size": size, "what": "peak memory, MB", **megabytes})
    return rows


def measure_lengths(
    scans: dict[str, Scan], lengths: Iterable[int], repeats: int, longest_loop: int
) -> list[Row]:
    """Measure the cost against the number of frames, and just above a power of two."""
    rows = []
    for what, backward in KINDS:
        for t in (*lengths, 1025):
            size = {"b": 1, "d": 64, "n": 16, "t": t}
            times = scan_times(scans, size, repeats, backward, longest_loop)
            rows.append({"what": what, "frames": t, **times})
    return rows


def measure_layers(lengths: Iterable[int], repeats: int) -> list[Row]:
    """Measure one layer of each kind, one clip, in milliseconds."""
    rows = []
    for d in (64, 256):
        layers = build_layers(d)
        for t in lengths:
            x = torch.randn(1, t, d, requires_grad=True)
            for what, backward in KINDS:
                runs = {
                    name: functools.partial(layer_once, layer, x, backward=backward)
                    for name, layer in layers.items()
                }
                times = smallest_times(runs, repeats=repeats, budget=3.0)
                row = {"width": d, "frames": t, "what": what}
                rows.append(row | {name: 1e3 * time for name, time in times.items()})
    return rows


def draw(lengths: list[Row], path: Path) -> None:
    """Draw cost against length; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("the figure is left out, because matplotlib is not installed.")
        return
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, (what, _) in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        rows = sorted((r for r in lengths if r["what"] == what), key=lambda r: r["frames"])
        for name in list(rows[0])[2:]:
            points = [(r["frames"], r[name]) for r in rows if not isinstance(r[name], str)]
            axes.loglog(*zip(*points, strict=True), ".-", label=name, base=10)
        axes.set(title=what, xlabel="frames")
    figure.axes[0].set_ylabel("CPU time, ms")
    figure.axes[0].legend(fontsize=7)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=90)


def measure_accuracy(names: Iterable[str], longest: int) -> list[Row]:
    """Measure errors against float64, what cutting changes, and memory without gradients."""
    rows: list[Row] = []
    for what, found in errors(names).items():
        rows.append({"what": f"largest fp32 error of the {what}", **found})
    changed = {name: differences(name) for name in names}
    rows.append({"what": "largest change by cutting, streaming, padding", **changed})
    size = {"b": 1, "d": 256, "n": 16, "t": longest}
    beyond = {
        name: peak_alone(__file__, {"name": name, "size": size, "backward": False})
        - size["d"] * longest * 4 / 2**20
        for name in names
    }
    what = f"MB of a forward without gradients beyond its output, {longest} frames"
    return [*rows, {"what": what, **beyond}]


def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__, memory_here)
    repeats = 3 if quick else 7
    scans, left_out = available()
    print("\n".join(left_out))
    peers = "Ours is exact zero-order hold, all others are Euler."
    note = (
        f"{ONE_PROCESS} {peers} Loops with a quadratic backward are not run on long clips. "
        f"{' '.join(left_out)}"
    )
    write(
        folder,
        "selective_scan_cases",
        "Selective scan: time and memory",
        f"{note} Memory is the peak of one fresh process beyond the inputs, and differs from one "
        "to the next. Sizes are (b, d, n, t).",
        where,
        measure_cases(scans, QUICK_CASES if quick else CASES, repeats, quick=quick),
    )
    loops = 0 if quick else LONGEST_LOOP
    lengths = measure_lengths(scans, (1024, 4096) if quick else LENGTHS, repeats, loops)
    title = "Selective scan: milliseconds against length at (1, 64, 16, t)"
    write(folder, "selective_scan_lengths", title, note, where, lengths)
    write(
        folder,
        "selective_scan_layers",
        "One layer, one clip, in milliseconds",
        f"{ONE_PROCESS} The TCN block sees 5 frames, the others any number.",
        where,
        measure_layers((256,) if quick else (256, 1024, 4096), repeats),
    )
    write(
        folder,
        "selective_scan_accuracy",
        "Selective scan: accuracy in float32, and memory without gradients",
        "Errors are relative to the largest entry of a float64 reference, for steps of 1e-6 to "
        "20; inside means steps of 1e-4 to 1.",
        where,
        measure_accuracy([name for name in OURS if name in scans], 4096 if quick else 65536),
    )
    if folder:
        draw(lengths, folder / "selective_scan.png")


if __name__ == "__main__":
    main()
