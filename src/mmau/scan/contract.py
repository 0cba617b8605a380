"""The whole contract of a scan backend, as one call that a package of yours can put into a test."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmau.scan.api import resolve_scan_backend, selective_scan
from mmau.scan.backend import ScanBackend

BATCH, WIDTH, STATE = 2, 5, 3

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Largest error allowed, relative to the largest entry of the tensor."""


def check_scan_backend(
    backend: str | ScanBackend,
    *,
    device: str | None = None,
    tolerance: float | None = None,
    lengths: Sequence[int] = (1, 2, 3, 31, 32, 33, 65),
) -> None:
    """Check that a backend keeps all that it declares, against the reference in float64.

    Clauses, in this order: its record; values and gradients; state in and out; masked frames;
    resets; refusal of what is not declared; dtypes, layouts and inputs; autocast; compilation, if
    it declares that; global state. Takes a few seconds. Resets the caches of `torch.compile`.

    Args:
        backend: Registered name or a record.
        device: Device to run on; `None` for the CPU, or the first one declared if that is not.
        tolerance: Largest error relative to the largest entry of each output and gradient; `None`
            for 1e-9 in float64 and 2e-5 in float32.
        lengths: Numbers of frames to try. Choose those around your block size.

    Raises:
        AssertionError: If a clause is not kept; the message names the backend and the clause.
        UnknownComponentError: If there is no backend of this name.
        MissingDependencyError: If it needs a library that is not installed.

    Examples:
        >>> check_scan_backend("reference", lengths=(1, 4))
    """
    record = resolve_scan_backend(backend)
    name = getattr(record, "name", backend)
    with _clause(name, "the record"):
        _check_record(record)
    if device is None:
        device = "cpu" if "cpu" in record.devices else min(record.devices)
    check = _Check(record, device, tolerance, tuple(lengths))
    clauses: tuple[tuple[str, Callable[[], None]], ...] = (
        ("values and gradients", check.values_and_gradients),
        ("state in and out", check.state),
        ("masked frames", check.mask),
        ("resets", check.reset),
        ("refusal of what is not declared", check.refusals),
        ("dtypes, layouts and inputs", check.dtypes_and_layouts),
        ("autocast", check.autocast),
        ("compilation", check.compilation),
        ("global state", check.global_state),
    )
    for clause, run in clauses:
        with _clause(name, clause):
            run()


