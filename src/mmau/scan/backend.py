"""What an implementation of the selective scan must offer, and the table of those there are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmau.registry import Registry


class ScanFunction(Protocol):
    """The type of `ScanBackend.run`."""

    def __call__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        initial_state: Tensor | None,
        reset: Tensor | None,
        discretization: str,
    ) -> tuple[Tensor, Tensor]:
        """Return `y` `(b, t, d)` and the final state `(b, d, n)`."""


class GatedScanFunction(Protocol):
    """The type of `ScanBackend.run_gated`."""

    def __call__(
        self,
        x: Tensor,
        delta_logits: Tensor,
        delta_bias: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        gate_logits: Tensor | None,
        initial_state: Tensor | None,
        reset: Tensor | None,
        discretization: str,
    ) -> tuple[Tensor, Tensor]:
        """Return `y` `(b, t, d)` and the final state `(b, d, n)`."""


@dataclass(frozen=True)
class ScanBackend:
    """One implementation of the selective scan and what it declares to offer.

    `selective_scan` refuses whatever is not declared here; nothing falls back.
    `mmau.testing.check_scan_backend` checks that what is declared is true.

    Args:
        name: How errors and `repr` call it.
        run: Called with `x, delta, A, B, C` as in `selective_scan` and the keywords
            `initial_state`, `reset` and `discretization`; returns `y` and the final state. All
            tensors have one dtype. Masked frames arrive as zeros in `x`, `delta`, `B` and `C`: a
            backend needs no masks, it only has to leave the state alone where `delta` is 0.
        discretizations: Of `"zoh"` and `"euler"`, those it computes.
        devices: Device types it runs on.
        dtypes: Dtypes it computes in; half precision is cast to float32 before.
        takes_state: Whether it takes an initial state and returns a differentiable final one.
        takes_reset: Whether it can drop the state at given frames.
        compiles: Whether `torch.compile(fullgraph=True)` can trace it.
        run_gated: The scan of `x * sigmoid(gate_logits)` with steps `softplus(delta_logits +
            delta_bias)` in one kernel, which `AGSSM` then calls, or `None`. A gate logit of `inf`
            opens the gate, a step logit of `-inf` freezes the state; dtypes may differ.

    Examples:
        >>> SCAN_BACKENDS.get("chunked").takes_state
        True
    """

    name: str
    run: ScanFunction
    discretizations: frozenset[str] = frozenset({"zoh", "euler"})
    devices: frozenset[str] = frozenset({"cpu", "cuda", "mps"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float64})
    takes_state: bool = True
    takes_reset: bool = True
    compiles: bool = True
    run_gated: GatedScanFunction | None = None

    def check_discretization(self, discretization: str) -> None:
        """Refuse a discretisation that this backend does not declare."""
        if discretization not in self.discretizations:
            raise ValueError(
                f"`discretization` must be one of {_listed(self.discretizations)} for the scan "
                f"backend {self.name!r}; got {discretization!r}."
            )

    def check(
        self,
        *,
        discretization: str,
        device: str,
        dtype: torch.dtype,
        state: bool = False,
        reset: bool = False,
    ) -> None:
        """Refuse with a `ValueError` what this backend does not declare."""
        self.check_discretization(discretization)
        if device not in self.devices:
            raise ValueError(
                f"the scan backend {self.name!r} runs on {_listed(self.devices)}; "
                f"got tensors on {device!r}."
            )
        if dtype not in self.dtypes:
            raise ValueError(
                f"the scan backend {self.name!r} computes in "
                f"{', '.join(sorted(str(known) for known in self.dtypes))}; got {dtype}."
            )
        if state and not self.takes_state:
            raise ValueError(
                f"the scan backend {self.name!r} has no initial or final state; leave out "
                "`initial_state` and `return_state`, or take the backend 'reference' or 'chunked'."
            )
        if reset and not self.takes_reset:
            raise ValueError(
                f"the scan backend {self.name!r} cannot reset its state inside a sequence; leave "
                "out `reset`, or take the backend 'reference' or 'chunked'."
            )


def _listed(words: frozenset[str]) -> str:
    return ", ".join(repr(word) for word in sorted(words))


class ScanOperator:
    """A kernel and its hand-written backward: differentiable once, and one node in a graph.

    `forward` takes `x, delta, A, B, C, initial_state, reset, *fused, zoh, keep_states` and returns
    `y`, the final state and what is kept for `backward`, flat: `kept_elements(b, t, d, n)` numbers.
    `backward` takes `grad_y, grad_state, x, delta, A, B, C, kept, reset, *fused, zoh` and returns
    the gradients of `x, delta, A, B, C, initial_state, *fused`, an empty one for a fused tensor
    that is absent.

    The operators of `torch.library` are for compilers, exporters and tensors without values. Eager
    code calls the kernels directly: a dispatch costs as much as scanning a hundred frames. Whoever
    changes the number or the shapes of the outputs has to change `name` as well: compilers keep
    graphs on disk by it, with the old shapes in them.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        backward: Callable[..., tuple[Tensor, ...]],
        kept_elements: Callable[[int, int, int, int], int],
        *,
        fused: tuple[str, ...] = (),
        device_types: str | None = None,
    ) -> None:
        # Schemas are written out because torch would evaluate annotations, which are strings here.
        inputs = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C"
        options = "".join(f"Tensor? {option}, " for option in ("reset", *fused)) + "bool zoh"
        grads = ", ".join(["Tensor"] * (6 + len(fused)))
        self.forward = forward
        self.operator = torch.library.custom_op(
            f"mmau::selective_scan_{name}",
            forward,
            mutates_args=(),
            device_types=device_types,
            schema=f"({inputs}, Tensor? initial_state, {options}, bool keep_states) "
            "-> (Tensor, Tensor, Tensor)",
        )
        backward_operator = torch.library.custom_op(
            f"mmau::selective_scan_{name}_backward",
            backward,
            mutates_args=(),
            device_types=device_types,
            schema=f"(Tensor grad_y, Tensor? grad_state, {inputs}, Tensor kept, {options}) "
            f"-> ({grads})",
        )

        def shapes(
            x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            state = _empty_state(x, A)
            clips, frames, d = x.shape
            kept = kept_elements(clips, frames, d, A.shape[1]) if rest[-1] else 0
            return _empty_like(x), state, state.new_empty(kept)

        def backward_shapes(
            grad_y: Tensor, grad_state: Tensor | None, *tensors: Any
        ) -> tuple[Tensor, ...]:
            x, delta, A, B, C, _, _, *fused, _ = tensors
            grads = [_empty_like(tensor) for tensor in (x, delta, A, B, C)]
            fused_grads = [x.new_empty(0) if t is None else _empty_like(t) for t in fused]
            return *grads, _empty_state(x, A), *fused_grads

        def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            x, delta, A, B, C, initial_state, reset, *fused, zoh, keep_states = inputs
            if not keep_states:
                return  # nothing asked for a gradient when the operator was called
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(output[2])
            ctx.save_for_backward(x, delta, A, B, C, output[2], reset, *fused)
            ctx.zoh = zoh
            ctx.state_dtype = None if initial_state is None else initial_state.dtype

        def differentiate(
            run: Callable[..., tuple[Tensor, ...]],
            ctx: Any,
            grad_y: Tensor | None,
            grad_state: Tensor | None,
            _: Tensor | None,
        ) -> tuple[Tensor | None, ...]:
            x, *others, reset = ctx.saved_tensors[:7]
            fused = ctx.saved_tensors[7:]
            if grad_y is None:
                grad_y = torch.zeros_like(x)
            grads = run(grad_y, grad_state, x, *others, reset, *fused, ctx.zoh)
            grad_initial = None if ctx.state_dtype is None else grads[5].to(ctx.state_dtype)
            fused_grads = (
                None if tensor is None else grad
                for tensor, grad in zip(fused, grads[6:], strict=True)
            )
            return *grads[:5], grad_initial, None, *fused_grads, None, None

        kernel = forward

        class Eager(torch.autograd.Function):
            forward = staticmethod(kernel)
            setup_context = staticmethod(setup)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                # Where a graph of the gradients is asked for (grad mode is on), the operator
                # refuses to be differentiated; the kernels would drop the second derivative
                # without a word.
                run = backward_operator if torch.is_grad_enabled() else backward
                return differentiate(run, ctx, *grads)

        self.operator.register_fake(shapes)
        backward_operator.register_fake(backward_shapes)
        through_operator = functools.partial(differentiate, backward_operator)
        self.operator.register_autograd(through_operator, setup_context=setup)
        self.eager = Eager

    def __call__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor | None,
        reset: Tensor | None,
        *fused: Tensor | None,
        discretization: str,
    ) -> tuple[Tensor, Tensor]:
        """Return `y` `(b, t, d)` and the final state `(b, d, n)`."""
        tensors = (x, delta, A, B, C, initial_state, *fused)
        wants_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )
        run: Callable[..., tuple[Tensor, Tensor, Tensor]]
        if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
            run = self.operator
        elif wants_grad:
            run = self.eager.apply
        else:
            run = self.forward
        zoh = discretization == "zoh"
        y, state, _ = run(x, delta, A, B, C, initial_state, reset, *fused, zoh, wants_grad)
        return y, state


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_state(x: Tensor, A: Tensor) -> Tensor:
    """`(b, d, n)`, in float32 where the activations have half precision."""
    return x.new_empty(x.shape[0], *A.shape, dtype=torch.promote_types(x.dtype, torch.float32))


SCAN_BACKENDS: Registry[ScanBackend] = Registry("scan backend", group="mmau.scan_backends")
SCAN_BACKENDS.register_lazy(
    "reference",
    "mmau.scan.reference:BACKEND",
    summary="A loop that reads like the paper; any device, double backward; slow.",
)
SCAN_BACKENDS.register_lazy(
    "chunked",
    "mmau.scan.chunked:BACKEND",
    summary="Chunked sequential scan with hand-written backward; pure PyTorch, any device.",
)
SCAN_BACKENDS.register_lazy(
    "compiled",
    "mmau.scan.compiled:BACKEND",
    summary="C++, compiled on this machine when first asked for; CPU; needs g++ and ninja.",
)
SCAN_BACKENDS.register_lazy(
    "triton",
    "mmau.scan.triton:BACKEND",
    summary="One fused kernel, deterministic backward; CUDA.",
    extra="gpu",
    requires=("triton",),
)
SCAN_BACKENDS.register_lazy(
    "mamba_ssm",
    "mmau.scan.mamba_ssm:BACKEND",
    summary="mamba-ssm's compiled kernel, with exact zero-order hold around it; CUDA.",
    extra="gpu",
    requires=("selective_scan_cuda",),
)
