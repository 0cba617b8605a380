"""What a training step of a preset needs and costs, before a GPU is rented: no weights, no data.

python recipes/affwild2_au.py plan paper --gpu-memory 80
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from affwild2_presets import PRESETS

from mmau._checks import did_you_mean
from mmau.training import plan_step

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machine, and how much data there is."""

    gpu_memory: float = 80.0
    """Memory of one device in GiB."""
    peak_tflops: float = 989.0
    """What the device does at most, in 10^12 operations a second: 312 for an A100, 989 for an H100,
    dense, in bfloat16, as their maker states."""
    utilisation: float = 0.3
    """Share of it that training reaches. A guess until it is measured on that device."""
    devices: int = 1
    """Devices that share a step."""
    train_frames: int = 1_359_519
    """Frames of an epoch; those of Aff-Wild2's training split that have labels."""
    fps: float = 30.0
    """Frames per second, which decides how much sound belongs to a clip."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Arithmetic of the activations and of what is frozen."""


def main(words: list[str]) -> None:
    """Read the command line, count, print."""
    import tyro

    if not words or words[0].startswith("-") or words[0] not in PRESETS:
        given = words[0] if words and not words[0].startswith("-") else ""
        said = f"no preset named {given!r}{did_you_mean(given, PRESETS)} " if given else ""
        raise SystemExit(f"{said}give a preset after `plan`: {', '.join(PRESETS)}.")
    config = PRESETS[words[0]][1]
    options = tyro.cli(PlanOptions, args=words[1:], description=__doc__)
    plan = plan_step(
        config.model,
        clips=max(1, config.optim.batch_clips // (options.devices * config.optim.accumulate)),
        frames=config.data.clip_frames,
        fps=options.fps,
        gpu_memory=options.gpu_memory,
        dtype=_DTYPES[options.precision],
    )
    print(f"preset {words[0]}, one of {options.devices} device(s), {options.precision}\n\n{plan}\n")
    seconds = config.optim.accumulate * plan.seconds_per_step(
        peak_tflops=options.peak_tflops, utilisation=options.utilisation
    )
    steps = -(-options.train_frames // (config.optim.batch_clips * config.data.clip_frames))
    print(
        f"at {options.utilisation:.0%} of {options.peak_tflops:g} TFLOP/s (assumed, not measured): "
        f"{seconds:.1f} s a step, {steps * seconds / 3600:.2f} h for an epoch of {steps} steps"
    )
    if plan.checkpoint_frames:
        print(
            f"set: --model.frames-per-chunk {plan.frames_per_chunk} --model.checkpoint-frames True"
        )
