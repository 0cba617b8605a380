"""Measure cross-attention in a window of time: block by block against all pairs.

    python benchmarks/cross_attention.py        # two minutes on one idle core
    python benchmarks/cross_attention.py --quick

prints a table and (unless `--quick`) writes `benchmarks/results/cross_attention_cases.json`. Both
ways compute the same from the same inputs: frames at 25 Hz, sound at 50 Hz, a window of one second,
eight heads. "attention" is the function, "module" adds the four projections, which cost the same in
both ways and so lower the ratio the more the wider they are. CPU time on one thread, the smallest
of several runs taken in turns within one process. Memory is the peak resident size of a fresh
process for each case beyond its inputs, outputs and gradients included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from _measure import peak_alone, rise_of, smallest_times
from _report import ONE_PROCESS, Row, start, write
from torch import Tensor

from mmau.functional import windowed_attention
from mmau.modules import AsymmetricCrossAttention

HEADS, WINDOW = 8, 1.0
WAYS = ("dense", "local")
KINDS = (("forward", False), ("forward+backward", True))
CASES = (
    {"b": 1, "t": 3000, "d": 256, "a": 256},
    {"b": 1, "t": 3000, "d": 768, "a": 256},
    {"b": 16, "t": 256, "d": 256, "a": 256},
    {"b": 1, "t": 750, "d": 256, "a": 256},
)


def build(
    what: str, way: str, size: dict[str, int], dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]:
    """Return what to run, its inputs, and the parameters that get a gradient too."""
    generator = torch.Generator().manual_seed(0)
    b, t, d, a = size.values()
    s = 2 * t

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    video = (torch.arange(t, dtype=torch.float64) / 25).expand(b, t)
    audio = (torch.arange(s, dtype=torch.float64) / 50 + 199.5 / 16000).expand(b, s)
    if what == "module":
        torch.manual_seed(0)
        module = AsymmetricCrossAttention(d, a, HEADS, window=WINDOW, implementation=way)
        module = module.to(dtype)

        def run(visual: Tensor, sound: Tensor) -> Tensor:
            return module(visual, sound, video, audio)

        return run, [normal(b, t, d), normal(b, s, a)], list(module.parameters())
    attention = functools.partial(
        windowed_attention,
        query_time=video,
        key_time=audio,
        window=WINDOW,
        slopes=4.0 * 2.0 ** -torch.arange(HEADS, dtype=dtype),
        implementation=way,
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, null: Tensor) -> Tensor:
        return attention(query, key, value, null_key=null, null_value=null)

    return attend, [normal(b, t, d), normal(b, s, d), normal(b, s, d), normal(d)], []


def once(
    run: Callable[..., Tensor], inputs: list[Tensor], parameters: list[Tensor], *, backward: bool
) -> list[Tensor]:
    """Run without gradients, or with the gradients of everything."""
    if backward:
        out = run(*inputs)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad((out * weight).sum(), [*inputs, *parameters])]
    with torch.no_grad():
        return [run(*inputs)]


def memory_here(case: Row) -> int:
    """Return by how many kilobytes one call raised the resident size of this fresh process."""
    small = {**case["size"], "b": 1, "t": 100}
    once(*build(case["what"], case["way"], small), backward=case["backward"])
    given = build(case["what"], case["way"], case["size"])
    return rise_of(lambda: once(*given, backward=case["backward"]))


def measure(cases: tuple[dict[str, int], ...], repeats: int) -> list[Row]:
    """Measure time and memory of both ways."""
    rows = []
    for size in cases:
        for what in ("attention", "module"):
            built = {way: build(what, way, size) for way in WAYS}
            for kind, backward in KINDS:
                times = smallest_times(
                    {
                        way: functools.partial(once, *given, backward=backward)
                        for way, given in built.items()
                    },
                    repeats=repeats,
                    budget=12.0,
                )
                case = {"what": what, "size": size, "backward": backward}
                used = {way: peak_alone(__file__, {**case, "way": way}) for way in WAYS}
                rows.append(
                    {
                        "what": what,
                        "size": size,
                        "kind": kind,
                        **{f"{way}, ms": 1e3 * times[way] for way in WAYS},
                        "times faster": times["dense"] / times["local"],
                        **{f"{way}, MB": used[way] for way in WAYS},
                        "part of the memory": used["local"] / used["dense"],
                    }
                )
    return rows


def largest_difference() -> float:
    """Return the largest difference of outputs and gradients of the two ways, in float64."""
    size = {"b": 2, "t": 600, "d": 64, "a": 32}
    results = [
        once(*build("module", way, size, dtype=torch.float64), backward=True) for way in WAYS
    ]
    return max(
        float(((one - other).abs().max() / one.abs().max()).detach())
        for one, other in zip(*results, strict=True)
    )


def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__, memory_here)
    note = (
        f"{ONE_PROCESS} Memory is the peak of one fresh process beyond the inputs. A module has "
        "projections that cost the same in both ways. Sizes are (b, t, d, a), with twice as many "
        "features of sound as frames. The largest relative difference of outputs and gradients of "
        f"both ways in float64 is {largest_difference():.1e}."
    )
    rows = measure(CASES[:1] if quick else CASES, 3 if quick else 5)
    write(folder, "cross_attention_cases", "Cross-attention: cases", note, where, rows)


if __name__ == "__main__":
    main()