@contextlib.contextmanager
def _clause(name: object, clause: str) -> Iterator[None]:
    """Turn whatever goes wrong into a sentence that says where."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"scan backend {name!r}, clause {clause!r}: {error}") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise AssertionError(
            f"scan backend {name!r}, clause {clause!r}: it raised {type(error).__name__}: {error}"
        ) from error


def _demand(kept: bool, sentence: str) -> None:
    # Not an `assert`, which `python -O` removes.
    if not kept:
        raise AssertionError(sentence)


def _check_record(record: ScanBackend) -> None:
    _demand(bool(record.name), "it has no name.")
    known: dict[str, set[Any]] = {
        "discretizations": {"zoh", "euler"},
        "dtypes": {torch.float32, torch.float64},
    }
    for field, allowed in known.items():
        declared = getattr(record, field)
        allowed_names = sorted(str(value) for value in allowed)
        _demand(
            isinstance(declared, frozenset) and bool(declared) and declared <= allowed,
            f"`{field}` must be a frozenset of {allowed_names}, not empty; got {declared!r}.",
        )
    _demand(bool(record.devices), "`devices` must not be empty.")


@dataclass(frozen=True)
class _Check:
    record: ScanBackend
    device: str
    tolerance: float | None
    lengths: tuple[int, ...]

    # -------------------------------------------------------------- tools
    @property
    def dtype(self) -> torch.dtype:
        """The most precise dtype that is declared."""
        return torch.float64 if torch.float64 in self.record.dtypes else torch.float32

    @property
    def has_state(self) -> bool:
        return self.record.takes_state

    def inputs(self, t: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """`x, delta, A, B, C, h`; channels and states differ, steps span decades."""
        generator = torch.Generator().manual_seed(t)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        delta = torch.nn.functional.softplus(2 * normal(BATCH, t, WIDTH) - 2)
        A = -torch.arange(1, STATE + 1) * torch.exp(0.3 * normal(WIDTH, STATE))
        B, C = normal(BATCH, t, STATE), normal(BATCH, t, STATE)
        tensors = (2 + normal(BATCH, t, WIDTH), delta, A, B, C, normal(BATCH, WIDTH, STATE))
        return [tensor.to(self.device, dtype or self.dtype) for tensor in tensors]

    def run(
        self,
        inputs: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        discretization: str | None = None,
        backend: str | ScanBackend | None = None,
    ) -> list[Tensor]:
        """`y`, and the final state if that is declared."""
        scan = functools.partial(
            selective_scan,
            *inputs[:5],
            mask=mask,
            reset=reset,
            discretization=discretization or min(self.record.discretizations),
            backend=backend or self.record,
        )
        if self.has_state:
            return list(scan(initial_state=inputs[5], return_state=True))
        return [scan()]

    def with_gradients(
        self, inputs: Sequence[Tensor], *, backend: str | ScanBackend | None = None, **options: str
    ) -> dict[str, Tensor]:
        """Outputs, and the gradients of a sum that weighs each entry differently."""
        leaves = [v.detach().clone().requires_grad_() for v in inputs]
        outputs = self.run(leaves, backend=backend, discretization=options["discretization"])
        total = sum((_weights(out) * out).sum() for out in outputs)
        used = leaves if self.has_state else leaves[:5]
        grads = torch.autograd.grad(total, used)  # type: ignore[arg-type]
        names = ("y", "the final state") if self.has_state else ("y",)
        letters = ("x", "delta", "A", "B", "C", "initial_state")
        return {
            **dict(zip(names, outputs, strict=True)),
            **{f"the gradient of `{k}`": v for k, v in zip(letters, grads, strict=False)},
        }

    def close(self, one: Tensor, other: Tensor, sentence: str, dtype: torch.dtype) -> None:
        """Demand closeness relative to the largest entry of `other`."""
        allowed = self.tolerance or TOLERANCE[dtype]
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        _demand(one.shape == other.shape, f"{sentence}: shape {tuple(one.shape)}.")
        if not other.numel():
            return
        error = (one - other).abs().max().item() / max(other.abs().max().item(), 1e-30)
        _demand(error <= allowed, f"{sentence}: relative error {error:.2g}, allowed {allowed:.2g}.")

    # -------------------------------------------------------------- clauses
    def values_and_gradients(self) -> None:
        names = sorted(self.record.discretizations)
        for dtype, t in itertools.product(sorted(self.record.dtypes, key=str), self.lengths):
            inputs = self.inputs(t, dtype)
            oracle = [v.double().cpu() for v in inputs]
            for name in names:
                got = self.with_gradients(inputs, discretization=name)
                exact = self.with_gradients(oracle, discretization=name, backend="reference")
                for part, wanted in exact.items():
                    where = f"{part} differs from the reference ({name}, {t} frames, {dtype})"
                    self.close(got[part], wanted, where, dtype)
        # A constant input of one for a time of 20 steps: exact for any step, known in closed form.
        if "zoh" in names:
            one = torch.ones(BATCH, 20, WIDTH, dtype=self.dtype, device=self.device)
            A, B = -one[0, :WIDTH, :1], one[..., :1]
            y = selective_scan(one, 0.5 * one, A, B, B, backend=self.record)
            clock = 0.5 * torch.arange(1, 21, dtype=torch.float64)
            solution = -torch.expm1(-clock)[None, :, None].expand(BATCH, 20, WIDTH)
            self.close(y, solution, "zero-order hold is not exact for constant input", self.dtype)

    def state(self) -> None:
        if not self.has_state:
            return
        x, delta, A, B, C, h = self.inputs(9)
        frozen = self.run([x, torch.zeros_like(delta), A, B, C, h])[1]
        _demand(torch.equal(frozen, h), "steps of 0 must return the initial state to the bit.")
        empty = self.run([x[:, :0], delta[:, :0], A, B[:, :0], C[:, :0], h])
        _demand(
            tuple(empty[0].shape) == (BATCH, 0, WIDTH) and torch.equal(empty[1], h),
            "no frames must give an empty output and the initial state.",
        )
        whole, final = self.run([x, delta, A, B, C, h])
        pieces = []
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            y, h = self.run([x[:, part], delta[:, part], A, B[:, part], C[:, part], h])
            pieces.append(y)
        said = "pieces with a carried state are not the whole clip"
        self.close(torch.cat(pieces, 1), whole, said, self.dtype)
        self.close(h, final, said, self.dtype)

    def mask(self) -> None:
        frames = [1, 4, 5, 8]
        inputs = self.inputs(9)
        mask = torch.zeros(BATCH, 9, dtype=torch.bool, device=self.device)
        mask[:, frames] = True
        alone = [v[:, frames] if i in (0, 1, 3, 4) else v for i, v in enumerate(inputs)]
        wanted = self.run(alone)
        for i in (0, 1, 3, 4):
            inputs[i] = inputs[i].masked_fill(~mask.unsqueeze(-1), math.nan)
        leaves = [v.requires_grad_() for v in inputs]
        got = self.run(leaves, mask=mask)
        said = "a clip with masked frames, NaN in them, is not the clip without them"
        self.close(got[0][:, frames], wanted[0], said, self.dtype)
        for one, other in zip(got[1:], wanted[1:], strict=True):
            self.close(one, other, said, self.dtype)
        _demand(not got[0][~mask].any(), "the output of a masked frame must be 0.")
        grads = torch.autograd.grad(sum(out.sum() for out in got), leaves[:5])  # type: ignore[arg-type]
        _demand(
            all(bool(grad.isfinite().all()) for grad in grads),
            "NaN in a masked frame reaches a gradient.",
        )

    def reset(self) -> None:
        if not self.record.takes_reset:
            return
        for name in sorted(self.record.discretizations):
            x, delta, A, B, C, h = self.inputs(9)
            alone = [x[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], torch.zeros_like(h)]
            wanted = self.run(alone, discretization=name)
            x[:, :4] = math.nan
            reset = torch.zeros(BATCH, 9, dtype=torch.bool, device=self.device)
            reset[:, 4] = True
            got = self.run([x, delta, A, B, C, h], reset=reset, discretization=name)
            said = f"a clip packed behind one of NaN is not the clip alone ({name})"
            self.close(got[0][:, 4:], wanted[0], said, self.dtype)
            for one, other in zip(got[1:], wanted[1:], strict=True):
                self.close(one, other, said, self.dtype)

    def refusals(self) -> None:
        inputs = self.inputs(3)
        reset = torch.zeros(BATCH, 3, dtype=torch.bool, device=self.device)
        asked: list[tuple[str, Callable[[], object]]] = []

        def ask(what: str, tensors: Sequence[Tensor] = inputs, **options: object) -> None:
            call = {"discretization": min(self.record.discretizations), "backend": self.record}
            asked.append((what, lambda: selective_scan(*tensors[:5], **{**call, **options})))  # type: ignore[call-overload]

        for name in ({"zoh", "euler"} | {"bilinear"}) - self.record.discretizations:
            ask(f"the discretisation {name!r}", discretization=name)
        for dtype in {torch.float32, torch.float64} - self.record.dtypes:
            if dtype == torch.float64:
                ask(f"{dtype}", [v.to(dtype) for v in inputs])
        if "meta" not in self.record.devices:
            ask("the device 'meta'", [v.to("meta") for v in inputs])
        if not self.has_state:
            ask("a state", return_state=True)
        if not self.record.takes_reset:
            ask("a reset", reset=reset)
        for what, call in asked:
            refused = False
            try:
                call()
            except ValueError:
                refused = True
            _demand(refused, f"{what} is not declared and was not refused.")

    def dtypes_and_layouts(self) -> None:
        inputs = self.inputs(9)
        before = [v.clone() for v in inputs]
        plain = self.run(inputs)
        _demand(
            all(torch.equal(v, w) for v, w in zip(inputs, before, strict=True)),
            "an input was changed in place.",
        )
        for out in plain:
            _demand(
                out.device == inputs[0].device and out.dtype == self.dtype,
                f"outputs must have the device and dtype of the inputs; got {out.device}, "
                f"{out.dtype}.",
            )
        strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs]
        for one, other in zip(self.run(strided), plain, strict=True):
            self.close(one, other, "inputs that are not contiguous change the result", self.dtype)
        if torch.float32 in self.record.dtypes:
            half = [v.bfloat16() for v in inputs]
            results = self.run(half)
            kinds = [out.dtype for out in results]
            _demand(
                kinds == [torch.bfloat16, torch.float32][: len(kinds)],
                f"for bfloat16 inputs `y` must be bfloat16 and the state float32; got {kinds}.",
            )
        # A gradient for one input alone, as a frozen model asks for.
        A = inputs[2].clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.run([*inputs[:2], A, *inputs[3:]])[0].sum(), A)
        _demand(bool(grad.abs().max() > 0), "`A` alone gets no gradient.")

    def autocast(self) -> None:
        kind = torch.device(self.device).type
        inputs = self.inputs(9)
        plain = self.run(inputs)
        with torch.autocast(kind, torch.bfloat16):
            inside = self.run(inputs)
        for one, other in zip(inside, plain, strict=True):
            self.close(one, other, "autocast changes the result", self.dtype)

    def compilation(self) -> None:
        if not self.record.compiles:
            return
        torch.compiler.reset()
        inputs = self.inputs(9)
        wanted = self.with_gradients(inputs, discretization=min(self.record.discretizations))
        leaves = [v.clone().requires_grad_() for v in inputs]

        def scan(*tensors: Tensor) -> list[Tensor]:
            return self.run(tensors)

        compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
        outputs = compiled(*leaves)
        self.close(outputs[0], wanted["y"], "compiled outputs differ", self.dtype)
        total = sum((_weights(out) * out).sum() for out in outputs)
        (grad,) = torch.autograd.grad(total, leaves[1])  # type: ignore[arg-type]
        said = "compiled gradients differ"
        self.close(grad, wanted["the gradient of `delta`"], said, self.dtype)

    def global_state(self) -> None:
        def observe() -> dict[str, object]:
            return {
                "the default dtype": torch.get_default_dtype(),
                "the grad mode": torch.is_grad_enabled(),
                "the number of threads": torch.get_num_threads(),
                "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
                "the random state": torch.get_rng_state().tolist(),
                "autocast": torch.is_autocast_enabled(torch.device(self.device).type),
            }

        for grad_enabled in (True, False):
            with torch.set_grad_enabled(grad_enabled):
                before = observe()
                outputs = self.run([v.requires_grad_() for v in self.inputs(5)])
                after = observe()
                for what, value in before.items():
                    _demand(after[what] == value, f"{what} was changed.")
                _demand(
                    all(out.requires_grad == grad_enabled for out in outputs),
                    "outputs must require a gradient if and only if the grad mode is on.",
                )


def _weights(tensor: Tensor) -> Tensor:
    """Numbers that differ from entry to entry, so that no permutation goes unnoticed."""
    count = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return torch.cos(0.7 * count).to(tensor.device, tensor.dtype)
