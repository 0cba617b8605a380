"""The default scan: chunks of frames in plain PyTorch, with a backward by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmau.scan.backend import ScanBackend, ScanOperator

WORK_ELEMENTS = 1 << 18
"""Elements of one work buffer: 1 MiB in float32, measured best on machines with 1-2 MiB of L2."""

SMALL_FRAME = 1 << 11
"""Elements of a state below which the calls of a loop over frames cost more than its arithmetic."""

LOG2_E = 1.0 / math.log(2.0)


class _Sizes(NamedTuple):
    """How many frames go into a chunk, and what is kept for the backward."""

    length: int
    chunks: int
    kept_frames: int
    """Frames of the last chunk whose `h` and `w` are kept, or 0."""


def _sizes(num_clips: int, num_frames: int, d: int, n: int) -> _Sizes:
    """Plan the chunks, by arithmetic alone because a compiler asks with symbolic sizes."""
    frame = torch.sym_max(1, num_clips * d * n)  # type: ignore[no-untyped-call]
    length = torch.sym_max(1, WORK_ELEMENTS // frame)  # type: ignore[no-untyped-call]
    chunks = (num_frames + length - 1) // length
    is_small = torch.sym_min(1, SMALL_FRAME // frame)  # type: ignore[no-untyped-call]
    # Enough for any last chunk, and not exactly for this one: an exporter has to be able to prove
    # that something is kept, for every number of frames.
    most = torch.sym_min(num_frames, length)  # type: ignore[no-untyped-call]
    return _Sizes(length, chunks, is_small * most)


def kept_elements(num_clips: int, num_frames: int, d: int, n: int) -> int:
    """Elements that a forward keeps for its backward."""
    sizes = _sizes(num_clips, num_frames, d, n)
    return (sizes.chunks + 2 * sizes.kept_frames) * num_clips * n * d


class _Frames:
    """Time-first views of the inputs, and what a chunk of frames needs of them."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        reset: Tensor | None,
        zoh: bool,
    ) -> None:
        self.num_clips, self.num_frames, self.d = x.shape
        self.n = A.shape[1]
        self.x, self.delta = x.transpose(0, 1).unsqueeze(2), delta.transpose(0, 1).unsqueeze(2)
        self.B, self.C = B.transpose(0, 1).unsqueeze(3), C.transpose(0, 1).unsqueeze(3)
        self.reset = None if reset is None else reset.transpose(0, 1)[..., None, None]
        self.A = A.t().contiguous()
        self.rate = self.A.neg()
        self.inverse = self.rate.reciprocal()
        self.A_log2 = self.A * LOG2_E
        self.zoh = zoh
        self.sizes = _sizes(self.num_clips, self.num_frames, self.d, self.n)
        self.length = min(self.sizes.length, max(1, self.num_frames))
        self.chunks = [
            slice(start, min(start + self.length, self.num_frames))
            for start in range(0, self.num_frames, self.length)
        ]

    def precautions(self) -> tuple[bool, bool]:
        """Whether `u - w`, and whether `1 - w`, would lose digits if they were just subtracted.

        The first does where a channel stays close to its initial state: in the gradient of `A`
        its rounding is of the order of `eps / sum(u)`. The second does where a step forgets nearly
        everything: in the gradient of the step, a sum over `n`, its rounding is that of the fastest
        rate against the size of the slowest, `eps max(r) / (min(r) exp(-step min(r)))`. Looking at
        values would stall any device but the CPU: there, take both.
        """
        if self.delta.device.type != "cpu" or not (self.delta.numel() and self.A.numel()):
            return True, True
        total = self.delta.sum(0).mean(0).mul(self.rate).amin()
        slowest, fastest = self.rate.aminmax(dim=0)
        amplified = fastest / slowest * torch.exp(self.delta.amax((0, 1, 2)) * slowest)
        return not total.item() > 0.25, not amplified.amax().item() < 400.0

    def buffers(self, count: int) -> tuple[Tensor, ...]:
        """Allocate work memory, all at once: an allocator returns small blocks to the system."""
        state = self.num_clips, self.n, self.d
        return self.x.new_empty(count, self.length, *state).unbind(0)

    def decay(self, chunk: slice, out: Tensor) -> Tensor:
        """Write `a`, with all its digits however small it is."""
        return torch.mul(self.delta[chunk], self.A, out=out).exp_()

    def fast_decay(self, chunk: slice, out: Tensor) -> Tensor:
        """Write `a` to rounding, for the backward: its bits depend on the length of the chunk.

        On the CPU torch hands `exp` to a library that takes four times as long.
        """
        return torch.mul(self.delta[chunk], self.A_log2, out=out).exp2_()

    def weight(self, chunk: slice, out: Tensor) -> Tensor:
        """Write `w`, with all its digits however small it is."""
        return torch.mul(self.delta[chunk], self.A, out=out).expm1_().neg_()

    def target(self, chunk: slice, out: Tensor) -> Tensor:
        """Write `v` of the recurrence."""
        if self.zoh:
            return torch.mul(self.x[chunk], self.B[chunk], out=out).mul_(self.inverse)
        return torch.mul(self.x[chunk] * self.delta[chunk], self.B[chunk], out=out)

    def factor(self, chunk: slice, out: Tensor) -> Tensor:
        """Write what multiplies in the recurrence: `w` of zero-order hold, `a` of Euler."""
        return self.weight(chunk, out) if self.zoh else self.decay(chunk, out)

    def run(self, chunk: slice, h: Tensor, w: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Write the states of the chunk into `out`, which may be `v`; return the last one."""
        # `unbind` once: indexing frame by frame would cost more than the recurrence itself.
        targets = v.unbind(0)
        frames = zip(w.unbind(0), targets, targets if out is v else out.unbind(0), strict=True)
        if self.reset is None and self.zoh:
            for w_t, v_t, h_t in frames:
                h = torch.lerp(h, v_t, w_t, out=h_t)
        elif self.reset is None:
            for w_t, v_t, h_t in frames:
                h = torch.addcmul(v_t, w_t, h, out=h_t)
        else:
            for (w_t, v_t, h_t), drop in zip(frames, self.reset[chunk].unbind(0), strict=True):
                # Not a multiplication: a NaN of one clip must not reach the clip packed behind it.
                h = h.masked_fill(drop, 0.0)
                h = (
                    torch.lerp(h, v_t, w_t, out=h_t)
                    if self.zoh
                    else torch.addcmul(v_t, w_t, h, out=h_t)
                )
        return h


def scan_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    zoh: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y` `(b, t, d)`, the final state `(b, d, n)` and the flat kept states."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_empty(x.shape[0], *A.shape)
    num_clips, num_frames, d = x.shape
    kept = x.new_empty(kept_elements(num_clips, num_frames, d, A.shape[1]) if keep_states else 0)
    with torch.inference_mode():
        frames = _Frames(x, delta, A, B, C, reset, zoh)
        last = _scan(frames, _to_work(x, A, initial_state), y, kept if keep_states else None)
        state.copy_(last.transpose(1, 2))
    return y, state, kept


def _scan(frames: _Frames, h: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """Fill `y` and `kept`; return the last state in the layout of the work buffers."""
    memory = None if kept is None else _Kept(frames, kept)
    work = frames.buffers(1 if memory and memory.last_of == 1 else 2)
    for index, chunk in enumerate(frames.chunks):
        w, v = (buffer[: chunk.stop - chunk.start] for buffer in (work[0], work[-1]))
        scratch = w
        if memory is not None:
            memory.starts[index].copy_(h)
            if index + 1 == memory.last_of:
                w, v = memory.last(chunk)
                # Frames that this clip does not have hold no accidental numbers.
                memory.w[len(w) :].zero_()
                memory.h[len(v) :].zero_()
        frames.factor(chunk, w)
        frames.target(chunk, v)
        # Copied, because the next chunk overwrites the buffer that the last state lives in.
        h = frames.run(chunk, h, w, v, out=v).clone()
        torch.sum(torch.mul(v, frames.C[chunk], out=scratch), 2, out=y.transpose(0, 1)[chunk])
    return h


class _Kept:
    """What a forward keeps for its backward, as views of its flat memory.

    Flat, because an axis of one chunk would make an exporter believe that there is never a second.
    """

    def __init__(self, frames: _Frames, memory: Tensor) -> None:
        _, chunks, last = frames.sizes
        rows = memory.view(chunks + 2 * last, frames.num_clips, frames.n, frames.d)
        self.starts, self.w, self.h = torch.split(rows, [chunks, last, last])
        self.last_of = chunks if last else -1
        """Number of chunks, if `w` and `h` of the last one are kept."""

    def last(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return `w` and `h` of the last chunk."""
        used = chunk.stop - chunk.start
        return self.w[:used], self.h[:used]


def _to_work(x: Tensor, A: Tensor, state: Tensor | None) -> Tensor:
    """`(b, d, n)` or nothing to a fresh `(b, n, d)`."""
    if state is None:
        return x.new_zeros(x.shape[0], A.shape[1], x.shape[2])
    return state.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    zoh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Return the gradients of `x`, `delta`, `A`, `B`, `C` and the initial state.

    With the adjoint $G_t = C_t \, \partial y_t + \bar A_{t+1} G_{t+1}$ and $r = |A|$, exact
    zero-order hold has

    $$ \partial\Delta = \sum_n G \, r a \, (v - h_{t-1}), \quad
    \partial x = \sum_n B \, G w / r, \quad \partial B = \sum_d x \, G w / r, \quad
    r \, \partial A = \sum G \, (u \, h_t - q \, v) $$

    with $u = \Delta r$ and $q = u - w$, which `_lag` computes without cancellation. Where it
    matters, each of $a$, $w$ and $q$ has all its digits, so that gradients are exact for steps of
    1e-6, where $w$ and $u$ agree in all but the last, and of 20, where $a$ is 1e-9. Elsewhere
    $a (v - h_{t-1}) = v - h_t$, and $r \, \partial A = \sum G w v - \Delta G r (v - h_t)$, save
    six passes.
    """
    grads = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, A, B, C)
    )
    grad_initial = x.new_empty(x.shape[0], *A.shape)
    with torch.inference_mode():
        frames = _Frames(x, delta, A, B, C, reset, zoh)
        carried = _fill_gradients(frames, grads, grad_y, _to_work(x, A, grad_state), kept)
        grad_initial.copy_(carried.transpose(1, 2))
    return *grads, grad_initial  # type: ignore[return-value]


def _fill_gradients(
    frames: _Frames, grads: tuple[Tensor, ...], grad_y: Tensor, carried: Tensor, kept: Tensor
) -> Tensor:
    """Write the gradients of `x`, `delta`, `A`, `B`, `C`; return that of the state before them."""
    grad_x, grad_delta, grad_A, grad_B, grad_C = (grad.transpose(0, 1) for grad in grads)
    grad_y = grad_y.transpose(0, 1).unsqueeze(2)
    memory = _Kept(frames, kept)
    zoh, drop = frames.zoh, None
    hardly_moves, forgets = frames.precautions() if zoh else (False, False)
    # What is not read again is overwritten, unless it is kept for a second backward or one of the
    # cautious paths needs it to the end.
    reuses_buffers = zoh and not (hardly_moves or forgets or memory.last_of > 0)
    # One sum over all frames at the end, instead of one for each chunk.
    sum_A, *buffers = frames.buffers(
        2 + 2 * (not reuses_buffers) + 2 * hardly_moves + 2 * (memory.last_of != 1)
    )
    sum_A.zero_()

    for index, chunk in reversed(list(enumerate(frames.chunks))):
        dA, v, *others = (t[: chunk.stop - chunk.start] for t in (sum_A, *buffers))
        x, delta, B, C = (t[chunk] for t in (frames.x, frames.delta, frames.B, frames.C))
        frames.target(chunk, v)
        if index + 1 == memory.last_of:
            w, h = memory.last(chunk)
        else:
            h, w = others[-2], frames.factor(chunk, others[-1])
            frames.run(chunk, memory.starts[index], w, v, out=h)
        G, scratch = (h, w) if reuses_buffers else others[:2]
        if frames.reset is not None:
            drop = frames.reset[chunk]

        if zoh:
            S = others[2] if hardly_moves else v
            if forgets:
                scratch[0].copy_(memory.starts[index])
                scratch[1:].copy_(h[:-1])
                if drop is not None:
                    scratch.masked_fill_(drop, 0.0)
                torch.sub(v, scratch, out=S).mul_(frames.fast_decay(chunk, scratch))
            else:
                torch.sub(v, h, out=S)
            torch.sum(torch.mul(h, grad_y[chunk], out=G), 3, out=grad_C[chunk])
            torch.mul(grad_y[chunk], C, out=G)
            loss = w if drop is None else torch.masked_fill(w, drop, 1.0)
            carried = _adjoint(G, loss, carried, scratch)
            torch.sum(S.mul_(G).mul_(frames.rate), 2, out=grad_delta[chunk])
            if hardly_moves:
                u = torch.mul(delta, frames.rate, out=scratch)
                q = _lag(u, w, S, others[3])
                dA.addcmul_(u.mul_(h).addcmul_(q, v, value=-1), G)
            else:
                dA.addcmul_(S, delta, value=-1)
            P = G.mul_(w).mul_(frames.inverse)
            entering = torch.mul(P, B, out=scratch)
            torch.sum(entering, 2, out=grad_x[chunk])
            if not hardly_moves:
                dA.addcmul_(entering, x)
            torch.sum(torch.mul(P, x, out=scratch), 3, out=grad_B[chunk])
        else:
            torch.sum(torch.mul(h, grad_y[chunk], out=G), 3, out=grad_C[chunk])
            torch.mul(grad_y[chunk], C, out=G)
            S = v
            torch.mul(w[0], memory.starts[index], out=S[0])
            torch.mul(w[1:], h[:-1], out=S[1:])
            if drop is not None:
                S.masked_fill_(drop, 0.0)
            carried = _adjoint_euler(G, w if drop is None else w.masked_fill(drop, 0.0), carried)
            dA.addcmul_(S.mul_(G), delta)
            GB = torch.mul(G, B, out=scratch).sum(2)
            torch.mul(GB, delta.squeeze(2), out=grad_x[chunk])
            torch.sum(S.mul_(frames.A), 2, out=grad_delta[chunk])
            grad_delta[chunk].addcmul_(GB, x.squeeze(2))
            torch.sum(G.mul_(x * delta), 3, out=grad_B[chunk])
    total = sum_A.sum((0, 1))
    grad_A.copy_(total.mul_(frames.inverse) if zoh else total)
    return carried


def _lag(u: Tensor, w: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    r"""Compute `u - w` with `w = 1 - exp(-u)`, of which a subtraction leaves nothing at small `u`.

    There it is $u w \, (1/2 + u/12 - u^3/720 + \dots)$, and two terms suffice up to about 0.1.
    Where the subtraction agrees with them to within `tolerance`, the largest rounding error it has
    in that range, the terms are taken, elsewhere the subtraction; `hardshrink` decides, because
    `where` costs as much as a dozen multiplications. The cap keeps the terms small where they are
    not used.
    """
    tolerance = 4.5 * torch.finfo(u.dtype).eps ** 1.25
    capped = torch.clamp(u, max=1.0, out=scratch)
    torch.add(u.new_full((), 0.5), capped, alpha=1 / 12, out=out).mul_(capped).mul_(w)
    rest = torch.sub(u, w, out=scratch).sub_(out)
    return out.add_(torch.ops.aten.hardshrink.out(rest, tolerance, out=rest))


def _adjoint(G: Tensor, w: Tensor, carried: Tensor, scratch: Tensor) -> Tensor:
    """Run `G[t] += (1 - w[t + 1]) G[t + 1]` backwards, in place; return what the chunk before gets.

    `1 - w` is never rounded to a number: over a thousand frames with the same small step the
    rounding would add up. `scratch` is overwritten.
    """
    num_frames, state_size = len(G), carried.numel()
    if num_frames * SMALL_FRAME < WORK_ELEMENTS or state_size > SMALL_FRAME:
        return _adjoint_by_frame(G, w, carried)
    # Segments of `side` frames each, all at once and then one after the other: six calls per
    # `side` frames instead of two per frame, for twice the arithmetic.
    side = math.isqrt(num_frames)
    whole = num_frames // side * side
    if whole < num_frames:
        carried = _adjoint_by_frame(G[whole:], w[whole:], carried)
    segments = [t[:whole].view(-1, side, *carried.shape) for t in (G, w, scratch)]
    by_frame, weights, losses = (t.unbind(1) for t in segments)
    losses[-1].zero_()
    one = w.new_ones(())
    for t in reversed(range(side - 1)):
        by_frame[t].addcmul_(weights[t + 1], by_frame[t + 1], value=-1).add_(by_frame[t + 1])
        # What is lost between here and the end of the segment.
        torch.lerp(losses[t + 1], one, weights[t + 1], out=losses[t])
    carries = w.new_empty(len(segments[0]) + 1, *carried.shape)
    carries[-1].copy_(carried)
    arriving = carries.unbind(0)
    firsts = (t.unbind(0) for t in (by_frame[0], weights[0], losses[0]))
    for first, weight, lost, after, before in zip(
        *(reversed(t) for t in firsts), reversed(arriving[1:]), reversed(arriving[:-1]), strict=True
    ):
        complete = torch.addcmul(first, lost, after, value=-1).add_(after)
        torch.addcmul(complete, weight, complete, value=-1, out=before)
    after_each = carries[1:].unsqueeze(1)
    segments[0].addcmul_(segments[2], after_each, value=-1).add_(after_each)
    return arriving[0]


def _adjoint_by_frame(G: Tensor, w: Tensor, carried: Tensor) -> Tensor:
    frames, weights = G.unbind(0), w.unbind(0)
    later = frames[-1].add_(carried)
    for G_t, w_next in zip(reversed(frames[:-1]), reversed(weights[1:]), strict=True):
        later = G_t.addcmul_(w_next, later, value=-1).add_(later)
    return torch.addcmul(later, weights[0], later, value=-1)


def _adjoint_euler(G: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """Run `G[t] += decay[t + 1] G[t + 1]` backwards, in place."""
    frames, decays = G.unbind(0), decay.unbind(0)
    later = frames[-1].add_(carried)
    for G_t, decay_next in zip(reversed(frames[:-1]), reversed(decays[1:]), strict=True):
        later = G_t.addcmul_(decay_next, later)
    return decays[0] * later


_OPERATOR = ScanOperator("chunked", scan_forward, scan_backward, kept_elements)


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """Run the scan in chunks; linear time, one kept state per chunk, backward by hand.

    Differentiable once in every tensor; for second derivatives and `torch.func` take the backend
    `"reference"`.
    """
    return _OPERATOR(x, delta, A, B, C, initial_state, reset, discretization=discretization)


BACKEND = ScanBackend(name="chunked", run=scan, devices=frozenset({"cpu", "cuda", "mps", "meta"}))
