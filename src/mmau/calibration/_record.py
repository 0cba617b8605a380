"""The thresholds of one checkpoint, saved beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes, did_you_mean
from mmau._files import whole_file
from mmau.action_units import AU_NAMES

__all__ = ["Calibration"]

FORMAT = "mmau.calibration/1"


@dataclass(frozen=True)
class Calibration:
    """How the probabilities of one checkpoint become decisions; lives beside it as JSON.

    Args:
        au_names: Names of the columns.
        thresholds: Smallest probability that counts as active, per Action Unit, in [0, 1].
        smoothing: Width of the moving average in seconds, per Action Unit; 0 for none. Empty means
            none at all.
        note: Which data the numbers were chosen on, in words.

    Raises:
        ValueError: If the lengths differ or a number is out of range.

    Examples:
        >>> import torch
        >>> calibration = Calibration(("AU1", "AU2"), (0.5, 0.2))
        >>> calibration.decide(torch.tensor([0.3, 0.3]))
        tensor([False,  True])
    """

    au_names: tuple[str, ...] = AU_NAMES
    thresholds: tuple[float, ...] = (0.5,) * len(AU_NAMES)
    smoothing: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("au_names", "thresholds", "smoothing"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count = len(self.au_names)
        if count == 0 or len(set(self.au_names)) != count:
            raise ValueError(
                f"`au_names` must be at least one name, each once; got {self.au_names}."
            )
        if len(self.thresholds) != count:
            raise ValueError(f"`thresholds` must be {count} numbers; got {len(self.thresholds)}.")
        if len(self.smoothing) not in (0, count):
            raise ValueError(
                f"`smoothing` must be {count} widths or none; got {len(self.smoothing)}."
            )
        for threshold in self.thresholds:
            check_range("thresholds", threshold, 0, 1)
        for width in self.smoothing:
            check_range("smoothing", width, 0, open_high=True)

    def decide(self, prob: Tensor) -> Tensor:
        """Compare probabilities with the thresholds.

        Args:
            prob: `(..., c)`, probability in [0, 1]; NaN where there is none.

        Returns:
            `(..., c)`, bool; False where the probability is NaN.

        Raises:
            ValueError: If the last axis is not the number of Action Units.
        """
        check_shapes(sizes={"c": len(self.au_names)}, prob=(prob, "... c"))
        return prob >= torch.tensor(self.thresholds, dtype=torch.float64, device=prob.device)

    def save(self, path: str | Path) -> None:
        """Write as JSON, to a temporary name first, so that no half file can be left behind.

        Args:
            path: File to write; an older one is replaced.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Args:
            path: File to read.

        Returns:
            The calibration.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a calibration, has an unknown or missing key, or a wrong value.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such calibration file: {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f'{path} is not a calibration: it has no "format": "{FORMAT}".')
        keys = ("au_names", "thresholds", "smoothing", "note")
        for key in content:
            if key not in keys:
                raise ValueError(f"{path} has an unknown key {key!r}{did_you_mean(key, keys)}")
        for key in keys:
            if key not in content:
                raise ValueError(f"{path} lacks the key {key!r}.")
        _check_types(path, content)
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_types(path: Path, content: dict[str, Any]) -> None:
    """Refuse values of a wrong type before they become a confusing error later."""
    kinds: dict[str, tuple[str, Any]] = {
        "au_names": ("a list of names", str),
        "thresholds": ("a list of numbers", (int, float)),
        "smoothing": ("a list of numbers", (int, float)),
    }
    for key, (expected, kind) in kinds.items():
        value = content[key]
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ValueError(f"{path}: {key!r} must be {expected}; got {value!r}.")
    if not isinstance(content["note"], str):
        raise ValueError(f"{path}: 'note' must be text; got {content['note']!r}.")
