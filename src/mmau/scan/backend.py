"""What an implementation of the selective scan must offer, and the table of those there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmau.registry import Registry


class ScanFunction(Protocol):
    """The call that a backend answers, after all checks.

    All tensors have one dtype and lie on one device. Masked frames arrive with `delta`, `x`, `B`
    and `C` equal to zero: a backend needs no notion of masks, it only has to leave the state alone
    where `delta` is 0. The state may have any finite value.
    """

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
    r"""A scan that also does what comes right before it, without writing that to memory.

    The scan of $x \odot \sigma(\text{gate logits})$ with $\Delta = \text{softplus}(\text{delta
    logits} + \text{delta bias})$. A gate logit of `inf` opens the gate, a step logit of `-inf`
    freezes the state; the tensors may have different floating dtypes.
    """

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

    `selective_scan` refuses, in a sentence, whatever is not declared here; nothing falls back.
    `mmau.testing.check_scan_backend` checks that what is declared is true.

    Args:
        name: How errors and `repr` call it.
        run: The implementation.
        discretizations: Of `"zoh"` and `"euler"`, those it computes.
        devices: Device types it runs on.
        dtypes: Dtypes it computes in; half precision is cast to float32 before.
        takes_state: Whether it takes an initial state and returns a differentiable final one.
        takes_reset: Whether it can drop the state at given frames.
        compiles: Whether `torch.compile(fullgraph=True)` can trace it.
        run_gated: The same with gate and softplus in one kernel, which `AGSSM` then calls, or
            `None`.

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
        """Refuse a discretisation that this backend does not declare.

        Args:
            discretization: Asked discretisation.

        Raises:
            ValueError: If it is not offered; says what is.
        """
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
        """Refuse what this backend does not declare.

        Args:
            discretization: Asked discretisation.
            device: Device type of the tensors.
            dtype: Dtype of the computation.
            state: Whether an initial or a final state is asked for.
            reset: Whether frames with a reset are given.

        Raises:
            ValueError: If any of them is not offered; says what is.
        """
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
