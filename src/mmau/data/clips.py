"""Windows of consecutive frames for training, mirrored and with dropped modalities if asked for.

A window never crosses a trial. The last one of a trial may be shorter: it is kept once, padded at
the end, and its mask says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmau._checks import check_choice, check_range
from mmau.landmarks import LANDMARK_SCHEMES, LandmarkScheme

_PURPOSE = 1_718  # keeps these draws apart from the order of the clips, which has the same seed


class AugmentationDraw(NamedTuple):
    """What is done to one clip in one epoch."""

    flip: bool
    """Whether left and right are swapped."""
    keep_visual: bool
    """Whether the face may be used."""
    keep_audio: bool
    """Whether the sound may be used."""


CLIP_ARRAYS: Mapping[str, str] = MappingProxyType(
    {
        "crops": "images",
        "landmarks": "landmarks",
        "tokens": "regions",
        "regions": "regions",
        "valid": "visual_mask",
        "audio_mask": "audio_mask",
    }
)
"""Name of an array of a clip to what it holds, for `ClipAugmentation`."""


class ClipAugmentation:
    r"""Mirror clips and drop modalities, by name of the array.

    A dropped modality is masked, not filled with zeros: its masks become False. Arrays that the
    clip does not have are left alone, and arrays that are not named here are never touched; labels
    are the same on both sides, so they stay. Besides, the clip gets `flipped`, `keep_visual` and
    `keep_audio`, bool tensors of shape `()`, for what is added to it later, such as a waveform.

    Region features that were computed from unmirrored images are swapped left to right, which is
    what mirrored images would give only if the encoder does not tell sides apart.

    Args:
        seed: Seed of the run.
        flip: Probability of mirroring, in [0, 1].
        drop_visual: Probability of leaving out the face, in [0, 1].
        drop_audio: Probability of leaving out the sound, in [0, 1]. Never both are left out, so the
            two add up to 1 at most.
        scheme: Landmark convention: a name of `LANDMARK_SCHEMES`, or a scheme.
        width: Width of the images in the unit of the landmarks. If left out, that of the images
            in the clip, in pixels.
        arrays: Name of an array to what it holds: `"images"` `(t, h, w, ...)`, mirrored along `w`;
            `"landmarks"` `(t, k, 2)`, mirrored, with points swapped; `"regions"` `(t, m, ...)`,
            swapped; `"visual_mask"`, where there is a face; `"audio_mask"`, where there is sound.

    Raises:
        ValueError: If a probability is out of range, the two drops add up to more than 1, an array
            holds something else, or the scheme has no mirror table.
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
        arrays: Mapping[str, str] = CLIP_ARRAYS,
    ) -> None:
        check_range("seed", seed, 0)
        check_range("flip", flip, 0, 1)
        check_range("drop_visual", drop_visual, 0, 1)
        check_range("drop_audio", drop_audio, 0, 1)
        if drop_visual + drop_audio > 1:
            raise ValueError(
                "`drop_visual` and `drop_audio` must add up to 1 at most, since never both are "
                f"left out; got {drop_visual} and {drop_audio}."
            )
        for name, held in arrays.items():
            check_choice(f"arrays[{name!r}]", held, dict.fromkeys(CLIP_ARRAYS.values()))
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
        self.arrays = dict(arrays)

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
        """Change a clip; its own arrays are not written to."""
        drawn = self.draw(epoch, index)
        changed = dict(clip)
        if drawn.flip:
            changed |= self._mirrored(clip)
        for kind, keep in (
            ("visual_mask", drawn.keep_visual),
            ("audio_mask", drawn.keep_audio),
        ):
            for name in () if keep else self._names(clip, kind):
                changed[name] = torch.zeros_like(changed[name])
        changed["flipped"] = torch.tensor(drawn.flip)
        changed["keep_visual"] = torch.tensor(drawn.keep_visual)
        changed["keep_audio"] = torch.tensor(drawn.keep_audio)
        return changed

    def _names(self, clip: Mapping[str, Any], kind: str) -> list[str]:
        return [name for name, held in self.arrays.items() if held == kind and name in clip]

    def _mirrored(self, clip: Mapping[str, Any]) -> dict[str, Tensor]:
        mirrored, width = {}, self.width
        for name in self._names(clip, "images"):
            _check_axes(name, clip[name], 3, "(t, h, w, ...)")
            width = clip[name].shape[2] if width is None else width
            mirrored[name] = clip[name].flip(2)
        for name in self._names(clip, "landmarks"):
            if width is None:
                images = [image for image, held in self.arrays.items() if held == "images"]
                raise ValueError(
                    f"`width` must be given to mirror {name!r}: the clip holds none of the "
                    f"images {', '.join(images)} to take it from."
                )
            mirrored[name] = self.scheme.flip(clip[name], width)
        order = list(self.scheme.region_permutation)
        for name in self._names(clip, "regions"):
            _check_axes(name, clip[name], 2, "(t, m, ...)")
            if clip[name].shape[1] != len(order):
                raise ValueError(
                    f"{name!r} must have the {len(order)} regions of {self.scheme.name!r} on "
                    f"its second axis; got shape {tuple(clip[name].shape)}."
                )
            mirrored[name] = clip[name][:, order]
        return mirrored


