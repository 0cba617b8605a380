"""What a training step of a preset needs and costs, before a GPU is rented: no weights, no data.

    python recipes/affwild2_au.py plan paper --gpu-memory 80

The real modules run on the meta device, which computes shapes only: nothing is downloaded, and no
memory is needed. Counted are the tensors that autograd keeps; the workspace of kernels is not,
which is why a tenth of the memory stays free in the recommendation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from affwild2_presets import PRESETS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmau._checks import check_range, did_you_mean
from mmau.encoders.backbone import count_parameters
from mmau.models import AUDetector, DetectorConfig, build_detector

GIBI = 2**30
SHARE_THAT_CAN_BE_FILLED = 0.9
"""An allocator cannot fill a device to the last byte, and libraries take their own part."""
LARGEST_CHUNK = 1024
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ------------------------------------------------------------------ counting
@dataclass(frozen=True)
class Cost:
    """What one forward and backward keeps and computes."""

    activations: int
    """Bytes that the backward pass needs of the forward pass; parameters are not counted."""
    forward_flops: int
    """Floating-point operations of the matrix products, two for each multiplication and sum."""
    backward_flops: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.activations - other.activations,
            self.forward_flops - other.forward_flops,
            self.backward_flops - other.backward_flops,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(
            round(self.activations * times),
            round(self.forward_flops * times),
            round(self.backward_flops * times),
        )


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch knows the operations of the kernels for GPUs only.
FLOPS = {
    FUSED: lambda query, key, value, *rest, **options: sdpa_flop_count(query, key, value),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *rest, **options: sdpa_backward_flop_count(
            gradient, query, key, value
        )
    ),
}


class FusedAttention(TorchFunctionMode):
    """Let attention on the meta device keep what a fused kernel keeps, as on the devices meant.

    Left alone, the meta device takes the path that keeps every attention weight.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace one function and call all others as they are."""
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for `scaled_dot_product_attention`."""
    del dropout_p, enable_gqa  # neither changes what is kept
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return FUSED(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def measure_cost(run: Callable[[], Tensor], module: nn.Module) -> Cost:
    """Run something once, forwards and backwards, and count; on the meta device nothing is stored.

    `run` returns the tensor to start the backward pass from; parameters and buffers of `module` do
    not count as activations.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    # References, so that no storage is freed and its address given to another one.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False, custom_mapping=FLOPS) as forward,
        FusedAttention(),
    ):
        output = run()
    activations = sum(kept.values())
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as backward:
        if output.requires_grad:
            torch.autograd.backward(output.sum())
    module.zero_grad(set_to_none=True)
    return Cost(activations, forward.get_total_flops(), backward.get_total_flops())


# ------------------------------------------------------------------ a step
@dataclass(frozen=True)
class StepPlan:
    """A training step in numbers; `str()` is a table for people."""

    clips: int
    frames: int
    parameters: int
    trainable: int
    frame: Cost
    """Encoder and HGA, of each frame."""
    audio: Cost
    """Audio encoder, of the whole batch."""
    temporal: Cost
    """From region tokens to logits, of the whole batch."""
    fixed_bytes: int
    """Weights, gradients, moments of the optimiser, images and region tokens."""
    gpu_memory: float
    """GiB."""
    frames_per_chunk: int | None = None
    """Recommendation; `None` for all at once."""
    checkpoint_frames: bool = False
    """Recommendation: whether a chunk is computed again in the backward pass."""
    fits: bool = True

    @property
    def activation_bytes(self) -> int:
        """Activations at the recommended setting, at their peak."""
        at_once = self.frames_per_chunk or self.clips * self.frames
        frames = at_once if self.checkpoint_frames else self.clips * self.frames
        return frames * self.frame.activations + self.audio.activations + self.temporal.activations

    @property
    def peak_bytes(self) -> int:
        """Memory of a step."""
        return self.fixed_bytes + self.activation_bytes

    @property
    def flops(self) -> int:
        """Operations of a step; what is computed again counts again."""
        frames = self.frame * (self.clips * self.frames)
        parts = [frames, self.audio, self.temporal]
        total = sum(part.forward_flops + part.backward_flops for part in parts)
        return total + (frames.forward_flops if self.checkpoint_frames else 0)

    def seconds_per_step(self, *, peak_tflops: float, utilisation: float) -> float:
        """Estimate the duration of a step on a device that reaches a share of its peak."""
        return self.flops / (peak_tflops * 1e12 * utilisation)

    def __str__(self) -> str:
        def gib(size: int) -> str:
            return f"{size / GIBI:.2f} GiB"

        chunk = f"{self.frames_per_chunk} frames at a time"
        if self.frames_per_chunk is None:
            chunk = "all frames at once"
        again = ", computed again in the backward pass" if self.checkpoint_frames else ""
        rows = [
            ("batch", f"{self.clips} clips of {self.frames} frames"),
            ("parameters", f"{self.parameters / 1e6:.1f} M, {self.trainable / 1e6:.2f} M learn"),
            ("weights, optimiser, images", gib(self.fixed_bytes)),
            ("activations of one frame", f"{self.frame.activations / 2**20:.1f} MiB"),
            ("activations of all frames", gib(self.clips * self.frames * self.frame.activations)),
            ("activations of the audio", gib(self.audio.activations)),
            ("activations over time", gib(self.temporal.activations)),
            ("recommended", f"{chunk}{again}"),
            ("then a step takes", f"{gib(self.peak_bytes)} of {self.gpu_memory:g} GiB"),
            ("operations of a step", f"{self.flops / 1e12:.4g} TFLOP"),
        ]
        if not self.fits:
            rows.append(("but", "it does not fit: take fewer clips per step, and accumulate"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan_step(
    config: DetectorConfig,
    *,
    clips: int = 16,
    frames: int = 256,
    fps: float = 30.0,
    gpu_memory: float = 80.0,
    dtype: torch.dtype = torch.bfloat16,
) -> StepPlan:
    """Count what one training step costs on a device of `gpu_memory` GiB, and recommend a setting.

    `dtype` is that of activations and frozen weights; what learns is kept in float32.
    """
    check_range("clips", clips, 1)
    check_range("frames", frames, 1)
    check_range("fps", fps, 1.0)
    check_range("gpu_memory", gpu_memory, 0, open_low=True)
    with torch.device("meta"):
        detector = build_detector(without_weights(config))
    detector.to("meta", dtype).train()  # tables are built with values
    trainable, parameters = count_parameters(detector)
    size = torch.finfo(dtype).bits // 8
    learned = trainable * (4 + 4 + 8)  # weights, gradients and AdamW's two moments, in float32
    images = clips * frames * 3 * config.crop_size**2 * size
    tokens = clips * frames * detector.num_regions * detector.d_region * size
    return recommended(
        StepPlan(
            clips,
            frames,
            parameters,
            trainable,
            frame=cost_of_a_frame(detector, config.crop_size, dtype),
            audio=cost_of_audio(detector, frames / fps, dtype) * clips,
            temporal=cost_over_time(detector, clips, frames, dtype),
            fixed_bytes=learned + (parameters - trainable) * size + images + 2 * tokens,
            gpu_memory=gpu_memory,
        )
    )


def recommended(plan: StepPlan) -> StepPlan:
    """Take the first setting that fits, from the fastest to the smallest."""
    available = plan.gpu_memory * GIBI * SHARE_THAT_CAN_BE_FILLED
    if plan.peak_bytes <= available:
        return plan
    chunk = min(LARGEST_CHUNK, plan.clips * plan.frames)
    while chunk >= 1:
        smaller = replace(plan, frames_per_chunk=chunk, checkpoint_frames=True)
        if smaller.peak_bytes <= available:
            return smaller
        chunk //= 2
    return replace(plan, frames_per_chunk=1, checkpoint_frames=True, fits=False)


def without_weights(config: DetectorConfig) -> DetectorConfig:
    """Ask for the sizes of published encoders, and not for their weights."""

    def unloaded(component: Any) -> Any:
        if component is None or "name" not in component.options:
            return component
        return replace(component, options={**component.options, "pretrained": False})

    return replace(config, visual=unloaded(config.visual), audio=unloaded(config.audio))


def cost_of_a_frame(detector: AUDetector, crop_size: int, dtype: torch.dtype) -> Cost:
    """Cost of one more frame: what does not grow with their number cancels."""

    def run(count: int) -> Tensor:
        images = torch.empty(count, 3, crop_size, crop_size, device="meta", dtype=dtype)
        patch_tokens = detector.visual_encoder(images).patch_tokens
        if detector.hga is None:
            return patch_tokens.mean(1)
        shape = count, detector.num_regions, patch_tokens.shape[1]
        weights = torch.empty(shape, device="meta", dtype=dtype)
        return detector.hga(patch_tokens, weights).tokens

    two, four = (measure_cost(lambda n=n: run(n), detector) for n in (2, 4))
    return (four - two) * 0.5


def cost_of_audio(detector: AUDetector, seconds: float, dtype: torch.dtype) -> Cost:
    """Cost of the audio encoder for one clip."""
    if detector.audio_encoder is None:
        return Cost(0, 0, 0)
    waveform = torch.empty(1, round(16_000 * seconds), device="meta", dtype=dtype)
    return measure_cost(lambda: detector.encode_audio(waveform).features, detector)


def cost_over_time(detector: AUDetector, clips: int, frames: int, dtype: torch.dtype) -> Cost:
    """Cost from region tokens to logits."""

    def run() -> Tensor:
        shape = clips, frames, detector.num_regions, detector.d_region
        tokens = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        valid = torch.empty(clips, frames, device="meta", dtype=torch.bool)
        audio = None
        if detector.d_audio is not None:
            shape = clips, frames, detector.d_audio
            audio = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        return detector.classify(detector.merge_regions(tokens, valid), audio)[0]

    return measure_cost(run, detector)


# ------------------------------------------------------------------ the command
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
        dtype=DTYPES[options.precision],
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
