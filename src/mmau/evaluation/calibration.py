"""What turns the probabilities of one checkpoint into decisions, saved beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmau._checks import check_choice, check_range, check_shapes, did_you_mean
from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.evaluation.counts import check_names
from mmau.evaluation.smoothing import (
    SMOOTHING_KINDS,
    TIME_UNITS,
    ExponentialSmoother,
    SmoothingKind,
    TimeUnit,
    check_windows,
    smooth,
)
from mmau.functional import asymmetric_posterior

PosteriorOption: TypeAlias = "bool | float | tuple[float, ...]"
"""A value of `Calibration.posterior_options`."""

# Name to the range of its numbers.
POSTERIOR_OPTIONS = {
    "gamma_pos": (0.0, float("inf")),
    "gamma_neg": (0.0, float("inf")),
    "margin": (0.0, 1.0),
    "pos_weight": (0.0, float("inf")),
}


class Calibrated(NamedTuple):
    """What `Calibration.apply` returns."""

    prob: Tensor
    """`(t, c)`, smoothed."""
    active: Tensor
    """`(t, c)`, bool: at or above the threshold."""


@dataclass(frozen=True)
class Calibration:
    """How the probabilities of one checkpoint become decisions; lives beside it as JSON.

    First `smooth`, over one whole video, then `decide`; `apply` does both. The numbers are for one
    kind of probability: `probability` says whether that is the sigmoid of the logits (`"raw"`) or
    the posterior under the training loss (`"posterior"`). Under the asymmetric loss they differ a
    lot: a sigmoid of 0.5 is a posterior of 0.147.

    Args:
        au_names: Names of the columns.
        thresholds: Smallest probability that counts as active, per Action Unit, in [0, 1].
        smoothing: Smoothing window per Action Unit, 0 for none; empty for none at all.
        note: Which data the numbers were chosen on, in words.
        smoothing_kind: `"mean"`, `"median"` or `"exponential"`; see `smooth`.
        smoothing_unit: What the windows count, `"seconds"` or `"frames"`.
        max_gap: Longest time between two frames that are smoothed together, in seconds.
        probability: `"raw"` or `"posterior"`.
        posterior_options: What `mmau.functional.asymmetric_posterior` needs to compute the
            posterior: `gamma_pos`, `gamma_neg`, `margin`, `pos_weight`, one number or one per
            Action Unit, and `detach_focus`. Empty if `probability` is `"raw"`.

    Raises:
        ValueError: If the lengths differ or a number is out of range.

    Examples:
        >>> import torch
        >>> calibration = Calibration(("AU1", "AU2"), (0.5, 0.2))
        >>> calibration.decide(torch.tensor([0.3, 0.3]))
        tensor([False,  True])
        >>> calibration = Calibration(("AU1",), (0.5,), (0.25,))
        >>> calibration.apply(torch.tensor([[0.8], [0.4]]), torch.tensor([0.0, 0.1])).active
        tensor([[True],
                [True]])
    """

    au_names: tuple[str, ...] = AU_NAMES
    thresholds: tuple[float, ...] = (0.5,) * len(AU_NAMES)
    smoothing: tuple[float, ...] = ()
    note: str = ""
    smoothing_kind: SmoothingKind = field(default="mean", kw_only=True)
    smoothing_unit: TimeUnit = field(default="seconds", kw_only=True)
    max_gap: float = field(default=0.5, kw_only=True)
    probability: Literal["raw", "posterior"] = field(default="raw", kw_only=True)
    posterior_options: Mapping[str, PosteriorOption] = field(
        default_factory=dict, kw_only=True, hash=False
    )

    def __post_init__(self) -> None:
        for name in ("au_names", "thresholds", "smoothing"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count = len(check_names(self.au_names))
        if len(self.thresholds) != count:
            raise ValueError(f"`thresholds` must be {count} numbers; got {len(self.thresholds)}.")
        if len(self.smoothing) not in (0, count):
            raise ValueError(
                f"`smoothing` must be {count} windows or none; got {len(self.smoothing)}."
            )
        for threshold in self.thresholds:
            check_range("thresholds", threshold, 0, 1)
        check_choice("smoothing_kind", self.smoothing_kind, SMOOTHING_KINDS)
        check_choice("smoothing_unit", self.smoothing_unit, TIME_UNITS)
        check_windows("smoothing", self.smoothing, self.smoothing_kind, self.smoothing_unit)
        check_range("max_gap", self.max_gap, 0, float("inf"), open_low=True, open_high=True)
        check_choice("probability", self.probability, ("raw", "posterior"))
        self._check_posterior_options()

    def _check_posterior_options(self) -> None:
        if self.posterior_options and self.probability == "raw":
            raise ValueError(
                "`posterior_options` describe a posterior, but `probability` is 'raw'; got "
                f"{dict(self.posterior_options)}."
            )
        options: dict[str, PosteriorOption] = {}
        for name, value in self.posterior_options.items():
            check_choice("posterior_options", name, (*POSTERIOR_OPTIONS, "detach_focus"))
            if (name == "detach_focus") != isinstance(value, bool):
                raise ValueError(
                    f"`posterior_options` must hold true or false for detach_focus and numbers for "
                    f"the others; got {value!r} for {name}."
                )
            if isinstance(value, bool):
                options[name] = value
                continue
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if len(numbers) not in (1, len(self.au_names)):
                raise ValueError(
                    f"`posterior_options` must hold one number or {len(self.au_names)} for "
                    f"{name}; got {len(numbers)}."
                )
            low, high = POSTERIOR_OPTIONS[name]
            for number in numbers:
                check_range(name, number, low, high, open_high=True)
            plain = tuple(float(number) for number in numbers)
            options[name] = plain if isinstance(value, (tuple, list)) else plain[0]
        object.__setattr__(self, "posterior_options", options)

    @property
    def smooths(self) -> bool:
        """Whether any Action Unit is smoothed."""
        return any(window > 0 for window in self.smoothing)

    @property
    def is_causal(self) -> bool:
        """Whether a frame depends on earlier frames only, so that a live stream can be smoothed."""
        return not self.smooths or self.smoothing_kind == "exponential"

    def probability_of(self, logits: Tensor) -> Tensor:
        """Turn logits into the kind of probability that the thresholds are for.

        Args:
            logits: `(..., c)`.

        Returns:
            `(..., c)`, in [0, 1]: the sigmoid, or the posterior under the training loss.

        Raises:
            ValueError: If it is a posterior and `posterior_options` is empty.
        """
        if self.probability == "raw":
            return torch.sigmoid(logits)
        if not self.posterior_options:
            raise ValueError(
                "the calibration is for posterior probabilities but does not say under which loss: "
                "`posterior_options` is empty."
            )
        options: dict[str, Any] = {
            name: torch.tensor(value) if isinstance(value, tuple) else value
            for name, value in self.posterior_options.items()
        }
        return asymmetric_posterior(logits, **options)

    def smooth(self, prob: Tensor, timestamps: Tensor, valid: Tensor | None = None) -> Tensor:
        """Smooth the probabilities of one whole video; nothing crosses a gap in time.

        Args:
            prob: `(t, c)`, probability in [0, 1], of the kind that `probability` names.
            timestamps: `(t)`, seconds, in the order of the frames.
            valid: `(t)`, bool, True where the frame has a probability; all if left out. The models
                of this library predict every frame, from audio where no face is found, and
                `evaluate_trials` smooths over all of them: leave it out for the same.

        Returns:
            `(t, c)`; a copy if nothing is to be smoothed.

        Raises:
            TypeError: If `valid` is not bool.
            ValueError: If shapes differ, a timestamp is not finite, or a valid probability is NaN
                or outside [0, 1].
        """
        check_shapes(sizes={"c": len(self.au_names)}, prob=(prob, "t c"))
        return smooth(
            prob,
            timestamps,
            self.smoothing or 0.0,
            kind=self.smoothing_kind,
            unit=self.smoothing_unit,
            valid=valid,
            max_gap=self.max_gap,
        )

    def smoother(self) -> ExponentialSmoother:
        """Return what smooths a live stream frame by frame as `smooth` does a whole video.

        Returns:
            A fresh smoother, for one video.

        Raises:
            ValueError: If the smoothing looks ahead, which a stream cannot.
        """
        if not self.is_causal:
            raise ValueError(
                f"a {self.smoothing_kind} looks ahead, so a stream cannot be smoothed with it: "
                'choose the windows again with `FitOptions(smoothing_kind="exponential")`, or '
                "leave the smoothing out."
            )
        windows = self.smoothing or (0.0,) * len(self.au_names)
        return ExponentialSmoother(windows, unit=self.smoothing_unit, max_gap=self.max_gap)

    def decide(self, prob: Tensor) -> Tensor:
        """Compare probabilities with the thresholds.

        Args:
            prob: `(..., c)`, probability in [0, 1], smoothed if there is smoothing; NaN where there
                is none.

        Returns:
            `(..., c)`, bool; False where the probability is NaN.

        Raises:
            ValueError: If the last axis is not the number of Action Units.
        """
        check_shapes(sizes={"c": len(self.au_names)}, prob=(prob, "... c"))
        return prob >= torch.tensor(self.thresholds, dtype=torch.float64, device=prob.device)

    def apply(self, prob: Tensor, timestamps: Tensor, valid: Tensor | None = None) -> Calibrated:
        """Smooth the probabilities of one whole video, then compare them with the thresholds.

        Args:
            prob: `(t, c)`, probability in [0, 1], of the kind that `probability` names.
            timestamps: `(t)`, seconds, in the order of the frames.
            valid: As in `smooth`.

        Returns:
            Smoothed probabilities and decisions.

        Raises:
            TypeError: As `smooth`.
            ValueError: As `smooth`.
        """
        smoothed = self.smooth(prob, timestamps, valid)
        return Calibrated(smoothed, self.decide(smoothed))

    def save(self, path: str | Path) -> None:
        """Write as JSON, to a temporary name first, so that no half file can be left behind.

        Args:
            path: File to write; an older one is replaced.
        """
        content = {name: getattr(self, name) for name in KEYS}
        text = json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False) + "\n"
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote, now or with an older version of this library.

        Args:
            path: File to read.

        Returns:
            The calibration.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a calibration, has an unknown or missing key, or a wrong value.
        """
        path = Path(path)
        content = _read(path)
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# -------------------------------------------------------------------------------------- the file
FAMILY = "mmau.calibration/"
FORMAT = FAMILY + "2"


