"""One cache-sized piece of the asymmetric loss on a CPU, in place on a few small buffers.

The same closed form as `entries_and_slope`, in arithmetic: choosing by a boolean mask takes a CPU
as long as twenty additions, and a factor in {0, 1} chooses as well. What arithmetic cannot do, such
as keeping a NaN away from a sum, is left to the general form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmau.functional._asymmetric_formula import Number, Terms
from mmau.functional._masked_loss import Labels

__all__ = ["PieceWorker"]


class PieceWorker:
    """Holds the buffers, and works on one piece after the other.

    Args:
        terms: The options; those per Action Unit repeated over the rows of a piece.
        size: Entries of the longest piece.
        dtype: float32 or float64.
    """

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
        """Return the sum of the losses and the number of labels, or `None` for the general form.

        Args:
            logits: `(i)`, a piece of the logits.
            target: `(i)`, hard labels.
            labels: How the target is read.
            entries_out: `(i)`, filled with the loss of each entry.
            slope_out: `(i)`, filled with the derivative of each entry by its logit.

        Returns:
            Sum and count; or `None`, before anything is written, if a logit is NaN or so far on the
            wrong side that a sigmoid underflows, or if the target holds anything but 0, 1 and -1.
        """
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
            out.copy_(_power(e_m, terms.gamma_pos, out))
        else:
            of_positive = _power(e_m, terms.gamma_pos, out)
            torch.lerp(of_positive, _power(e_m, terms.gamma_neg, spare), no, out=out)
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


def _power(base: Tensor, exponent: float, out: Tensor) -> Tensor:
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