def _check_axes(name: str, array: Tensor, least: int, shape: str) -> None:
    if array.dim() < least:
        raise ValueError(f"{name!r} must have shape {shape}; got {tuple(array.shape)}.")


@dataclass(frozen=True)
class Window:
    """Consecutive frames of one trial."""

    trial: str
    """Name of the trial."""
    start: int
    """First frame, counted from 0."""
    length: int
    """Number of frames that exist; a shorter one than the clip is padded."""


def clip_windows(
    lengths: Mapping[str, int], clip_frames: int, *, stride: int | None = None
) -> list[Window]:
    """Cut trials into windows that together hold every frame, in the order of trials and time.

    Examples:
        >>> [(w.start, w.length) for w in clip_windows({"video1": 10}, 4)]
        [(0, 4), (4, 4), (8, 2)]
    """
    stride = clip_frames if stride is None else stride
    check_range("clip_frames", clip_frames, 1)
    if not 1 <= stride <= clip_frames:
        raise ValueError(
            f"`stride` must be 1 to `clip_frames`, {clip_frames}, so that no frame is left out; "
            f"got {stride}."
        )
    windows = []
    for trial, length in lengths.items():
        check_range(f"lengths[{trial!r}]", length, 0)
        # No start after the one whose window reaches the end: the rest would only repeat frames.
        past = max(length - clip_frames, 0) + stride if length else 0
        starts = range(0, past, stride)
        windows += [Window(trial, start, min(clip_frames, length - start)) for start in starts]
    return windows


class ClipDataset(Dataset[dict[str, Any]]):
    """Windows of trials, padded to one length, as dictionaries that torch can collate.

    An item holds `trial` (name), `frame_ids` `(t)` int64 counted from 0 (-1 in the padding), `mask`
    `(t)` bool, True for frames that exist, and each array of the trial. Padding is -1 in arrays of
    signed integers (an unknown label), False in bool and 0 in all others.

    Args:
        trials: Trial name to its arrays, each with one row per frame. A mapping that reads a trial
            when it is asked for keeps memory small; give `lengths` then.
        clip_frames: Frames per item.
        stride: Frames from one start to the next, 1 to `clip_frames`; `clip_frames` (no overlap)
            if left out.
        lengths: Trial name to its number of frames, so that no trial is read to count them.
        augment: What is drawn anew for each clip in each epoch; see `set_epoch`.

    Raises:
        ValueError: If arrays of a trial differ in length, or a number is out of range.

    Examples:
        >>> data = ClipDataset({"video1": {"labels": torch.tensor([[1], [0], [1]])}}, 2)
        >>> data[1]["labels"].tolist(), data[1]["frame_ids"].tolist(), data[1]["mask"].tolist()
        ([[1], [-1]], [2, -1], [True, False])
    """

    def __init__(
        self,
        trials: Mapping[str, Mapping[str, Tensor | npt.NDArray[Any]]],
        clip_frames: int,
        *,
        stride: int | None = None,
        lengths: Mapping[str, int] | None = None,
        augment: ClipAugmentation | None = None,
    ) -> None:
        self.trials = trials
        self.augment = augment
        # In shared memory, so that workers that live longer than an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self.clip_frames = clip_frames
        if lengths is None:
            lengths = {name: _common_length(name, trials[name]) for name in trials}
        self.lengths = dict(lengths)
        self.windows = clip_windows(self.lengths, clip_frames, stride=stride)

    @property
    def epoch(self) -> int:
        """Epoch that the augmentation is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose what the augmentation draws; reaches the workers of a loader, too.

        Args:
            epoch: Epoch, counted from 0.

        Raises:
            ValueError: If it is negative.
        """
        check_range("epoch", epoch, 0)
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.windows[index]
        arrays = self.trials[window.trial]
        length = _common_length(window.trial, arrays)
        if length != self.lengths[window.trial]:
            raise ValueError(
                f"trial {window.trial!r} has {length} frames, but `lengths` says "
                f"{self.lengths[window.trial]}."
            )
        taken = slice(window.start, window.start + window.length)
        frames = torch.arange(window.start, window.start + window.length)
        item: dict[str, Any] = {
            "trial": window.trial,
            "frame_ids": frames,
            "mask": torch.ones(window.length, dtype=torch.bool),
        }
        for name, array in arrays.items():
            if name in item:
                raise ValueError(
                    f"an array may not be called {name!r}, which the clip adds itself."
                )
            item[name] = torch.as_tensor(array[taken])
        if self.augment is not None:
            # An index from the end names the same window, so it must draw the same.
            item = self.augment(item, epoch=self.epoch, index=index % len(self.windows))
        # What is true of the whole clip has no frames to pad.
        return {
            name: self._pad(value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in item.items()
        }

    def _pad(self, rows: Tensor) -> Tensor:
        signed_integer = not rows.is_floating_point() and rows.dtype.is_signed
        full = rows.new_full((self.clip_frames, *rows.shape[1:]), -1 if signed_integer else 0)
        full[: len(rows)] = rows
        return full


def _common_length(name: str, arrays: Mapping[str, Tensor | npt.NDArray[Any]]) -> int:
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items()) or "none"
        raise ValueError(f"the arrays of trial {name!r} must have one row per frame; got {listed}.")
    return next(iter(lengths.values()))
