"""The contract of a scan backend, as one call for the tests of whoever writes one."""

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
    bitwise: bool = False,
) -> None:
    """Check that a backend keeps all that it declares, against the reference in float64.

    Clauses, in this order: its record; values and gradients; tiny and huge steps; causality; state
    in and out; masked frames; resets; refusal of what is not declared; dtypes, layouts and inputs;
    autocast; compilation, if it declares that; global state. Takes some seconds. Resets the caches
    of `torch.compile`.

    Args:
        backend: Registered name or a record.
        device: Device to run on; `None` for the CPU, or the first one declared if that is not.
        tolerance: Largest error relative to the largest entry of each output and gradient; `None`
            for 1e-9 in float64 and 2e-5 in float32.
        lengths: Numbers of frames to try. Choose those around your block size.
        bitwise: Whether two ways to compute the same outputs (in chunks, without masked frames,
            from another layout, under autocast, compiled) must agree to the bit, as those of the
            backends here do on the CPU.

    Raises:
        AssertionError: If a clause is not kept; the message names the backend and the clause.
        UnknownComponentError: If there is no backend of this name.
        MissingDependencyError: If it needs a library that is not installed.

    Examples:
        >>> check_scan_backend("reference", lengths=(1, 4), bitwise=True)
    """
    record = resolve_scan_backend(backend)
    name = getattr(record, "name", backend)
    with _clause(name, "the record"):
        _check_record(record)
    if device is None:
        device = "cpu" if "cpu" in record.devices else min(record.devices)
    check = _Check(record, device, tolerance, tuple(lengths), bitwise)
    clauses: dict[str, Callable[[], None]] = {
        "values and gradients": check.values_and_gradients,
        "tiny and huge steps": check.steps,
        "causality": check.causality,
        "state in and out": check.state,
        "masked frames": check.mask,
        "resets": check.reset,
        "refusal of what is not declared": check.refusals,
        "dtypes, layouts and inputs": check.dtypes_and_layouts,
        "autocast": check.autocast,
        "compilation": check.compilation,
        "global state": check.global_state,
    }
    for clause, run in clauses.items():
        with _clause(name, clause):
            run()


