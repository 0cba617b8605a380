"""Measure the asymmetric loss, forward and backward, against its peers.

    pip install timm                            # one peer; not needed by mmau
    python benchmarks/asymmetric_loss.py        # a minute on one idle core
    python benchmarks/asymmetric_loss.py --quick

prints a table, says which demands are met, and (unless `--quick`) writes
`benchmarks/results/asymmetric_loss*.json`. What is compared is CPU time on one thread, the smallest
of several runs taken in turns within one process: ratios hold even on a machine that does other
things too. Memory is the peak resident size of a fresh process for each case beyond its inputs, the
gradient included; a compiled loss is compiled before the mark is set. The target is float32,
because most peers take nothing else; int8, and a target with gaps, are rows of their own for ours.
Ours also checks the labels and masks the gaps, which no peer does.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from _asymmetric_peers import (
    BCE,
    BCE_COMPILED,
    COMPILED,
    LOADERS,
    OPTIMIZED,
    OURS,
    LossFunction,
    available,
)
from _measure import peak_alone, rise_of, smallest_times, stamp
from _report import RESULTS, Row, show, write
from torch import Tensor

SIZES = {"small": (4096, 12), "large": (65536, 80)}
TARGETS = {"float32": torch.float32, "int8": torch.int8, "float32, 10 % missing": torch.float32}


def make_batch(size: tuple[int, int], target: str = "float32") -> tuple[Tensor, Tensor]:
    """Draw logits and labels as of a model in training, one label in seven positive."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=generator) * 3 - 2
    labels = (torch.rand(size, generator=generator) < 1 / 7).to(TARGETS[target])
    if "missing" in target:
        labels[torch.rand(size, generator=generator) < 0.1] = -1
    return logits.requires_grad_(), labels


def once(loss: LossFunction, logits: Tensor, target: Tensor) -> None:
    """Run forward and backward, as a training step does."""
    logits.grad = None
    loss(logits, target).backward()


def measure_times(size: tuple[int, int], target: str, repeats: int) -> dict[str, float]:
    """Return milliseconds of each loss that takes such a target."""
    losses, _ = available()
    if target != "float32":
        losses = {name: losses[name] for name in (OURS, COMPILED)}
    batch = make_batch(size, target)
    runs = {name: functools.partial(once, loss, *batch) for name, loss in losses.items()}
    for run in runs.values():  # compiles, and warms up
        run()
    return {name: 1e3 * taken for name, taken in smallest_times(runs, repeats=repeats).items()}


def measure_memory_here(name: str, size: tuple[int, int], target: str) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    loss = LOADERS[name]()
    batch = make_batch(size, target)
    if name in (COMPILED, BCE_COMPILED):
        once(loss, *batch)
        batch[0].grad = None
    else:
        once(loss, *make_batch((4, size[1]), target))
    return rise_of(lambda: once(loss, *batch))


def measure(sizes: dict[str, tuple[int, int]], repeats: int) -> list[Row]:
    """Measure time and memory of everything at every size."""
    names, rows = list(available()[0]), []
    for size in sizes.values():
        for target in TARGETS:
            times = measure_times(size, target, repeats)
            shown = {name: times.get(name, "not run") for name in names}
            rows.append({"size": size, "target": target, "what": "milliseconds", **shown})
        megabytes = {
            name: peak_alone(__file__, {"name": name, "size": size, "target": "float32"})
            for name in names
        }
        rows.append({"size": size, "target": "float32", "what": "peak, MB", **megabytes})
    return rows


def demands(rows: list[Row]) -> list[Row]:
    """Hold what was measured against what was asked for."""

    def ratio(size: str, what: str, own: str, peer: str) -> float:
        row = next(
            r for r in rows if (r["size"], r["target"], r["what"]) == (SIZES[size], "float32", what)
        )
        return float(row[own]) / float(row[peer])

    asked = [
        ("small", "milliseconds", OURS, OPTIMIZED, 0.45),
        ("large", "milliseconds", OURS, OPTIMIZED, 0.45),
        ("large", "peak, MB", OURS, OPTIMIZED, 0.15),
        ("large", "milliseconds", COMPILED, OPTIMIZED, 0.15),
        ("large", "milliseconds", COMPILED, BCE, 1.5),
    ]
    found = []
    for size, what, own, peer, limit in asked:
        measured = ratio(size, what, own, peer)
        found.append(
            {
                "what": f"{own}, {what} at {SIZES[size]}, as a part of {peer}",
                "demand": f"<= {limit}",
                "measured": measured,
                "met": "yes" if measured <= limit else "MISSED",
            }
        )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, no file")
    parser.add_argument("--repeats", type=int, help="turns of which the smallest counts")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_case:
        asked = json.loads(arguments.memory_case)
        print(measure_memory_here(asked["name"], tuple(asked["size"]), asked["target"]))
        return

    _, left_out = available()
    where = stamp()
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()))
    print("\n".join(left_out))
    rows = measure(SIZES, arguments.repeats or (5 if arguments.quick else 25))
    show("Forward and backward", rows)
    asked_for = demands(rows)
    show("Demands", asked_for)
    folder = arguments.output or (None if arguments.quick else RESULTS)
    if folder is None:
        return
    note = (
        "Forward and backward on one CPU thread, the smallest of several runs taken in turns in "
        "one process. Memory is the peak of one fresh process beyond its inputs, the gradient "
        f"included. {' '.join(left_out)}"
    )
    write(folder / "asymmetric_loss.json", "Asymmetric loss: demands", note, where, asked_for)
    cases = folder / "asymmetric_loss_cases.json"
    write(cases, "Asymmetric loss: time and memory", note, where, rows)


if __name__ == "__main__":
    main()
