"""What a training step costs, before a GPU is rented: activations, parameters, operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from mmau._checks import check_range
from mmau.encoders.backbone import count_parameters
from mmau.models import AUDetector, DetectorConfig, build_detector

GIBI = 2**30
_SHARE_THAT_CAN_BE_FILLED = 0.9
"""An allocator cannot fill a device to the last byte, and libraries take their own part."""
_LARGEST_CHUNK = 1024


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


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flops_of_attention(
    query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _flops_of_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


# torch knows the operations of the kernels for GPUs only.
_FLOPS = {_FUSED: _flops_of_attention, _FUSED_BACKWARD: _flops_of_attention_backward}


class _FusedAttention(TorchFunctionMode):
    """Let attention on the meta device keep what a fused kernel keeps, as on the devices meant.

    Left alone, the meta device takes the path that keeps every attention weight.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace one function and call all others as they are."""
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    del dropout_p, enable_gqa  # neither changes what is kept
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    output: Tensor = _FUSED(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def measure_cost(run: Callable[[], Tensor], module: nn.Module) -> Cost:
    """Run something once, forwards and backwards, and count; on the meta device nothing is stored.

    Args:
        run: Returns the tensor to start the backward pass from.
        module: Whose parameters and buffers do not count as activations.

    Returns:
        Bytes and operations.

    Examples:
        A linear layer keeps its input, 4 bytes for each of 6 numbers:

        >>> layer = nn.Linear(3, 2, device="meta")
        >>> measure_cost(lambda: layer(torch.empty(2, 3, device="meta")), layer)
        Cost(activations=24, forward_flops=24, backward_flops=24)
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
        FlopCounterMode(display=False, custom_mapping=_FLOPS) as forward,
        _FusedAttention(),
    ):
        output = run()
    activations = sum(kept.values())
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as backward:
        if output.requires_grad:
            torch.autograd.backward(output.sum())
    module.zero_grad(set_to_none=True)
    return Cost(activations, forward.get_total_flops(), backward.get_total_flops())


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
    """Weights, gradients, moments of the optimiser, pictures and region tokens."""
    gpu_memory: float
    """GiB."""
    frames_per_chunk: int | None
    """Recommendation; `None` for all at once."""
    checkpoint_frames: bool
    """Recommendation: whether a chunk is computed again in the backward pass."""
    fits: bool

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
        parts = [self.frame * (self.clips * self.frames), self.audio, self.temporal]
        total = sum(part.forward_flops + part.backward_flops for part in parts)
        return total + (parts[0].forward_flops if self.checkpoint_frames else 0)

    def seconds_per_step(self, *, peak_tflops: float, utilisation: float) -> float:
        """Estimate the duration of a step.

        Args:
            peak_tflops: What the device can do at most, in 10^12 operations a second.
            utilisation: Share of it that training reaches; 0.3 to 0.5 is usual.

        Returns:
            Seconds.
        """
        return self.flops / (peak_tflops * 1e12 * utilisation)

    def __str__(self) -> str:
        def gib(size: int) -> str:
            return f"{size / GIBI:.2f} GiB"

        everything = self.clips * self.frames * self.frame.activations
        chunk = "all frames at once" if self.frames_per_chunk is None else (
            f"{self.frames_per_chunk} frames at a time"
        )  # fmt: skip
        again = ", computed again in the backward pass" if self.checkpoint_frames else ""
        rows = [
            ("batch", f"{self.clips} clips of {self.frames} frames"),
            ("parameters", f"{self.parameters / 1e6:.1f} M, {self.trainable / 1e6:.2f} M learn"),
            ("weights, optimiser, pictures", gib(self.fixed_bytes)),
            ("activations of one frame", f"{self.frame.activations / 2**20:.1f} MiB"),
            ("activations of all frames", gib(everything)),
            ("activations of the sound", gib(self.audio.activations)),
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
    """Count what one training step of a detector costs, and recommend how to fit it.

    The real modules run on the meta device, which computes shapes only: nothing is downloaded, and
    no memory is needed. Counted are the tensors that autograd keeps; the workspace of kernels is
    not, which is why a tenth of the memory stays free in the recommendation.

    Args:
        config: Architecture; pretrained encoders are built by their published sizes.
        clips: Clips per step on one device.
        frames: Frames per clip.
        fps: Frames per second, which decides how much sound belongs to a clip.
        gpu_memory: Memory of the device in GiB.
        dtype: Of activations and frozen weights; what learns is kept in float32.

    Returns:
        The plan.

    Raises:
        ValueError: If a number is out of range.
    """
    check_range("clips", clips, 1)
    check_range("frames", frames, 1)
    check_range("fps", fps, 1.0)
    check_range("gpu_memory", gpu_memory, 0, open_low=True)
    with torch.device("meta"):
        detector = build_detector(_without_weights(config))
    detector.to("meta", dtype)  # tables are built with values
    trainable, parameters = count_parameters(detector)
    size = torch.finfo(dtype).bits // 8

    frame = _cost_of_a_frame(detector, config.crop_size, dtype)
    audio = _cost_of_sound(detector, frames / fps, dtype) * clips
    temporal = _cost_over_time(detector, clips, frames, dtype)

    learned = trainable * (4 + 4 + 8)  # weights, gradients and AdamW's two moments, in float32
    pictures = clips * frames * 3 * config.crop_size**2 * size
    tokens = clips * frames * detector.num_regions * detector.d_region * size
    fixed = learned + (parameters - trainable) * size + pictures + 2 * tokens
    plan = StepPlan(
        clips, frames, parameters, trainable, frame, audio, temporal, fixed, gpu_memory,
        None, False, True,
    )  # fmt: skip
    return _recommend(plan)


def _recommend(plan: StepPlan) -> StepPlan:
    """Take the first setting that fits, from the fastest to the smallest."""
    room = plan.gpu_memory * GIBI * _SHARE_THAT_CAN_BE_FILLED
    if plan.peak_bytes <= room:
        return plan
    chunk = min(_LARGEST_CHUNK, plan.clips * plan.frames)
    while chunk >= 1:
        smaller = replace(plan, frames_per_chunk=chunk, checkpoint_frames=True)
        if smaller.peak_bytes <= room:
            return smaller
        chunk //= 2
    return replace(plan, frames_per_chunk=1, checkpoint_frames=True, fits=False)


def _without_weights(config: DetectorConfig) -> DetectorConfig:
    """Ask for the sizes of published encoders, and not for their weights."""

    def unloaded(component: Any) -> Any:
        if component is None or "name" not in component.options:
            return component
        return replace(component, options={**component.options, "pretrained": False})

    return replace(config, visual=unloaded(config.visual), audio=unloaded(config.audio))


def _cost_of_a_frame(detector: AUDetector, crop_size: int, dtype: torch.dtype) -> Cost:
    """Cost of one more frame: what does not grow with their number cancels."""

    def run(count: int) -> Tensor:
        images = torch.empty(count, 3, crop_size, crop_size, device="meta", dtype=dtype)
        encoded = detector.visual_encoder(images)
        if detector.hga is None:
            pooled: Tensor = encoded.patch_tokens.mean(1)
            return pooled
        weights = torch.empty(
            count, detector.num_regions, encoded.patch_tokens.shape[1], device="meta", dtype=dtype
        )
        tokens: Tensor = detector.hga(encoded.patch_tokens, weights).tokens
        return tokens

    detector.train()
    two, four = (measure_cost(lambda n=n: run(n), detector) for n in (2, 4))  # type: ignore[misc]
    return (four - two) * 0.5


def _cost_of_sound(detector: AUDetector, seconds: float, dtype: torch.dtype) -> Cost:
    """Cost of the audio encoder for one clip."""
    if detector.audio_encoder is None:
        return Cost(0, 0, 0)
    waveform = torch.empty(1, round(16_000 * seconds), device="meta", dtype=dtype)
    return measure_cost(lambda: detector.encode_audio(waveform).features, detector)


def _cost_over_time(detector: AUDetector, clips: int, frames: int, dtype: torch.dtype) -> Cost:
    """Cost from region tokens to logits."""

    def run() -> Tensor:
        shape = clips, frames, detector.num_regions, detector.d_region
        tokens = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        valid = torch.empty(clips, frames, device="meta", dtype=torch.bool)
        visual = detector.merge_regions(tokens, valid)
        audio = None
        if detector.d_audio is not None:
            audio = torch.empty(clips, frames, detector.d_audio, device="meta", dtype=dtype)
            audio.requires_grad_()
        logits, _ = detector.classify(visual, audio)
        return logits

    return measure_cost(run, detector)
