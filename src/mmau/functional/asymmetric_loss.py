"""Asymmetric loss for multi-label targets with gaps, and its focal special case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes

PerClass: TypeAlias = float | Sequence[float] | Tensor
"""One number for all Action Units, or one per Action Unit, `(c)`."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""`"mean"` over the labelled entries, `"sum"`, or `"none"` to keep them."""


class Labels(NamedTuple):
    """How the values of a target are read."""

    ignore_index: int | None
    """Value that marks a missing label beside NaN, or `None` if there must be none missing."""
    soft: bool
    """Whether numbers between 0 and 1 are labels."""
    check: bool
    """Whether to look at the values and refuse what is no label."""

    @classmethod
    def of(cls, target: Tensor, ignore_index: int | None, soft: bool, check: bool | None) -> Labels:
        """Decide on `check` where it is left open: where looking costs nothing."""
        if check is None:
            check = target.device.type == "cpu"
        return cls(ignore_index, soft, check and not torch.compiler.is_compiling())

    def given(self, target: Tensor) -> Tensor:
        """Return where there is a label, by one comparison, which is false for NaN."""
        inside = target * (1 - target)
        return inside >= 0 if self.soft else inside == 0

    def unless_given(self, target: Tensor) -> float | Tensor:
        """Return what an entry is that has no label: 0, or NaN if that is not allowed."""
        if self.check:
            return 0.0
        if self.ignore_index is None:
            return math.nan
        # False for NaN, which is a mark of a missing label too.
        return torch.where((target - self.ignore_index).abs() > 0, math.nan, 0.0).to(target.dtype)

    def refuse(self, target: Tensor) -> None:
        """Raise if anything is neither a label nor the mark of a missing one."""
        target = target.double()
        refused = ~self.given(target)
        if self.ignore_index is not None:
            refused &= ~((target == self.ignore_index) | torch.isnan(target))
        if not bool(refused.any()):
            return
        examples = torch.unique(target[refused]).tolist()[:3]
        labels = "in [0, 1]" if self.soft else "0 or 1"
        missing = "" if self.ignore_index is None else f", or {self.ignore_index} or NaN for none"
        between = not self.soft and any(0 < value < 1 for value in examples)
        raise ValueError(
            f"`target` must be {labels}{missing}; got {int(refused.sum())} other values, such as "
            f"{', '.join(f'{value:g}' for value in examples)}."
            f"{' Labels between 0 and 1 need `soft_labels=True`.' if between else ''}"
        )


def to_compute_dtype(logits: Tensor) -> Tensor:
    """Return float64 as it is and everything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_floating(logits: Tensor) -> None:
    """Refuse integer logits."""
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating point; got {logits.dtype}.")


def check_pair(logits: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Check all that can be said of logits and target without looking at their values."""
    check_shapes(logits=(logits, "... c"), target=(target, "... c"))
    check_floating(logits)
    if logits.shape != target.shape:
        raise ValueError(
            f"`logits` and `target` must have the same shape (..., c); got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}."
        )
    if ignore_index in (0, 1):
        raise ValueError(f"`ignore_index` must not be a label, 0 or 1; got {ignore_index}.")


