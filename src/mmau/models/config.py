"""A detector as data: names and options."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from mmau._checks import check_choice, check_range, did_you_mean
from mmau.action_units import AU_NAMES


@dataclass(frozen=True)
class Component:
    """A registered name and the options that its factory takes."""

    name: str
    """Registered name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory; JSON values."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Everything that decides the architecture of an `AUDetector`; the defaults are the paper's.

    Examples:
        >>> config = DetectorConfig(visual=Component("tiny"), audio=None, crop_size=64)
        >>> DetectorConfig.from_dict(config.to_dict()) == config
        True
        >>> DetectorConfig.from_dict({"crop_sise": 64})
        Traceback (most recent call last):
        ...
        ValueError: unknown key 'crop_sise' in the detector config; did you mean 'crop_size'?
    """

    visual: Component = Component("dinov2")
    """Visual encoder."""
    audio: Component | None = Component("wavlm")
    """Audio encoder; `None` for a video-only detector."""
    alignment: Literal["hga", "global_pool"] = "hga"
    """Region tokens by landmarks and cross-attention, or the mean of all patch tokens."""
    regions: str = "ibug68"
    """Landmark scheme whose regions are used."""
    d_region: int = 768
    """Width of a region token (paper: D_v = 768)."""
    num_heads: int = 8
    """Attention heads of HGA and of the cross-attention over time (paper: 8)."""
    merge: Literal["flatten", "mean", "attention"] = "flatten"
    """How the region tokens of a frame become one vector."""
    d_model: int = 768
    """Width of a frame's vector in the temporal model."""
    d_audio: int = 256
    """Width of the projected audio features."""
    fusion: Literal["interpolate", "cross_attention"] = "interpolate"
    """How audio features come to the frames: linear interpolation, or cross-attention."""
    fusion_window: float = 1.0
    """Reach of the cross-attention on either side of a frame, in seconds."""
    temporal: Component = Component("agssm")
    """Temporal model."""
    dropout: float = 0.1
    """Dropout before the merge and before the head."""
    frames_per_chunk: int | None = None
    """Frames that the visual encoder encodes at once; all if `None`."""
    checkpoint_frames: bool = False
    """Whether the visual encoder's activations are recomputed in the backward pass."""
    crop_size: int = 224
    """Side of the aligned face crop in pixels (paper: 224)."""
    au_names: tuple[str, ...] = AU_NAMES
    """Names of the outputs, in order."""

    def __post_init__(self) -> None:
        check_choice("alignment", self.alignment, ("hga", "global_pool"))
        check_choice("fusion", self.fusion, ("interpolate", "cross_attention"))
        check_range("crop_size", self.crop_size, 1)
        if len(set(self.au_names)) != len(self.au_names) or not self.au_names:
            raise ValueError(f"`au_names` must be distinct and not empty; got {self.au_names}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold.

        Returns:
            Field to value.
        """
        return {**dataclasses.asdict(self), "au_names": list(self.au_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorConfig:
        """Read what `to_dict` wrote; fields that are absent take their defaults.

        Args:
            values: Field to value.

        Returns:
            The config.

        Raises:
            ValueError: If a key is unknown, or a value is of the wrong type.
        """
        return cast("DetectorConfig", _read(cls, values, "the detector config"))


def _read(expected: Any, value: Any, where: str) -> Any:
    """Turn JSON values into the annotated type, or say which key is wrong and how."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object; got {value!r}.")
        hints = typing.get_type_hints(expected)
        for key in value:
            if key not in hints:
                raise ValueError(f"unknown key {key!r} in {where}{did_you_mean(key, hints)}")
        read = {key: _read(hints[key], item, f"{key!r} of {where}") for key, item in value.items()}
        return cast("Any", expected)(**read)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _read(inner, value, where)
    if origin is Literal:
        fits, wanted = value in arguments, " or ".join(map(repr, arguments))
    elif origin is tuple:
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        value, wanted = tuple(value) if fits else value, "a list of strings"
    elif origin is dict:
        fits, wanted = isinstance(value, dict), "an object"
    elif expected is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = "a number"
    else:
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        wanted = f"of type {expected.__name__}"
    if not fits:
        raise ValueError(f"{where} must be {wanted}; got {value!r}.")
    return value
