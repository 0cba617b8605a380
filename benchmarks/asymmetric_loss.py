"""Measure the asymmetric loss, forward and backward, against its peers.

    pip install timm                            # one peer; not needed by mmau
    python benchmarks/asymmetric_loss.py        # a minute on one idle core
    python benchmarks/asymmetric_loss.py --quick

prints a table and (unless `--quick`) writes `benchmarks/results/asymmetric_loss_cases.json`. What
is compared is CPU time on one thread, the smallest of several runs taken in turns within one
process: ratios hold even on a machine that does other things too. Memory is the peak resident size
of a fresh process for each case beyond its inputs, the gradient included; a compiled loss is
compiled before the mark is set. The target is float32, because most peers take nothing else; int8,
and a target with gaps, are rows of their own for ours. Ours also checks the labels and masks the
gaps, which no peer does.
"""

from __future__ import annotations

import functools

import torch
from _asymmetric_peers import (
    BCE_COMPILED,
    COMPILED,
    LOADERS,
    OURS,
    LossFunction,
    available,
)
from _measure import peak_alone, rise_of, smallest_times
from _report import ONE_PROCESS, Row, start, write
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


def memory_here(case: Row) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    name, size, target = case["name"], tuple(case["size"]), case["target"]
    loss = LOADERS[name]()
    batch = make_batch(size, target)
    if name in (COMPILED, BCE_COMPILED):
        once(loss, *batch)
        batch[0].grad = None
    else:
        once(loss, *make_batch((4, size[1]), target))
    return rise_of(lambda: once(loss, *batch))


def measure(repeats: int) -> list[Row]:
    """Measure time and memory of everything at every size."""
    names, rows = list(available()[0]), []
    for size in SIZES.values():
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


def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__, memory_here)
    _, left_out = available()
    print("\n".join(left_out))
    note = (
        f"Forward and backward. {ONE_PROCESS} Memory is the peak of one fresh process beyond its "
        f"inputs, the gradient included. {' '.join(left_out)}"
    )
    rows = measure(5 if quick else 25)
    write(folder, "asymmetric_loss_cases", "Asymmetric loss: time and memory", note, where, rows)


if __name__ == "__main__":
    main()