def check_reduction(reduction: Reduction, normalizer: float | Tensor | None) -> None:
    """Check how the entries are put together."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'`normalizer` is for reduction="mean"; got reduction={reduction!r}.')
    if not isinstance(normalizer, Tensor):
        check_range("normalizer", normalizer, 0, open_high=True)
    elif normalizer.numel() != 1:
        raise ValueError(f"`normalizer` must be one number; got shape {tuple(normalizer.shape)}.")


def per_class(
    name: str,
    value: PerClass,
    like: Tensor,
    *,
    high: float | None = None,
    open_low: bool = False,
) -> float | Tensor:
    """Check an option that is one number or one per Action Unit; the low end is 0.

    The values of a tensor on an accelerator are taken as they are, since looking means waiting.
    """
    if isinstance(value, (int, float)):
        check_range(name, value, 0, high, open_low=open_low, open_high=True)
        return float(value)
    values = torch.as_tensor(value)
    num_classes = like.shape[-1]
    if values.shape != (num_classes,):
        raise ValueError(
            f"`{name}` must be one number or one per Action Unit, ({num_classes},); "
            f"got shape {tuple(values.shape)}."
        )
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        for number in values.tolist():
            check_range(name, number, 0, high, open_low=open_low, open_high=True)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.detach().to(like.device, dtype)


Number = float | Tensor
"""One number, or one per Action Unit, `(c)`."""


class Terms(NamedTuple):
    """The options of the loss, checked; those of one side are named after it."""

    gamma_pos: Number = 1.0
    gamma_neg: Number = 4.0
    margin: Number = 0.05
    weight_pos: Number = 1.0
    weight_neg: Number = 1.0
    detach_focus: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether both sides have one exponent; two tensors are not looked into."""
        return self.gamma_pos is self.gamma_neg or _same_number(self.gamma_pos, self.gamma_neg)

    @property
    def has_edge(self) -> bool:
        """Whether a negative could be pulled inside the margin, since x^0 does not vanish at 0."""
        if not isinstance(self.margin, Tensor) and self.margin == 0:
            return False
        return isinstance(self.gamma_neg, Tensor) or self.gamma_neg == 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """Return the same with every option that is one per Action Unit changed."""

        def changed(value: Number) -> Number:
            return change(value) if isinstance(value, Tensor) else value

        return self._replace(
            gamma_pos=changed(self.gamma_pos),
            gamma_neg=changed(self.gamma_neg),
            margin=changed(self.margin),
            weight_pos=changed(self.weight_pos),
            weight_neg=changed(self.weight_neg),
        )

    def weighted(self, of_positive: Number, of_negative: Number) -> Terms:
        """Return the same with both sides weighted once more."""
        return self._replace(
            weight_pos=self.weight_pos * of_positive, weight_neg=self.weight_neg * of_negative
        )


