r"""Forward and backward of the chunked sequential scan, in plain tensor operations.

Exact zero-order hold is a linear interpolation. With $w_t = -\operatorname{expm1}(\Delta_t A)$ in
[0, 1) and the equilibrium $v_t = B_t x_t / |A|$,

$$ h_t = (1 - w_t) \, h_{t-1} + w_t \, v_t $$

which needs one transcendental per state, is bounded for any $\Delta$, and leaves the state
untouched, to the bit, where $\Delta_t = 0$. Euler has $h_t = a_t h_{t-1} + v_t$ with $a_t =
\exp(\Delta_t A)$ and $v_t = \Delta_t B_t x_t$.

The loop over frames stays sequential, since that is the least work; everything that is not the
recurrence is done for a chunk of frames at once. A chunk is as long as fits the caches. Only the
state before each chunk is kept for the backward, which recomputes the others. Work buffers are
`(k, b, n, d)`: the channel axis, the longest, is the innermost one. Sums are `mul` and `sum`, not
`matmul`: faster at these sizes, and untouched by autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "forward", "num_chunks"]

WORK_ELEMENTS = 1 << 18
"""Elements of one work buffer: 1 MiB in float32, measured best on machines with 1-2 MiB of L2."""


def _chunk_length(num_clips: int, d: int, n: int) -> int:
    """Frames per chunk. `sym_max` because a compiler asks it with symbolic sizes."""
    length: int = torch.sym_max(  # type: ignore[no-untyped-call]
        1,
        WORK_ELEMENTS // torch.sym_max(1, num_clips * d * n),  # type: ignore[no-untyped-call]
    )
    return length


def num_chunks(num_clips: int, num_frames: int, d: int, n: int) -> int:
    """Number of chunks, which is also the number of states that are kept for the backward."""
    length = _chunk_length(num_clips, d, n)
    return (num_frames + length - 1) // length


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
        self.inverse = self.A.reciprocal().neg_()
        self.zoh = zoh
        self.length = min(_chunk_length(self.num_clips, self.d, self.n), max(1, self.num_frames))
        self.chunks = [
            slice(start, min(start + self.length, self.num_frames))
            for start in range(0, self.num_frames, self.length)
        ]

    def buffer(self) -> Tensor:
        return self.x.new_empty(self.length, self.num_clips, self.n, self.d)

    def fill(self, chunk: slice, w: Tensor, v: Tensor) -> None:
        """Write `w` and `v` of the recurrence, for every frame of the chunk."""
        torch.mul(self.delta[chunk], self.A, out=w)
        if self.zoh:
            w.expm1_().neg_()
            torch.mul(self.x[chunk], self.B[chunk], out=v)
            v.mul_(self.inverse)
        else:
            w.exp_()
            torch.mul(self.x[chunk] * self.delta[chunk], self.B[chunk], out=v)

    def run(self, chunk: slice, h: Tensor, w: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Write the states of the chunk into `out`, which may be `v`; return the last one."""
        # `unbind` once: indexing frame by frame would cost more than the recurrence itself.
        frames = zip(w.unbind(0), v.unbind(0), out.unbind(0), strict=True)
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


