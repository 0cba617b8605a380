"""Windows of consecutive frames for training, and the way back from windows to trials.

A window never crosses a trial. The last one of a trial may be shorter: it is kept once, padded at
the end, and its mask says so. Every frame that goes in comes out exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmau._checks import check_choice, check_shapes
from mmau.data._clip_augmentation import AugmentationDraw, ClipAugmentation
from mmau.data._clip_sampler import ClipSampler

__all__ = [
    "AugmentationDraw",
    "ClipAugmentation",
    "ClipDataset",
    "ClipSampler",
    "ClipStitcher",
    "Window",
    "clip_windows",
]


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
    """Cut trials into windows that together hold every frame.

    Args:
        lengths: Trial name to its number of frames; a trial without frames has no window.
        clip_frames: Frames per window, at least 1.
        stride: Frames from one start to the next, 1 to `clip_frames`; `clip_frames` (no overlap) if
            left out.

    Returns:
        Windows in the order of the trials, then of time.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> [(w.start, w.length) for w in clip_windows({"video1": 10}, 4)]
        [(0, 4), (4, 4), (8, 2)]
    """
    stride = clip_frames if stride is None else stride
    if clip_frames < 1:
        raise ValueError(f"`clip_frames` must be at least 1; got {clip_frames}.")
    if not 1 <= stride <= clip_frames:
        raise ValueError(
            f"`stride` must be 1 to `clip_frames`, {clip_frames}, so that no frame is left out; "
            f"got {stride}."
        )
    windows = []
    for trial, length in lengths.items():
        if length < 0:
            raise ValueError(f"`lengths` of trial {trial!r} must not be negative; got {length}.")
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
        stride: Frames from one start to the next; `clip_frames` if left out.
        lengths: Trial name to its number of frames, so that no trial is read to count them.
        augment: What is drawn anew for each clip in each epoch; see `set_epoch`.

    Raises:
        ValueError: If arrays of a trial differ in length, or as `clip_windows`.

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
        if epoch < 0:
            raise ValueError(f"`epoch` must not be negative; got {epoch}.")
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


class ClipStitcher:
    """Put the outputs of windows back together, each frame of each trial once.

    Args:
        lengths: Trial name to its number of frames.
        overlap: What a frame in several windows becomes: their `"mean"`, or the output of the
            window that `"owns"` it, the one in which it is furthest from an edge.

    Examples:
        >>> stitcher = ClipStitcher({"video1": 3})
        >>> data = ClipDataset({"video1": {"x": torch.arange(3.0)}}, 2)
        >>> for clip in data:
        ...     stitcher.add([clip["trial"]], clip["frame_ids"][None], clip["x"][None])
        >>> stitcher.result()["video1"]
        tensor([0., 1., 2.])
    """

    def __init__(
        self, lengths: Mapping[str, int], *, overlap: Literal["mean", "owns"] = "mean"
    ) -> None:
        check_choice("overlap", overlap, ("mean", "owns"))
        self.lengths = dict(lengths)
        self.overlap = overlap
        self._values: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, trials: Sequence[str], frame_ids: Tensor, outputs: Tensor) -> None:
        """Take the outputs of a batch of windows.

        Args:
            trials: Trial name of each window.
            frame_ids: `(b, t)`, frame numbers counted from 0; -1 in the padding.
            outputs: `(b, t, ...)`, one row per frame; padding is ignored.

        Raises:
            ValueError: If shapes differ, a trial is unknown or a frame is beyond its end.
        """
        check_shapes(frame_ids=(frame_ids, "b t"))
        if outputs.shape[:2] != frame_ids.shape or len(trials) != len(frame_ids):
            raise ValueError(
                f"`trials`, `frame_ids` and `outputs` must agree, (b), (b, t), (b, t, ...); got "
                f"{len(trials)}, {tuple(frame_ids.shape)}, {tuple(outputs.shape)}."
            )
        for trial, ids, rows in zip(trials, frame_ids.cpu(), outputs.detach().cpu(), strict=True):
            if trial not in self.lengths:
                raise ValueError(f"`lengths` has no trial {trial!r}.")
            real = ids >= 0
            self._add_window(trial, ids[real], rows[real])

    def _add_window(self, trial: str, ids: Tensor, rows: Tensor) -> None:
        length = self.lengths[trial]
        if len(ids) and int(ids.max()) >= length:
            raise ValueError(f"trial {trial!r} has {length} frames; got frame {int(ids.max())}.")
        if trial not in self._values:
            self._values[trial] = rows.new_zeros((length, *rows.shape[1:]))
            self._weights[trial] = torch.zeros(length, dtype=torch.int64)
        values, weights = self._values[trial], self._weights[trial]
        if self.overlap == "mean":
            values[ids] += rows
            weights[ids] += 1
            return
        place = torch.arange(len(ids))
        from_edge = torch.minimum(place, len(ids) - 1 - place) + 1
        closer = from_edge > weights[ids]
        values[ids[closer]] = rows[closer]
        weights[ids[closer]] = from_edge[closer]

    def result(self) -> dict[str, Tensor]:
        """Return the stitched trials.

        Returns:
            Trial name to `(t, ...)`, in the order of `lengths`; trials without frames are left out.

        Raises:
            ValueError: If a frame was in no window.
        """
        stitched = {}
        for trial, length in self.lengths.items():
            if length == 0:
                continue
            weights = self._weights.get(trial, torch.zeros(length, dtype=torch.int64))
            lacking = (weights == 0).nonzero().flatten()
            if len(lacking):
                raise ValueError(
                    f"{len(lacking)} of {length} frames of trial {trial!r} were in no window, the "
                    f"first is frame {int(lacking[0])}."
                )
            values = self._values[trial]
            if self.overlap == "mean":
                weights = weights.reshape(-1, *[1] * (values.dim() - 1))
                values = values / weights
            stitched[trial] = values
        return stitched


def _common_length(name: str, arrays: Mapping[str, Tensor | npt.NDArray[Any]]) -> int:
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items()) or "none"
        raise ValueError(f"the arrays of trial {name!r} must have one row per frame; got {listed}.")
    return next(iter(lengths.values()))