def checked_terms(
    like: Tensor,
    *,
    gamma: PerClass | None = None,
    gamma_pos: PerClass = 0.0,
    gamma_neg: PerClass = 0.0,
    margin: PerClass = 0.0,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Terms:
    """Check the options against the last axis of `like`; `gamma` stands for both exponents."""
    if gamma is not None:
        both = per_class("gamma", gamma, like)
        terms = Terms(both, both, 0.0, detach_focus=detach_focus)
    else:
        terms = Terms(
            per_class("gamma_pos", gamma_pos, like),
            per_class("gamma_neg", gamma_neg, like),
            per_class("margin", margin, like, high=1),
            detach_focus=detach_focus,
        )
    if pos_weight is not None:
        terms = terms.weighted(per_class("pos_weight", pos_weight, like, open_low=True), 1.0)
    if class_weight is not None:
        weight = per_class("class_weight", class_weight, like)
        terms = terms.weighted(weight, weight)
    return terms


def _same_number(first: Number, second: Number) -> bool:
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _sided(y: Tensor, of_positive: Number, of_negative: Number) -> Number:
    """Choose by label, 1 or 0, between two options; by arithmetic, which compiles to less."""
    if _same_number(of_positive, of_negative):
        return of_positive
    return of_positive * y + of_negative * (1 - y)


def _power(base: Tensor, exponent: Number) -> Tensor:
    """Base to a non-negative exponent; pow with a free exponent is several times slower."""
    if isinstance(exponent, Tensor):
        return base.pow(exponent)
    if exponent == 4:
        return base.square().square()
    return base if exponent == 1 else base.pow(exponent)


def entries_and_slope(x: Tensor, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the logit, entry by entry; the letters are those of the module.

    The label `y` is 1 or 0, in the dtype of `x`.
    """
    limits = torch.finfo(x.dtype)
    sign = 1 - 2 * y
    # An infinite logit acts as the largest finite one: k * log(k) stays 0 instead of 0 * inf.
    z = (x * sign).clamp(max=limits.max)
    # Both sigmoids from one exponential, without cancellation.
    small = torch.exp(-z.abs())
    large = 1 / (1 + small)
    small = small * large
    e, k = torch.where(z < 0, small, large), torch.where(z < 0, large, small)
    m = terms.margin * (1 - y)
    e_m = F.relu(e - m)
    # Just below 1 the quotient rho is -1 to the last digit; at 1 it would be 0 / 0.
    k_above_0 = k.clamp(min=limits.tiny)
    u = (k_above_0 + m).clamp(max=1 - limits.eps / 2)
    # Where sigmoid(-z) underflows its logarithm is still -z.
    rho = torch.where(u <= limits.tiny, -z, torch.log(u)) / (1 - u)
    focus = _power(e_m, terms.gamma_pos)
    if not terms.symmetric:
        focus = torch.where(y > 0.5, focus, _power(e_m, terms.gamma_neg))
    focus = focus * _sided(y, terms.weight_pos, terms.weight_neg)
    pull = k_above_0 / u
    if not terms.detach_focus:
        pull = pull - _sided(y, terms.gamma_pos, terms.gamma_neg) * (rho * k)
    slope = e * focus * pull * sign
    if terms.has_edge:
        # `<=` rather than `>`: a NaN logit must stay visible in the gradient.
        slope = torch.where(e_m <= 0, 0.0, slope)
    return -focus * e_m * rho, slope


def differentiable_entries(x: Tensor, y: Tensor, terms: Terms) -> Tensor:
    """Loss, entry by entry, in steps that autograd may go through as often as it likes."""
    limits = torch.finfo(x.dtype)
    z = (x * (1 - 2 * y)).clamp(max=limits.max)
    m = terms.margin * (1 - y)
    # The derivative of a sigmoid near 1 would lose its digits; that of its logarithm keeps them.
    log_e, log_k = F.logsigmoid(z), F.logsigmoid(-z)
    e, k = log_e.exp(), log_k.exp()
    outside = e <= m
    # Replaced before the power, not after it: 0 * inf in the derivative would be NaN.
    e_m = torch.where(outside, 1.0, e - m)
    focus = torch.where(y > 0.5, _power(e_m, terms.gamma_pos), _power(e_m, terms.gamma_neg))
    if terms.detach_focus:
        focus = focus.detach()
    u = torch.where(m > 0, (k + m).clamp(min=limits.tiny, max=1), 1.0)
    log_u = torch.where(m > 0, torch.log(u), log_k)
    entries = -focus * log_u * _sided(y, terms.weight_pos, terms.weight_neg)
    return torch.where(outside, 0.0, entries)


class PieceWorker:
    """Holds the buffers, and works on one piece after the other."""

    def __init__(self, terms: Terms, size: int, dtype: torch.dtype) -> None:
        self.terms = terms
        self.buffers = torch.empty(10, size, dtype=dtype).unbind()
        self.one = torch.ones((), dtype=dtype)
        self.minus_one = -self.one
        limits = torch.finfo(dtype)
        self.smallest = 2 * limits.tiny
        self.largest_below_one = 1 - limits.eps / 2
        self.shifted = isinstance(terms.margin, Tensor) or terms.margin > 0
        weights = (terms.weight_pos, terms.weight_neg)
        self.weighted = any(isinstance(weight, Tensor) or weight != 1 for weight in weights)

    def run(
        self,
        logits: Tensor,
        target: Tensor,
        labels: Labels,
        entries_out: Tensor | None,
        slope_out: Tensor | None,
    ) -> tuple[float, float] | None:
        """Return the sum of the losses and the number of labels, or `None` for the general form."""
        size = len(logits)
        no, given, away, e, k, e_m, u, focus, rho, spare = (b[:size] for b in self.buffers)
        complete = self._read(target, labels, no, given, spare)
        if complete is None:
            return None
        torch.add(self.minus_one, no, alpha=2, out=away)
        torch.mul(logits, away, out=e)
        torch.neg(e, out=k).sigmoid_()
        if not bool(k.amin() >= self.smallest):
            return None
        e.sigmoid_()

        if self.shifted:
            self._add_product(e, no, self.terms.margin, -1, e_m).clamp_min_(0)
            self._add_product(k, no, self.terms.margin, 1, u)
        else:
            e_m = e
            u.copy_(k)
        u.clamp_max_(self.largest_below_one)  # where rho is -1 to the last digit, and not 0 / 0
        torch.sub(self.one, u, out=spare)
        torch.log(u, out=rho).div_(spare)

        self._focus(e_m, no, focus, spare)
        if not complete:
            focus.mul_(given)
        torch.mul(focus, e_m, out=spare)
        total = -float(torch.dot(spare, rho))
        if entries_out is not None:
            torch.mul(spare, rho, out=entries_out).neg_()
        if slope_out is not None:
            pull = self._pull(k, u, rho, no, spare)
            focus.mul_(e).mul_(away)
            if pull is None:
                slope_out.copy_(focus)
            else:
                torch.mul(focus, pull, out=slope_out)
        return total, size if complete else float(given.sum())

    def _read(
        self, target: Tensor, labels: Labels, no: Tensor, given: Tensor, spare: Tensor
    ) -> bool | None:
        """Fill `no`, 1 but for positives, and `given`, 1 but for gaps; say if there is no gap.

        `given` is filled only if there is a gap. `None` if a value is neither 0, 1 nor -1.
        """
        may_miss = labels.ignore_index == -1
        if target.dtype == torch.bool:
            torch.sub(self.one, spare.copy_(target), out=no)
            return True
        if target.is_floating_point():
            y = target if target.dtype == no.dtype else spare.copy_(target)
            if _is_binary(y, no):
                torch.sub(self.one, y, out=no)
                return True
            torch.clamp(y, max=0, out=given)
            complete = False
            if not may_miss or not _is_binary(given.neg_(), no):
                return None
            yes = torch.clamp(y, min=0, out=spare)
            if not _is_binary(yes, no):
                return None
        else:
            low, high = (int(bound) for bound in torch.aminmax(target))
            if high > 1 or low < (-1 if may_miss else 0):
                return None
            y, complete = spare.copy_(target), low >= 0
            if not complete:
                torch.clamp(y, max=0, out=given).neg_()
                y.clamp_min_(0)
            yes = y
        if not complete:
            torch.sub(self.one, given, out=given)
        torch.sub(self.one, yes, out=no)
        return complete

    def _add_product(
        self, first: Tensor, no: Tensor, option: Number, sign: int, out: Tensor
    ) -> Tensor:
        """First plus or minus an option of negatives."""
        if isinstance(option, Tensor):
            return torch.addcmul(first, no, option[: len(no)], value=sign, out=out)
        return torch.add(first, no, alpha=sign * option, out=out)

    def _sided(self, no: Tensor, of_positive: Number, of_negative: Number, out: Tensor) -> Tensor:
        """Choose by label between two options."""
        if isinstance(of_positive, Tensor) or isinstance(of_negative, Tensor):
            one, other = (
                value[: len(no)] if isinstance(value, Tensor) else self.one * value
                for value in (of_positive, of_negative)
            )
            return torch.lerp(one.expand_as(no), other.expand_as(no), no, out=out)
        return torch.add(self.one * of_positive, no, alpha=of_negative - of_positive, out=out)

    def _focus(self, e_m: Tensor, no: Tensor, out: Tensor, spare: Tensor) -> None:
        """Fill `out` with the focusing weight and the weight of the label."""
        terms = self.terms
        if isinstance(terms.gamma_pos, Tensor) or isinstance(terms.gamma_neg, Tensor):
            torch.pow(e_m, self._sided(no, terms.gamma_pos, terms.gamma_neg, spare), out=out)
        elif terms.gamma_pos == terms.gamma_neg:
            out.copy_(_power_into(e_m, terms.gamma_pos, out))
        else:
            of_positive = _power_into(e_m, terms.gamma_pos, out)
            torch.lerp(of_positive, _power_into(e_m, terms.gamma_neg, spare), no, out=out)
        if terms.has_edge:
            # A power of 0 does not vanish with its base, so the margin is cut out by hand.
            out.mul_(torch.sign(e_m, out=spare))
        if self.weighted:
            out.mul_(self._sided(no, terms.weight_pos, terms.weight_neg, spare))

    def _pull(self, k: Tensor, u: Tensor, rho: Tensor, no: Tensor, spare: Tensor) -> Tensor | None:
        """Return k/u - g rho k, or `None` for 1; whatever is given is used up."""
        terms = self.terms
        ratio = torch.div(k, u, out=u) if self.shifted else None
        if terms.detach_focus:
            return ratio
        first = self.one if ratio is None else ratio
        k.mul_(rho)
        if terms.symmetric and not isinstance(terms.gamma_pos, Tensor):
            return torch.add(first, k, alpha=-terms.gamma_pos, out=u)
        gamma = self._sided(no, terms.gamma_pos, terms.gamma_neg, spare)
        return torch.addcmul(first, k, gamma, value=-1, out=u)


def _is_binary(values: Tensor, spare: Tensor) -> bool:
    """Whether there is nothing but 0 and 1, in two passes."""
    torch.addcmul(values, values, values, value=-1, out=spare)
    return bool(torch.dot(spare, spare) == 0)


def _power_into(base: Tensor, exponent: float, out: Tensor) -> Tensor:
    """Base to a non-negative exponent, in `out` or base itself."""
    if exponent == 0:
        return out.fill_(1)
    if exponent == 1:
        return base
    if exponent == 2:
        return torch.mul(base, base, out=out)
    if exponent == 4:
        torch.mul(base, base, out=out)
        return torch.mul(out, out, out=out)
    return torch.pow(base, exponent, out=out)


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


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Focal binary cross-entropy whose positive and negative sides decay at different rates.

    $$
    L_+ = -(1 - p)^{\gamma_+} \log p, \qquad
    L_- = -p_m^{\gamma_-} \log(1 - p_m), \qquad p_m = \max(p - m, 0)
    $$

    with $p = \sigma(\text{logits})$; a soft label $y$ costs $y L_+ + (1 - y) L_-$. A negative whose
    probability is at most the margin has neither loss nor gradient. With
    `gamma_pos = gamma_neg = margin = 0` this is binary cross-entropy. An entry without a label has
    no influence at all, whatever its logit is, NaN and infinity included. The loss is computed in
    float32 (float64 for float64 logits) and returned so; the gradient has the dtype of the logits
    and is rounded to it once. It can be differentiated as often as needed.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1 where the Action Unit is active, 0 where it is not, `ignore_index` or
            NaN where it is not known.
        gamma_pos: Focusing exponent of positives, at least 0; one number or one per Action Unit.
        gamma_neg: Focusing exponent of negatives, at least 0; one number or one per Action Unit.
        margin: Probability shift `m`, in [0, 1); one number or one per Action Unit.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. The mean is still
            over the number of labelled entries, not over the sum of their weights.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient, as some published
            code has it. The paper's formula is differentiated as a whole.
        soft_labels: Whether numbers between 0 and 1 are labels. Off, so that an intensity or a
            forgotten threshold does not pass for one.
        ignore_index: Target value that marks a missing label (Aff-Wild2 uses -1), or `None` if
            every entry must have a label; then NaN is refused as well.
        check_labels: Whether any other value raises. `None` does where that costs nothing, on a
            CPU. Elsewhere, and in compiled code always, such a value makes loss and gradient NaN
            instead, because raising means waiting for the accelerator.
        reduction: `"mean"` divides the sum by the number of labelled entries, so that it depends
            neither on the batch size nor on the gaps; `"sum"`; `"none"` keeps `(..., c)`.
        normalizer: What `"mean"` divides by instead of the number of labelled entries here: the
            count over all processes, or over all steps of an accumulated batch. 0 gives loss 0.

    Returns:
        Scalar, or `(..., c)` for `reduction="none"`. Zero, with zero gradient, where nothing is
        labelled.

    Raises:
        TypeError: If an argument is not a tensor or the logits are not floating point.
        ValueError: If the shapes differ, an option is out of range, or the target holds any other
            value, see `check_labels`.

    References:
        Section 4.2 of the paper, which averages over classes. Ridnik et al., *Asymmetric Loss for
        Multi-Label Classification*, ICCV 2021, sum instead.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -3.0, 0.5]])
        >>> asymmetric_loss(logits, torch.tensor([[1, 0, -1]]))
        tensor(0.0076)

        Half of a positive's loss and half of a negative's:

        >>> asymmetric_loss(torch.zeros(1), torch.tensor([0.5]), soft_labels=True)
        tensor(0.1855)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(
        logits,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        class_weight=class_weight,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    class_weight: PerClass | None = None,
    detach_focus: bool = False,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy in which easy entries of either kind count less.

    $$ L = -\alpha_t (1 - p_t)^{\gamma} \log p_t $$

    with $p_t$ the probability of the true label and $\alpha_t$ = `alpha` for positives, 1 - `alpha`
    for negatives, or 1 without `alpha`. It is `asymmetric_loss` with equal exponents and no margin;
    labels, dtypes and reductions behave the same.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        gamma: Focusing exponent, at least 0; one number or one per Action Unit.
        alpha: Weight of positives in (0, 1), or `None` for no weights.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit.
        detach_focus: Whether the focusing weights are constants to the gradient.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.
        normalizer: What `"mean"` divides by instead of the number of labelled entries.

    Returns:
        Scalar, or `(..., c)` for `reduction="none"`.

    Raises:
        TypeError: As `asymmetric_loss`.
        ValueError: As `asymmetric_loss`.

    References:
        Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017. The paper names it as the
        rejected alternative.

    Examples:
        >>> import torch
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([[1, 0]]))  # 0.25 log 2
        tensor(0.1733)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(
        logits,
        gamma=gamma,
        class_weight=class_weight,
        detach_focus=detach_focus,
    )
    if alpha is not None:
        check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
        terms = Terms.weighted(terms, alpha, 1 - alpha)
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)


def masked_bce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: PerClass | None = None,
    pos_weight: PerClass | None = None,
    soft_labels: bool = False,
    ignore_index: int | None = -1,
    check_labels: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy over the labelled entries.

    $$ L = -w\, y \log p - (1 - y) \log(1 - p) $$

    with $w$ = `pos_weight`: torch's `binary_cross_entropy_with_logits` with gaps in the target. It
    is `asymmetric_loss` without exponents and margin; labels, dtypes and reductions behave the
    same.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        target: `(..., c)`, 1, 0, or `ignore_index` or NaN where it is not known.
        class_weight: Weight of an Action Unit, at least 0; one per Action Unit. It is torch's
            `weight`.
        pos_weight: Weight of positives, above 0; one number or one per Action Unit.
        soft_labels: Whether numbers between 0 and 1 are labels.
        ignore_index: Target value that marks a missing label, or `None`.
        check_labels: Whether any other value raises; `None` does on a CPU.
        reduction: `"mean"` over the labelled entries, `"sum"` or `"none"`.
        normalizer: What `"mean"` divides by instead of the number of labelled entries.

    Returns:
        Scalar, or `(..., c)` for `reduction="none"`.

    Raises:
        TypeError: As `asymmetric_loss`.
        ValueError: As `asymmetric_loss`.

    Examples:
        >>> import torch
        >>> masked_bce_loss(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))  # log 2
        tensor(0.6931)
    """
    check_pair(logits, target, ignore_index)
    check_reduction(reduction, normalizer)
    terms = checked_terms(logits, class_weight=class_weight, pos_weight=pos_weight)
    labels = Labels.of(target, ignore_index, soft_labels, check_labels)
    return asymmetric_engine(logits, target, terms, labels, reduction, normalizer)


FARTHEST = 700.0
"""Logit of either sign beyond which the slopes are 0 in float64."""
HALVINGS = 64
"""Of the interval between, which is more than float64 resolves."""


def asymmetric_posterior(
    logits: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Turn logits trained with `asymmetric_loss` into the probability that the label is 1.

    The loss is not proper: where a fraction $\pi$ of the labels is 1, its expectation is smallest
    not at $p = \pi$ but where $\pi\, \partial L_+ + (1 - \pi)\, \partial L_- = 0$. Solved for
    $\pi$,

    $$
    \frac{\pi}{1 - \pi} = \frac{b}{w a}, \quad
    a = \frac{(1-p)^{\gamma_+}}{p} - \gamma_+ (1-p)^{\gamma_+ - 1} \log p, \quad
    b = \frac{p_m^{\gamma_-}}{1 - p_m} - \gamma_- p_m^{\gamma_- - 1} \log(1 - p_m)
    $$

    with $w$ = `pos_weight`. Nothing is fitted. It increases with the logit, so it changes
    thresholds and calibration, not the ranking, except that all probabilities up to the margin
    become 0. With exponents and margin at 0 and no weight it is the sigmoid. Focusing weights that
    were detached pull with the first term of `a` and `b` only. Weights of classes do not matter.
    With a margin and `gamma_pos=0` the posterior stays below 1 even at $p = 1$: near there a
    negative costs little more the surer the model is, and a positive little less.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        gamma_pos: Exponent of positives that the model was trained with.
        gamma_neg: Exponent of negatives that the model was trained with.
        margin: Margin that the model was trained with.
        pos_weight: Weight of positives that the model was trained with.
        detach_focus: Whether the model was trained with detached focusing weights.

    Returns:
        `(..., c)`, probability in [0, 1], float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError: If the logits are not a floating point tensor.
        ValueError: If an option is out of range.

    Examples:
        An ASL model that says 0.5 means 0.147:

        >>> import torch
        >>> asymmetric_posterior(torch.zeros(1))
        tensor([0.1473])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating(logits)
    terms = checked_terms(
        logits,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    return _posterior(to_compute_dtype(logits.detach()), terms)


def focal_posterior(
    logits: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Turn logits trained with `focal_loss` into the probability that the label is 1.

    It is `asymmetric_posterior` with equal exponents, no margin and the weight of positives
    `alpha / (1 - alpha)`. Without `alpha` 0.5 means 0.5, and every other output is
    nearer to 0.5 than the probability that it stands for.

    Args:
        logits: `(..., c)`, one unbounded score per Action Unit.
        gamma: Exponent that the model was trained with.
        alpha: Weight of positives that the model was trained with, in (0, 1), or `None`.
        detach_focus: Whether the model was trained with detached focusing weights.

    Returns:
        `(..., c)`, probability in [0, 1], float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError: If the logits are not a floating point tensor.
        ValueError: If an option is out of range.

    References:
        Charoenphakdee et al., *On Focal Loss for Class-Posterior Probability Estimation*, CVPR
        2021, who derive it for any number of classes.

    Examples:
        >>> import torch
        >>> focal_posterior(torch.logit(torch.tensor([0.5, 0.7, 0.9])))
        tensor([0.5000, 0.9064, 0.9974])
    """
    check_shapes(logits=(logits, "... c"))
    check_floating(logits)
    terms = checked_terms(logits, gamma=gamma, pos_weight=_odds(alpha), detach_focus=detach_focus)
    return _posterior(to_compute_dtype(logits.detach()), terms)


def logits_from_asymmetric_posterior(
    prob: Tensor,
    *,
    gamma_pos: PerClass = 1.0,
    gamma_neg: PerClass = 4.0,
    margin: PerClass = 0.05,
    pos_weight: PerClass | None = None,
    detach_focus: bool = False,
) -> Tensor:
    r"""Find the logits that `asymmetric_posterior` turns into given probabilities.

    For a threshold chosen on the posterior and applied to logits, and for the bias of the last
    layer, which should start where the model says how frequent each Action Unit is.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        gamma_pos: As in `asymmetric_posterior`.
        gamma_neg: As in `asymmetric_posterior`.
        margin: As in `asymmetric_posterior`.
        pos_weight: As in `asymmetric_posterior`.
        detach_focus: As in `asymmetric_posterior`.

    Returns:
        `(..., c)`, logits in the dtype of `prob`, at least float32, without gradient. Infinite for
        1 and for what no logit means; for 0 the largest logit that means 0, which a margin makes
        finite; NaN for NaN.

    Raises:
        TypeError: If `prob` is not a floating point tensor.
        ValueError: If a probability lies outside [0, 1], or an option is out of range.

    Examples:
        Where a bias starts for an Action Unit in a tenth of the frames; without focusing it would
        be the logit of 0.1, which is -2.2:

        >>> import torch
        >>> logits_from_asymmetric_posterior(torch.tensor([0.1]))
        tensor([-0.1281])
    """
    _check_prob(prob)
    terms = checked_terms(
        prob.double(),
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        margin=margin,
        pos_weight=pos_weight,
        detach_focus=detach_focus,
    )
    return _inverse(prob, terms)


def logits_from_focal_posterior(
    prob: Tensor,
    *,
    gamma: PerClass = 2.0,
    alpha: float | None = None,
    detach_focus: bool = False,
) -> Tensor:
    """Find the logits that `focal_posterior` turns into given probabilities.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        gamma: As in `focal_posterior`.
        alpha: As in `focal_posterior`.
        detach_focus: As in `focal_posterior`.

    Returns:
        `(..., c)`, logits in the dtype of `prob`, at least float32, without gradient; minus and
        plus infinity for 0 and 1, NaN for NaN.

    Raises:
        TypeError: If `prob` is not a floating point tensor.
        ValueError: If a probability lies outside [0, 1], or an option is out of range.

    Examples:
        >>> import torch
        >>> logits_from_focal_posterior(torch.tensor([0.5, 0.9064])).sigmoid()
        tensor([0.5000, 0.7000])
    """
    _check_prob(prob)
    terms = checked_terms(
        prob.double(), gamma=gamma, pos_weight=_odds(alpha), detach_focus=detach_focus
    )
    return _inverse(prob, terms)


def _odds(alpha: float | None) -> float | None:
    """What focal loss weights positives with, relative to negatives."""
    if alpha is None:
        return None
    check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
    return alpha / (1 - alpha)


def _check_prob(prob: Tensor) -> None:
    check_shapes(prob=(prob, "... c"))
    if not prob.is_floating_point():
        raise TypeError(f"`prob` must be floating point; got {prob.dtype}.")
    outside = (prob < 0) | (prob > 1)
    if bool(outside.any()):
        raise ValueError(f"`prob` must be in [0, 1]; got {prob[outside][0].item():g}.")


def _pulls(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Derivatives of the loss at a logit, made positive: of a positive, of a negative label."""
    pull_up = -entries_and_slope(x, torch.ones_like(x), terms)[1]
    return pull_up, entries_and_slope(x, torch.zeros_like(x), terms)[1]


def _posterior(x: Tensor, terms: Terms) -> Tensor:
    # Beyond this both slopes underflow to 0/0 while their ratio has long reached its limit.
    limit = 80.0 if x.dtype == torch.float32 else FARTHEST
    pull_up, pull_down = _pulls(x.clamp(-limit, limit), terms)
    return pull_down / (pull_up + pull_down)


def _inverse(prob: Tensor, terms: Terms) -> Tensor:
    """Bisect: the posterior rises with the logit, and this is no place to be fast."""
    wanted = prob.detach().double()
    low, high = torch.full_like(wanted, -FARTHEST), torch.full_like(wanted, FARTHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        pull_up, pull_down = _pulls(middle, terms)
        # Products instead of the quotient, whose digits end near 1.
        above = pull_down * (1 - wanted) > pull_up * wanted
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    # Without a margin 0 is only reached at infinity, or where the slope underflows.
    margin = torch.as_tensor(terms.margin, dtype=wanted.dtype, device=wanted.device)
    found = torch.where((wanted == 0) & (margin == 0), -torch.inf, low)
    found = torch.where((wanted == 1) | (low >= FARTHEST - 1), torch.inf, found)
    return torch.where(wanted.isnan(), torch.nan, found).to(to_compute_dtype(prob[..., :0]).dtype)