@contextlib.contextmanager
def _clause(name: object, clause: str) -> Iterator[None]:
    """Say in whatever goes wrong where it did."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"scan backend {name!r}, clause {clause!r}: {error}") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise AssertionError(
            f"scan backend {name!r}, clause {clause!r}: it raised {type(error).__name__}: {error}"
        ) from error


def _demand(kept: bool, message: str) -> None:
    # Not an `assert`, which `python -O` removes.
    if not kept:
        raise AssertionError(message)


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


def _weights(tensor: Tensor) -> Tensor:
    """Numbers that differ from entry to entry, so that no permutation goes unnoticed."""
    count = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return torch.cos(0.7 * count).to(tensor.device, tensor.dtype)


def _frames(inputs: Sequence[Tensor], index: object) -> list[Tensor]:
    """Take some frames of `x`, `delta`, `B` and `C`; `A` and the state have none."""
    x, delta, A, B, C, h = inputs
    return [x[:, index], delta[:, index], A, B[:, index], C[:, index], h]  # type: ignore[index]


@dataclass(frozen=True)
class _Check:
    record: ScanBackend
    device: str
    tolerance: float | None
    lengths: tuple[int, ...]
    bitwise: bool

    # -------------------------------------------------------------- tools
    @property
    def dtype(self) -> torch.dtype:
        """The most precise dtype that is declared."""
        return torch.float64 if torch.float64 in self.record.dtypes else torch.float32

    @property
    def cases(self) -> Iterator[tuple[torch.dtype, str]]:
        """Each declared dtype, the most precise one first, with each declared discretisation."""
        dtypes = sorted(self.record.dtypes, key=str, reverse=True)
        return itertools.product(dtypes, sorted(self.record.discretizations))

    def inputs(self, t: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """`x, delta, A, B, C, h`; channels and states differ, steps span decades, some are 0."""
        generator = torch.Generator().manual_seed(t)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        delta = torch.nn.functional.softplus(2 * normal(BATCH, t, WIDTH) - 2)
        delta[:, 5::8] *= 1e-6
        delta[:, 6::8] = 0
        A = -torch.arange(1, STATE + 1) * torch.exp(0.3 * normal(WIDTH, STATE))
        B, C = normal(BATCH, t, STATE), normal(BATCH, t, STATE)
        tensors = (2 + normal(BATCH, t, WIDTH), delta, A, B, C, normal(BATCH, WIDTH, STATE))
        return [tensor.to(self.device, dtype or self.dtype) for tensor in tensors]

    def some_resets(self, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(t)
        return (torch.rand(BATCH, t, generator=generator) < 0.3).to(self.device)

    def run(
        self,
        inputs: Sequence[Tensor],
        *,
        state: bool = True,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        discretization: str | None = None,
        backend: str | ScanBackend | None = None,
    ) -> list[Tensor]:
        """`y`, and the final state if that is declared; `state` is whether to give an initial."""
        scan = functools.partial(
            selective_scan,
            *inputs[:5],
            mask=mask,
            reset=reset,
            discretization=discretization or min(self.record.discretizations),
            backend=backend or self.record,
        )
        if self.record.takes_state:
            return list(scan(initial_state=inputs[5] if state else None, return_state=True))
        return [scan()]

    def gradients(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of a sum that weighs each entry differently; zeros for what is not used."""
        total = sum((_weights(out) * out).sum() for out in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]

    def with_gradients(self, inputs: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
        """Outputs and their gradients, by what an error message calls them."""
        leaves = [v.detach().clone().requires_grad_() for v in inputs]
        outputs = self.run(leaves, **options)
        used = leaves if self.record.takes_state else leaves[:5]
        names = ("x", "delta", "A", "B", "C", "initial_state")
        grads = zip(names, self.gradients(outputs, used), strict=False)
        return {
            **dict(zip(("`y`", "the final state"), outputs, strict=False)),
            **{f"the gradient of `{name}`": grad for name, grad in grads},
        }

    def agrees(self, inputs: Sequence[Tensor], where: str, **options: Any) -> None:
        """Demand the values and gradients of the reference in float64."""
        dtype = inputs[0].dtype
        got = self.with_gradients(inputs, **options)
        if (reset := options.get("reset")) is not None:
            options["reset"] = reset.cpu()
        oracle = [v.double().cpu() for v in inputs]
        exact = self.with_gradients(oracle, **options, backend="reference")
        for part, wanted in exact.items():
            self.close(got[part], wanted, f"{part} differs from the reference ({where})", dtype)

    def close(self, one: Tensor, other: Tensor, message: str, dtype: torch.dtype) -> None:
        """Demand closeness relative to the largest entry of `other`."""
        allowed = self.tolerance or TOLERANCE[dtype]
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        _demand(one.shape == other.shape, f"{message}: shape {tuple(one.shape)}.")
        if not other.numel():
            return
        error = (one - other).abs().max().item() / max(other.abs().max().item(), 1e-30)
        _demand(error <= allowed, f"{message}: relative error {error:.2g}, allowed {allowed:.2g}.")

    def same(
        self, some: Sequence[Tensor], others: Sequence[Tensor], message: str, dtype: torch.dtype
    ) -> None:
        """Demand equal outputs, to the bit if that is asked for."""
        for one, other in zip(some, others, strict=True):
            if self.bitwise:
                _demand(torch.equal(one, other), f"{message}, to the bit.")
            self.close(one, other, message, dtype)

    # -------------------------------------------------------------- clauses
    def values_and_gradients(self) -> None:
        for (dtype, name), t in itertools.product(self.cases, self.lengths):
            inputs, where = self.inputs(t, dtype), f"{name}, {t} frames, {dtype}"
            self.agrees(inputs, where, discretization=name)
            if self.record.takes_state:
                without = f"{where}, no initial state"
                self.agrees(inputs, without, discretization=name, state=False)
            if self.record.takes_reset:
                with_resets, reset = f"{where}, resets", self.some_resets(t)
                self.agrees(inputs, with_resets, discretization=name, reset=reset)
        # A constant input of one for a time of 20 steps: exact for any step, known in closed form.
        if "zoh" in self.record.discretizations:
            one = torch.ones(BATCH, 20, WIDTH, dtype=self.dtype, device=self.device)
            A, B = -one[0, :WIDTH, :1], one[..., :1]
            y = selective_scan(one, 0.5 * one, A, B, B, backend=self.record)
            clock = 0.5 * torch.arange(1, 21, dtype=torch.float64)
            solution = -torch.expm1(-clock)[None, :, None].expand(BATCH, 20, WIDTH)
            self.close(y, solution, "zero-order hold is not exact for constant input", self.dtype)

    def steps(self) -> None:
        """Outputs in each dtype; gradients, which underflow in float32, in float64."""
        for dtype, name in self.cases:
            inputs = self.inputs(64, dtype)
            order = torch.randperm(inputs[1].numel(), generator=torch.Generator().manual_seed(0))
            spread = 1e-6 * 2e7 ** (order.double() / len(order)).view_as(inputs[1])
            for step in (1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0, 20.0, None):
                where = f"steps of {step or '1e-6 to 20'}, {name}, {dtype}"
                inputs[1] = (torch.full_like(spread, step) if step else spread).to(inputs[0])
                y = self.run(inputs, state=False, discretization=name)[0]
                oracle = [v.double().cpu() for v in inputs]
                exact = self.run(oracle, state=False, discretization=name, backend="reference")[0]
                self.close(y, exact, f"`y` differs from the reference ({where})", dtype)
            if dtype == torch.float64:
                reset = self.some_resets(64) if self.record.takes_reset else None
                for step in (1e-4, 0.1, 8.0):
                    inputs[1] = torch.full_like(inputs[1], step)
                    where = f"steps of {step}, {name}, {dtype}"
                    self.agrees(inputs, where, discretization=name, reset=reset, state=False)

    def causality(self) -> None:
        for dtype, name in self.cases:
            inputs = self.inputs(11, dtype)
            late = [v.clone() for v in inputs]
            for i in (0, 1, 3, 4):
                late[i][:, 6:] += 1.0
            one, other = (self.run(v, discretization=name)[0] for v in (inputs, late))
            self.same([one[:, :6]], [other[:, :6]], "a later frame changes an earlier one", dtype)
            changed = not torch.isclose(one[:, 6:], other[:, 6:]).any()
            _demand(changed, "a change of a frame does not reach all that follow.")

    def state(self) -> None:
        if not self.record.takes_state:
            return
        for dtype, name in self.cases:
            inputs = self.inputs(11, dtype)
            x, delta, A, B, C, h = inputs
            run = functools.partial(self.run, discretization=name)
            y, frozen = run([x, torch.zeros_like(delta), A, B, C, h])
            _demand(torch.equal(frozen, h), "steps of 0 must return the initial state to the bit.")
            read = torch.einsum("bdn,btn->btd", h, C)
            self.close(y, read, "steps of 0 must read the initial state", dtype)
            leaf = h.clone().requires_grad_()
            empty, final = run(_frames([x, delta, A, B, C, leaf], slice(0, 0)))
            _demand(
                tuple(empty.shape) == (BATCH, 0, WIDTH) and torch.equal(final, h),
                "no frames must give an empty output and the initial state.",
            )
            _demand(
                torch.equal(torch.autograd.grad(final.sum(), leaf)[0], torch.ones_like(h)),
                "no frames must hand the gradient of the state through.",
            )
            zeros = run(_frames(inputs, slice(0, 0)), state=False)[1]
            _demand(not zeros.any(), "no frames and no initial state must give a state of zeros.")
            whole = run(inputs)
            for cuts in ([4], [1, 9], range(1, 11)):
                carried, outputs = h, []
                for start, stop in itertools.pairwise([0, *cuts, 11]):
                    part = _frames([x, delta, A, B, C, carried], slice(start, stop))
                    y, carried = run(part)
                    outputs.append(y)
                message = "chunks with a carried state are not the whole clip"
                self.same([torch.cat(outputs, 1), carried], whole, message, dtype)
            for use, what in enumerate(("output", "final state")):
                leaves = [v.clone().requires_grad_() for v in inputs]
                grads = self.gradients([run(leaves)[use]], leaves)
                exact = [v.detach().double().cpu().requires_grad_() for v in leaves]
                wanted = self.gradients([run(exact, backend="reference")[use]], exact)
                for one, other in zip(grads, wanted, strict=True):
                    self.close(one, other, f"gradients of the {what} alone are wrong", dtype)

    def mask(self) -> None:
        for (dtype, name), frames in itertools.product(
            self.cases, ([0, 1, 2, 3], [5, 6, 7], [7, 8, 9, 10], [2, 5, 10])
        ):
            mask = torch.zeros(BATCH, 11, dtype=torch.bool, device=self.device)
            mask[:, frames] = True
            leaves = [v.requires_grad_() for v in self.inputs(11, dtype)]
            used = leaves if self.record.takes_state else leaves[:5]
            wanted = self.run(_frames(leaves, frames), discretization=name)
            total = sum((out.square() + out).sum() for out in wanted)
            without = torch.autograd.grad(total, used)  # type: ignore[arg-type]
            for i in (0, 1, 3, 4):
                spoilt = leaves[i].detach().masked_fill(~mask.unsqueeze(-1), math.nan)
                leaves[i] = spoilt.requires_grad_()
            used = leaves if self.record.takes_state else leaves[:5]
            got = self.run(leaves, mask=mask, discretization=name)
            message = "a clip with masked frames, NaN in them, is not the clip without them"
            self.same([got[0][:, frames], *got[1:]], wanted, message, dtype)
            _demand(not got[0][~mask].any(), "the output of a masked frame must be 0.")
            total = sum((out.square() + out).sum() for out in got)
            grads = torch.autograd.grad(total, used)  # type: ignore[arg-type]
            for grad, other in zip(grads, without, strict=True):
                message = "NaN in a masked frame reaches a gradient."
                _demand(bool(grad.isfinite().all()), message)
                message = "gradients are not those of the clip without masked frames"
                self.close(grad, other, message, dtype)

    def reset(self) -> None:
        if not self.record.takes_reset:
            return
        for dtype, name in self.cases:
            inputs = self.inputs(11, dtype)
            clean = inputs[0].clone()
            wanted = self.run(_frames(inputs, slice(4, None)), state=False, discretization=name)
            inputs[0][:, :4] = math.nan
            reset = torch.zeros(BATCH, 11, dtype=torch.bool, device=self.device)
            reset[:, 4] = True
            got = self.run(inputs, reset=reset, discretization=name)
            message = f"a clip packed behind one of NaN is not the clip alone ({name})"
            self.same([got[0][:, 4:], *got[1:]], wanted, message, dtype)
            if self.record.takes_state:
                h = inputs[5].requires_grad_()
                y = self.run([clean, *inputs[1:5], h], reset=reset, discretization=name)[0]
                (grad,) = torch.autograd.grad(y[:, 4:].sum(), h)
                _demand(not grad.any(), "a gradient passes a reset.")

    def refusals(self) -> None:
        inputs = self.inputs(3)
        asked: dict[str, Callable[[], object]] = {}

        def ask(what: str, tensors: Sequence[Tensor] = inputs, **options: object) -> None:
            call = {"discretization": min(self.record.discretizations), "backend": self.record}
            asked[what] = lambda: selective_scan(*tensors[:5], **{**call, **options})  # type: ignore[call-overload]

        for name in {"zoh", "euler", "bilinear"} - self.record.discretizations:
            ask(f"the discretisation {name!r}", discretization=name)
        if torch.float64 not in self.record.dtypes:
            ask("torch.float64", [v.to(torch.float64) for v in inputs])
        if "meta" not in self.record.devices:
            ask("the device 'meta'", [v.to("meta") for v in inputs])
        if not self.record.takes_state:
            ask("a state", return_state=True)
        if not self.record.takes_reset:
            ask("a reset", reset=self.some_resets(3))
        for what, call in asked.items():
            refused = False
            try:
                call()
            except ValueError:
                refused = True
            _demand(refused, f"{what} is not declared and was not refused.")

    def dtypes_and_layouts(self) -> None:
        for dtype in self.record.dtypes:
            inputs = self.inputs(9, dtype)
            before = [v.clone() for v in inputs]
            plain = self.run(inputs)
            _demand(
                all(torch.equal(v, w) for v, w in zip(inputs, before, strict=True)),
                "an input was changed in place.",
            )
            for out in plain:
                _demand(
                    out.device == inputs[0].device and out.dtype == dtype,
                    f"outputs must have the device and dtype of the inputs; got {out.device}, "
                    f"{out.dtype}.",
                )
            strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs]
            message = "inputs that are not contiguous change the result"
            self.same(self.run(strided), plain, message, dtype)
            # A sum hands a backward a gradient that is one number, expanded.
            leaves = [v.requires_grad_() for v in strided[:5]]
            y = self.run([*leaves, inputs[5]])[0]
            expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
            written = torch.autograd.grad((y * torch.ones_like(y)).sum(), leaves)
            message = "a gradient without strides changes the result"
            self.same(expanded, written, message, dtype)
        if torch.float32 in self.record.dtypes:
            half = [v.bfloat16() for v in self.inputs(9)]
            results = self.run(half)
            kinds = [out.dtype for out in results]
            _demand(
                kinds == [torch.bfloat16, torch.float32][: len(kinds)],
                f"for bfloat16 inputs `y` must be bfloat16 and the state float32; got {kinds}.",
            )
            y, *state = self.run([v.float() for v in half])
            message = "bfloat16 inputs must be rounded at the end only"
            self.same(results, [y.bfloat16(), *state], message, torch.float32)
        # A gradient for one input alone, as a frozen model asks for.
        inputs = self.inputs(9)
        A = inputs[2].clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.run([*inputs[:2], A, *inputs[3:]])[0].sum(), A)
        _demand(bool(grad.abs().max() > 0), "`A` alone gets no gradient.")

    def autocast(self) -> None:
        kind = torch.device(self.device).type
        for dtype in self.record.dtypes:
            inputs = self.inputs(9, dtype)
            plain = self.with_gradients(inputs)
            with torch.autocast(kind, torch.bfloat16):
                inside = self.with_gradients(inputs)
            for part, wanted in plain.items():
                self.same([inside[part]], [wanted], f"autocast changes {part}", dtype)

    def compilation(self) -> None:
        if not self.record.compiles:
            return
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *tensors: self.run(tensors), fullgraph=True, backend="aot_eager"
        )
        leaves = [v.requires_grad_() for v in self.inputs(4)]
        used = leaves if self.record.takes_state else leaves[:5]
        plain, outputs = self.run(leaves), compiled(*leaves)
        self.same(outputs, plain, "compiled outputs differ", self.dtype)
        wanted = self.gradients(plain, used)
        self.same(self.gradients(outputs, used), wanted, "compiled gradients differ", self.dtype)

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
