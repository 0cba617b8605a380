"""Run a module over a few frames at a time, so that its memory does not grow with the clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmau._checks import check_range


def run_in_chunks(
    run: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    frames_per_chunk: int | None,
    *,
    recompute: bool = False,
) -> Any:
    """Call a function that treats each frame by itself on chunks of `frames_per_chunk` frames.

    `inputs` are tensors `(n, ...)` or `None`, which is handed on. The function returns a tensor
    `(n, ...)`, or a NamedTuple of tensors and of values that are the same for every chunk. With
    `recompute` no activations are kept: they are computed again in the backward pass.
    """
    if frames_per_chunk is not None:
        check_range("frames_per_chunk", frames_per_chunk, 1)
    counts = {len(tensor) for tensor in inputs if tensor is not None}
    if len(counts) != 1:
        raise ValueError(
            f"all inputs must have the same number of frames; got {', '.join(map(str, counts))}."
        )
    num_frames = counts.pop()
    size = frames_per_chunk or max(1, num_frames)
    recompute = recompute and torch.is_grad_enabled()
    results = []
    for start in range(0, max(1, num_frames), size):
        chunk = [None if t is None else t[start : start + size] for t in inputs]
        # The reentrant kind fails where the input needs no gradient but LoRA inside does.
        results.append(checkpoint(run, *chunk, use_reentrant=False) if recompute else run(*chunk))
    return results[0] if len(results) == 1 else _joined(results)


def _joined(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined(list(parts)) for parts in zip(*results, strict=True)))
    if any(result != first for result in results[1:]):
        raise ValueError(
            f"every chunk must give the same value where it is no tensor; got {results}."
        )
    return first


class FrameChunked(nn.Module):
    """Give any module of single frames a memory that does not grow with their number.

    The activations of a foundation encoder over a batch of clips do not fit any GPU: 4096 frames of
    a ViT-L keep 580 GiB. With `recompute` only the inputs and outputs of each chunk stay, and one
    chunk of activations at a time, for about half as much time again. Gradients are the same.

    Args:
        module: Called with tensors `(n, ...)`; treats every frame by itself. Returns a tensor or a
            NamedTuple.
        frames_per_chunk: Frames at once.
        recompute: Whether to keep no activations and compute them again in the backward pass.

    Shape:
        - inputs: as the module takes them, frames first; `None` is handed on
        - output: as the module returns it

    Raises:
        ValueError: If `frames_per_chunk` is below 1.

    References:
        Section 4.1 of the paper: 16 clips of 256 frames per step. Chen et al., *Training Deep Nets
        with Sublinear Memory Cost*, 2016.

    Examples:
        >>> encoder = FrameChunked(nn.Linear(4, 2), frames_per_chunk=64, recompute=True)
        >>> encoder(torch.zeros(1000, 4)).shape
        torch.Size([1000, 2])
    """

    def __init__(
        self, module: nn.Module, frames_per_chunk: int, *, recompute: bool = False
    ) -> None:
        super().__init__()
        check_range("frames_per_chunk", frames_per_chunk, 1)
        self.module = module
        self.frames_per_chunk = frames_per_chunk
        self.recompute = recompute

    def forward(self, *inputs: Tensor | None) -> Any:
        """Run the module chunk by chunk."""
        return run_in_chunks(self.module, inputs, self.frames_per_chunk, recompute=self.recompute)

    def extra_repr(self) -> str:
        """Show the size of a chunk."""
        return f"frames_per_chunk={self.frames_per_chunk}, recompute={self.recompute}"