def forward(
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
    frames = _Frames(x, delta, A, B, C, reset, zoh)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = _to_work(x, A, initial_state)
    kept = x.new_empty(len(frames.chunks) if keep_states else 0, *h.shape)
    w, v = frames.buffer(), frames.buffer()
    for index, chunk in enumerate(frames.chunks):
        size = chunk.stop - chunk.start
        w_, v_ = w[:size], v[:size]
        if keep_states:
            kept[index].copy_(h)
        frames.fill(chunk, w_, v_)
        # Copied, because the next chunk overwrites the buffer that the last state lives in.
        h = frames.run(chunk, h, w_, v_, out=v_).clone()
        torch.sum(torch.mul(v_, frames.C[chunk], out=w_), 2, out=y.transpose(0, 1)[chunk])
    # Flat: an axis of one chunk would make an exporter believe that there is never a second.
    return y, h.transpose(1, 2).clone(memory_format=torch.contiguous_format), kept.flatten()


def _to_work(x: Tensor, A: Tensor, state: Tensor | None) -> Tensor:
    """`(b, d, n)` or nothing to a fresh `(b, n, d)`."""
    if state is None:
        return x.new_zeros(x.shape[0], A.shape[1], x.shape[2])
    return state.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def backward(
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

    With the adjoint $G_t = C_t \, \partial y_t + \bar A_{t+1} G_{t+1}$ and
    $S_t = A h_t + B_t x_t = |A| (v_t - h_t)$, exact zero-order hold has

    $$ \partial\Delta = \sum_n G S, \quad \partial x = \sum_n B \, G w / |A|, \quad
    \partial B = \sum_d x \, G w / |A|, \quad A \, \partial A = \sum (\Delta G S - G w v) $$

    which never subtracts two nearly equal numbers that the forward did not already subtract.
    """
    frames = _Frames(x, delta, A, B, C, reset, zoh)
    grads = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C)
    )
    grad_x, grad_delta, grad_B, grad_C = (grad.transpose(0, 1) for grad in grads)
    grad_A = torch.zeros_like(frames.A)
    grad_y = grad_y.transpose(0, 1).unsqueeze(2)
    carried = _to_work(x, A, grad_state)
    kept = kept.view(len(frames.chunks), *carried.shape)
    buffers = [frames.buffer() for _ in range(5)]
    for index in reversed(range(len(frames.chunks))):
        chunk = frames.chunks[index]
        w, v, h, G, spare = (buffer[: chunk.stop - chunk.start] for buffer in buffers)
        x_, delta_, B_, C_ = (t[chunk] for t in (frames.x, frames.delta, frames.B, frames.C))
        frames.fill(chunk, w, v)
        frames.run(chunk, kept[index], w, v, out=h)

        torch.mul(grad_y[chunk], C_, out=G)
        decay = torch.sub(1, w, out=spare) if zoh else spare.copy_(w)
        if frames.reset is not None:
            decay.masked_fill_(frames.reset[chunk], 0.0)
        carried = _adjoint(G, decay, carried)

        torch.sum(torch.mul(h, grad_y[chunk], out=spare), 3, out=grad_C[chunk])
        if zoh:
            GS = torch.sub(v, h, out=h).mul_(G).mul_(frames.A).neg_()
            torch.sum(GS, 2, out=grad_delta[chunk])
            Gw = G.mul_(w)
            grad_A += GS.mul_(delta_).addcmul_(Gw, v, value=-1).sum((0, 1))
            P = Gw.mul_(frames.inverse)
            torch.sum(torch.mul(P, B_, out=spare), 2, out=grad_x[chunk])
            torch.sum(torch.mul(P, x_, out=spare), 3, out=grad_B[chunk])
        else:
            Gah = torch.sub(h, v, out=h).mul_(G)
            grad_A += torch.mul(Gah, delta_, out=spare).sum((0, 1))
            GB = torch.mul(G, B_, out=spare).sum(2)
            torch.mul(GB, delta_.squeeze(2), out=grad_x[chunk])
            torch.sum(Gah.mul_(frames.A), 2, out=grad_delta[chunk])
            grad_delta[chunk].addcmul_(GB, x_.squeeze(2))
            torch.sum(G.mul_(x_ * delta_), 3, out=grad_B[chunk])
    if zoh:
        grad_A /= frames.A
    grad_initial = carried.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return grads[0], grads[1], grad_A.t().contiguous(), grads[2], grads[3], grad_initial


def _adjoint(G: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """Run the recurrence of the gradient backwards, in place; return what the chunk before gets."""
    G_frames, decays = G.unbind(0), decay.unbind(0)
    later = G_frames[-1].add_(carried)
    for G_t, decay_next in zip(reversed(G_frames[:-1]), reversed(decays[1:]), strict=True):
        later = G_t.addcmul_(decay_next, later)
    return decays[0] * later
