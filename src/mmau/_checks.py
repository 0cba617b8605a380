"""One voice for all argument errors: what was given, what was expected.

Every public function and module checks its input once, at its entry, with these functions. They
cost a few microseconds and trace under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor


def _letters(pattern: str) -> str:
    return "(" + ", ".join(pattern.split()) + ")"


def check_shapes(
    *, sizes: dict[str, int] | None = None, **tensors: tuple[Tensor | None, str]
) -> None:
    """Check tensors against einops-like patterns that share their letters.

    A letter must have one size across all tensors, a number in a pattern is a literal size, and a
    leading `...` stands for any leading axes (each tensor's own). `None` tensors are skipped.

    Examples:
        >>> check_shapes(x=(torch.ones(2, 3), "b t"), a=(torch.ones(2, 4), "b t"))
        Traceback (most recent call last):
        ...
        ValueError: axis `t` is 3 in `x` but 4 in `a`, which must have shape (b, t); got (2, 4).
    """
    seen: dict[str, tuple[int, str]] = {}
    known = sizes or {}
    for name, (tensor, pattern) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"`{name}` must be a tensor {_letters(pattern)}; got {type(tensor).__name__}."
            )
        letters = pattern.split()
        shape = tuple(tensor.shape)
        if letters and letters[0] == "...":
            letters = letters[1:]
            wrong = len(shape) < len(letters)
        else:
            wrong = len(shape) != len(letters)
        if wrong:
            raise ValueError(
                f"`{name}` must have shape {_letters(pattern)}; got {shape}, "
                f"which has {len(shape)} axes."
            )
        for letter, size in zip(letters, shape[len(shape) - len(letters) :], strict=True):
            if letter.isdigit():
                if size != int(letter):
                    raise ValueError(f"`{name}` must have shape {_letters(pattern)}; got {shape}.")
            elif letter in known:
                if size != known[letter]:
                    raise ValueError(
                        f"axis `{letter}` of `{name}` must be {known[letter]}, as "
                        f"{_letters(pattern)}; got {shape}."
                    )
            elif letter in seen:
                if size != seen[letter][0]:
                    first, owner = seen[letter]
                    raise ValueError(
                        f"axis `{letter}` is {first} in `{owner}` but {size} in `{name}`, which "
                        f"must have shape {_letters(pattern)}; got {shape}."
                    )
            else:
                seen[letter] = (size, name)


def check_mask(name: str, mask: Tensor | None) -> None:
    """Check that a mask is boolean, so that 0/1, additive and inverted masks cannot be confused."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        given = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"`{name}` must be a bool tensor, True where there is something to use; got {given}."
        )


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """Return the words ` did you mean 'x'?` for the nearest choice, or nothing."""
    near = difflib.get_close_matches(str(given), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Check that a word is one of a few.

    Examples:
        >>> check_choice("reduction", "avg", ("mean", "sum", "none"))
        Traceback (most recent call last):
        ...
        ValueError: `reduction` must be one of 'mean', 'sum', 'none'; got 'avg'.
    """
    options = tuple(choices)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"`{name}` must be one of {listed}; got {value!r}.")


def check_range(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Check that a number lies in an interval.

    Examples:
        >>> check_range("margin", 1.0, 0, 1, open_high=True)
        Traceback (most recent call last):
        ...
        ValueError: `margin` must be in [0, 1); got 1.0.
    """
    above = low is None or (value > low if open_low else value >= low)
    below = high is None or (value < high if open_high else value <= high)
    if not (above and below and value == value):
        left = "(-inf" if low is None else f"{'(' if open_low else '['}{low}"
        right = "inf)" if high is None else f"{high}{')' if open_high else ']'}"
        raise ValueError(f"`{name}` must be in {left}, {right}; got {value!r}.")
