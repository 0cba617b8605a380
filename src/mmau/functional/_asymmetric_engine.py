"""Runs the asymmetric loss over a batch: in cache-sized pieces, as one graph, or for autograd.

Piece by piece, every intermediate stays in the cache and only the slope is written out, during the
forward pass; the backward pass scales that buffer in place and hands it over as the gradient. In
compiled code the steps of `differentiable_entries` are fused instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmau.functional._asymmetric_formula import (
    Terms,
    differentiable_entries,
    entries_and_slope,
)
from mmau.functional._asymmetric_piece import PieceWorker
from mmau.functional._masked_loss import Labels, Reduction, to_compute_dtype

__all__ = ["asymmetric_engine"]

PIECE = 65536
"""Entries at a time on one CPU thread: the buffers stay in a cache, and an operation on them takes
several times as long as starting it."""
ACCELERATOR_PIECE = 2**24
"""Entries at a time elsewhere, which only bounds the memory."""


def asymmetric_engine(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    labels: Labels,
    reduction: Reduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Return the loss of checked arguments."""
    if torch.compiler.is_compiling():
        return _graph(logits, target, terms, labels, reduction, normalizer)
    with torch.autocast(logits.device.type, enabled=False):
        arguments = (logits, target, terms, labels, reduction, normalizer)
        return cast("Tensor", _Engine.apply(*arguments))  # type: ignore[no-untyped-call]


class _Outcome(NamedTuple):
    """What one pass over a batch gives."""

    total: Tensor
    """Sum of the entries, or 0 if they were asked for."""
    labelled: float | Tensor
    """How many entries have a label."""
    entries: Tensor | None
    slope: Tensor | None


class _Engine(torch.autograd.Function):
    """Loss of a batch; keeps the closed-form slope until the first backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        terms: Terms,
        labels: Labels,
        reduction: Reduction,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        done = _run(
            logits,
            target,
            terms,
            labels,
            want_entries=reduction == "none",
            want_slope=ctx.needs_input_grad[0],
        )
        ctx.save_for_backward(logits, target)
        ctx.slope, ctx.terms, ctx.labels = done.slope, terms, labels
        if done.entries is not None:
            ctx.scale = None
            return done.entries
        ctx.scale = _scale(done, reduction, normalizer)
        dtype = to_compute_dtype(logits.new_empty(0)).dtype
        return cast("Tensor", (done.total * ctx.scale).to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        slope: Tensor | None
        if ctx.scale is not None:
            grad = grad * ctx.scale
        if torch.is_grad_enabled():
            # A graph of the gradient is asked for, so the slope must not be a constant.
            slope = _differentiable_slope(logits, target, ctx.terms, ctx.labels, grad)
        else:
            # Handed over and not kept: a second backward pass over the same graph, which is rare,
            # computes it again, and every other one needs no second buffer of this size.
            slope, ctx.slope = ctx.slope, None
            if slope is None:
                slope = _run(logits, target, ctx.terms, ctx.labels, want_slope=True).slope
            slope = cast("Tensor", slope).mul_(grad).to(logits.dtype)
        return slope, None, None, None, None, None


def _scale(
    done: _Outcome, reduction: Reduction, normalizer: float | Tensor | None
) -> float | Tensor:
    """Return what the sum is multiplied by; 1 where there is nothing to divide by."""
    if reduction == "sum":
        return 1.0
    count = done.labelled if normalizer is None else normalizer
    if isinstance(count, Tensor):
        count = count.detach().reshape(()).to(done.total.device, done.total.dtype)
        return 1 / torch.where(count > 0, count, torch.ones_like(count))
    return 1 / count if count > 0 else 1.0


def _run(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    labels: Labels,
    *,
    want_entries: bool = False,
    want_slope: bool = False,
) -> _Outcome:
    """Go over the batch piece by piece."""
    flat_logits, flat_target = logits.detach().reshape(-1), target.detach().reshape(-1)
    dtype = to_compute_dtype(flat_logits[:0]).dtype
    size, width, on_cpu = flat_logits.numel(), logits.shape[-1], logits.device.type == "cpu"
    limit = PIECE * torch.get_num_threads() if on_cpu else ACCELERATOR_PIECE
    pieces = -(-size // limit)
    # Pieces of the same length, in whole rows, so that options per Action Unit line up with each.
    step = -(-size // (max(pieces, 1) * max(width, 1))) * max(width, 1)
    terms = terms.map(lambda values: values.repeat(step // max(width, 1)))

    entries = torch.empty_like(flat_logits, dtype=dtype) if want_entries else None
    slope = torch.empty_like(flat_logits, dtype=dtype) if want_slope else None
    worker = PieceWorker(terms, step, dtype) if on_cpu and not labels.soft else None
    total = torch.zeros((), dtype=torch.float64 if on_cpu else dtype, device=logits.device)
    count: float | Tensor = 0
    for start in range(0, size, max(step, 1)):
        part = slice(start, min(start + step, size))
        outputs = tuple(None if whole is None else whole[part] for whole in (entries, slope))
        done: tuple[float | Tensor, float | Tensor] | None = None
        if worker is not None:
            done = worker.run(flat_logits[part], flat_target[part], labels, *outputs)
        if done is None:
            if labels.check:
                labels.refuse(target)
            done = _general_piece(flat_logits[part], flat_target[part], terms, labels, *outputs)
        total += done[0]
        count = count + done[1]
    return _Outcome(
        total,
        count,
        None if entries is None else entries.view(logits.shape),
        None if slope is None else slope.view(logits.shape),
    )


def _general_piece(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    labels: Labels,
    entries_out: Tensor | None,
    slope_out: Tensor | None,
) -> tuple[Tensor, float | Tensor]:
    """Loss and count of one piece, whatever it holds."""
    terms = terms.map(lambda values: values[: len(logits)])
    entries, slope, count = _masked_entries_and_slope(logits, target, terms, labels)
    if entries_out is not None:
        entries_out.copy_(entries)
    if slope_out is not None:
        slope_out.copy_(slope)
    return entries.sum(), float(count) if count.device.type == "cpu" else count


def _masked_entries_and_slope(
    logits: Tensor, target: Tensor, terms: Terms, labels: Labels
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and slope of every entry, both 0 where there is no label, and how many have one."""
    x = to_compute_dtype(logits)
    y = target.to(x.dtype)
    given = labels.given(y)
    if labels.soft:
        yes = torch.ones_like(y)
        of_yes, of_no = entries_and_slope(x, yes, terms), entries_and_slope(x, 1 - yes, terms)
        entries, slope = (
            y * one + (1 - y) * other for one, other in zip(of_yes, of_no, strict=True)
        )
    else:
        entries, slope = entries_and_slope(x, y, terms)
    # Selected, not multiplied: 0 * NaN would leak.
    otherwise = labels.unless_given(y)
    entries, slope = (torch.where(given, found, otherwise) for found in (entries, slope))
    # In floating point, which a compiler sums four times as fast as the 64 bits of integers.
    return entries, slope, given.to(x.dtype).sum()