def _is_number(value: object) -> bool:
    # bool is an int to Python, but `true` is not a threshold.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, bool) or _is_number(v) or _are_numbers(v) for v in value.values()
    )


_NUMBERS = ("a list of numbers", _are_numbers)
_TEXT = ("text", lambda value: isinstance(value, str))
KEYS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "au_names": ("a list of names", _are_names),
    "thresholds": _NUMBERS,
    "smoothing": _NUMBERS,
    "note": _TEXT,
    "smoothing_kind": _TEXT,
    "smoothing_unit": _TEXT,
    "max_gap": ("a number", _is_number),
    "probability": _TEXT,
    "posterior_options": ("names with numbers", _are_options),
}
"""What the file holds: the fields of `Calibration`, and of which type."""
KEYS_OF_FORMAT = {FAMILY + "1": tuple(KEYS)[:4], FORMAT: tuple(KEYS)}
"""Every format that can be read. What an older one lacks has the meaning of the default."""


def _read(path: Path) -> dict[str, Any]:
    """Read a file of any format that was ever written; keys and types are checked."""
    if not path.is_file():
        raise FileNotFoundError(f"no such calibration file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    written = content.pop("format", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not str(written).startswith(FAMILY):
        raise ValueError(f'{path} is not a calibration: it has no "format": "{FORMAT}".')
    if written not in KEYS_OF_FORMAT:
        raise ValueError(
            f"{path} has the format {written!r}; this version of mmau reads "
            f"{' and '.join(KEYS_OF_FORMAT)}. Upgrade mmau to read a newer file."
        )
    keys = KEYS_OF_FORMAT[written]
    for key in content:
        if key not in keys:
            raise ValueError(f"{path} has an unknown key {key!r}{did_you_mean(key, keys)}")
    for key in keys:
        if key not in content:
            raise ValueError(f"{path} lacks the key {key!r}.")
        expected, fits = KEYS[key]
        if not fits(content[key]):
            raise ValueError(f"{path}: {key!r} must be {expected}; got {content[key]!r}.")
    return content
