"""What training changes about a clip: mirror it, or leave out one of the two senses.

Every draw is a function of (seed, epoch, index of the clip): the same on every rank, with any
number of workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_range
from mmau.landmarks import LANDMARK_SCHEMES, LandmarkScheme

__all__ = ["AugmentationDraw", "ClipAugmentation"]

_PURPOSE = 1_718  # keeps these draws apart from the order of the clips, which has the same seed


class AugmentationDraw(NamedTuple):
    """What is done to one clip in one epoch."""

    flip: bool
    """Whether left and right are swapped."""
    keep_visual: bool
    """Whether the picture may be used."""
    keep_audio: bool
    """Whether the sound may be used."""


class ClipAugmentation:
    r"""Mirror clips and drop modalities, by name of the array.

    A dropped modality is masked, not filled with zeros: its masks become False. Arrays that the
    clip does not have are left alone, and arrays that are not named here are never touched; labels
    are the same on both sides, so they stay. Besides, the clip gets `flipped`, `keep_visual` and
    `keep_audio`, bool tensors of shape `()`, for what is added to it later, such as a waveform.

    Region features that were computed from unmirrored pictures are swapped left to right, which is
    what mirrored pictures would give only if the encoder does not tell sides apart.

    Args:
        seed: Seed of the run.
        flip: Probability of mirroring, in [0, 1].
        drop_visual: Probability of leaving out the picture, in [0, 1].
        drop_audio: Probability of leaving out the sound, in [0, 1]. Never both are left out, so the
            two add up to 1 at most.
        scheme: Landmark convention: a name of `LANDMARK_SCHEMES`, or a scheme.
        width: Width of the pictures in the unit of the landmarks. If left out, that of the images
            in the clip, in pixels.
        images: Arrays `(t, h, w, ...)` that are mirrored along `w`.
        landmarks: Arrays `(t, k, 2)`: mirrored, with points swapped.
        regions: Arrays `(t, m, ...)` whose regions are swapped.
        visual_masks: Bool arrays that say where there is a face.
        audio_masks: Bool arrays that say where there is sound.

    Raises:
        ValueError: If a probability is out of range, the two drops add up to more than 1, or the
            scheme has no mirror table.
        UnknownComponentError: If there is no scheme of that name.

    Examples:
        >>> augment = ClipAugmentation(flip=0.0, drop_audio=1.0)
        >>> clip = augment({"audio_mask": torch.ones(3, dtype=torch.bool)}, epoch=0, index=0)
        >>> clip["audio_mask"].tolist(), clip["keep_audio"].item()
        ([False, False, False], False)
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        flip: float = 0.5,
        drop_visual: float = 0.0,
        drop_audio: float = 0.0,
        scheme: str | LandmarkScheme = "ibug68",
        width: float | None = None,
        images: Sequence[str] = ("crops",),
        landmarks: Sequence[str] = ("landmarks",),
        regions: Sequence[str] = ("tokens", "regions"),
        visual_masks: Sequence[str] = ("valid",),
        audio_masks: Sequence[str] = ("audio_mask",),
    ) -> None:
        check_range("seed", seed, 0)
        for name, value in (
            ("flip", flip),
            ("drop_visual", drop_visual),
            ("drop_audio", drop_audio),
        ):
            check_range(name, value, 0, 1)
        if drop_visual + drop_audio > 1:
            raise ValueError(
                "`drop_visual` and `drop_audio` must add up to 1 at most, since never both are "
                f"left out; got {drop_visual} and {drop_audio}."
            )
        self.scheme = LANDMARK_SCHEMES.get(scheme) if isinstance(scheme, str) else scheme
        if flip and self.scheme.mirror is None:
            raise ValueError(
                f"the scheme {self.scheme.name!r} has no `mirror` table, so clips cannot be "
                "mirrored; use `flip=0`."
            )
        self.seed = seed
        self.flip = flip
        self.drop_visual = drop_visual
        self.drop_audio = drop_audio
        self.width = width
        self.images = tuple(images)
        self.landmarks = tuple(landmarks)
        self.regions = tuple(regions)
        self.visual_masks = tuple(visual_masks)
        self.audio_masks = tuple(audio_masks)

    def draw(self, epoch: int, index: int) -> AugmentationDraw:
        """Decide what is done to a clip, which depends on these numbers and the seed alone.

        Args:
            epoch: Epoch, counted from 0.
            index: Index of the clip in its dataset.

        Returns:
            The decision.
        """
        rng = np.random.default_rng([self.seed, _PURPOSE, epoch, index])
        mirrored, dropped = rng.random(2)
        return AugmentationDraw(
            flip=bool(mirrored < self.flip),
            keep_visual=not dropped < self.drop_visual,
            keep_audio=not self.drop_visual <= dropped < self.drop_visual + self.drop_audio,
        )

    def __call__(self, clip: Mapping[str, Any], *, epoch: int, index: int) -> dict[str, Any]:
        """Change a clip.

        Args:
            clip: Arrays by name, as `ClipDataset` makes them; not changed itself.
            epoch: Epoch, counted from 0.
            index: Index of the clip in its dataset.

        Returns:
            The clip, with `flipped`, `keep_visual` and `keep_audio`.

        Raises:
            ValueError: If an array has not the shape that its role needs, or landmarks are to be
                mirrored and the width is not known.
        """
        drawn = self.draw(epoch, index)
        changed = dict(clip)
        if drawn.flip:
            self._mirror(changed)
        for keep, masks in (
            (drawn.keep_visual, self.visual_masks),
            (drawn.keep_audio, self.audio_masks),
        ):
            for name in masks:
                if name in changed and not keep:
                    changed[name] = torch.zeros_like(changed[name])
        changed["flipped"] = torch.tensor(drawn.flip)
        changed["keep_visual"] = torch.tensor(drawn.keep_visual)
        changed["keep_audio"] = torch.tensor(drawn.keep_audio)
        return changed

    def _mirror(self, clip: dict[str, Any]) -> None:
        """Mirror in place, but never write into the arrays themselves."""
        width = self.width
        for name in self.images:
            if name in clip:
                _need_axes(name, clip[name], 3, "(t, h, w, ...)")
                if width is None:
                    width = clip[name].shape[2]
                clip[name] = clip[name].flip(2)
        for name in self.landmarks:
            if name in clip:
                if width is None:
                    raise ValueError(
                        f"`width` must be given to mirror {name!r}: the clip holds none of the "
                        f"images {', '.join(self.images)} to take it from."
                    )
                clip[name] = self.scheme.flip(clip[name], width)
        order = list(self.scheme.region_permutation)
        for name in self.regions:
            if name in clip:
                _need_axes(name, clip[name], 2, "(t, m, ...)")
                if clip[name].shape[1] != len(order):
                    raise ValueError(
                        f"{name!r} must have the {len(order)} regions of {self.scheme.name!r} on "
                        f"its second axis; got shape {tuple(clip[name].shape)}."
                    )
                clip[name] = clip[name][:, order]


def _need_axes(name: str, array: Tensor, least: int, shape: str) -> None:
    if array.dim() < least:
        raise ValueError(f"{name!r} must have shape {shape}; got {tuple(array.shape)}.")