class _GraphEntries(torch.autograd.Function):
    """Loss of every entry in compiled code, with the closed form for a derivative.

    Not autograd's own derivative, which a compiler could fuse as well: it would write 1 - sigmoid,
    and lose in float32 what the closed form keeps.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, terms: Terms, labels: Labels) -> Tensor:
        entries, slope, _ = _masked_entries_and_slope(logits, target, terms, labels)
        ctx.save_for_backward(slope)
        ctx.dtype = logits.dtype
        return entries

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None, None


def _graph(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    labels: Labels,
    reduction: Reduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Return the loss in the form that a compiler fuses."""
    arguments = (logits, target, terms, labels)
    entries = cast("Tensor", _GraphEntries.apply(*arguments))  # type: ignore[no-untyped-call]
    if reduction == "none":
        return entries
    count = labels.given(target.to(entries.dtype)).to(entries.dtype).sum()
    done = _Outcome(entries.sum(), count, None, None)
    return done.total * _scale(done, reduction, normalizer)


def _differentiable_slope(
    logits: Tensor, target: Tensor, terms: Terms, labels: Labels, grad: Tensor
) -> Tensor:
    """Gradient of the loss as a function of the logits and of `grad`, to any order."""
    x = to_compute_dtype(logits)
    y = target.to(x.dtype)
    given = labels.given(y)
    # Here before the arithmetic too, because autograd multiplies what was not selected by 0.
    x, y = torch.where(given, x, 0.0), torch.where(given, y, 0.0)
    if labels.soft:
        yes = torch.ones_like(y)
        entries = y * differentiable_entries(x, yes, terms)
        entries = entries + (1 - y) * differentiable_entries(x, 1 - yes, terms)
    else:
        entries = differentiable_entries(x, y, terms)
    entries = torch.where(given, entries, 0.0)
    grad = grad.expand(entries.shape).to(entries.dtype)
    return torch.autograd.grad(entries, logits, grad, create_graph=True)[0]
