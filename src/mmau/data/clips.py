"""Windows of consecutive frames for training, and the way back from windows to trials.

A window never crosses a trial. The last one of a trial may be shorter: it is kept once, padded at
the end, and its mask says so. Every frame that goes in comes out exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmau._checks import check_choice, check_range, check_shapes
from mmau.landmarks import LANDMARK_SCHEMES, LandmarkScheme

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
        """Change a clip."""
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


class ClipSampler(Sampler[int]):
    """Shuffle the clips by (seed, epoch) alone, and give each rank its share.

    The order depends on nothing else: not on what was drawn before, nor on the global generator,
    nor on the number of ranks. So a run is continued from three numbers, (seed, epoch, position):
    `position` counts the clips of the epoch that all ranks together have taken, and the rest is
    dealt out again, on as many ranks as there are then. Count steps in the training loop and not in
    the sampler, which runs ahead of it when a loader has workers.

    Args:
        num_clips: Number of clips.
        seed: Seed of the run.
        shuffle: Whether to shuffle; in order otherwise.
        rank: Which share is ours, 0 to `world_size - 1`.
        world_size: Number of shares.
        remainder: What to do when clips cannot be dealt out evenly: `"keep"` them, so that some
            ranks have one more (each clip once: right for evaluation); `"drop"` them for this
            epoch; or `"repeat"` the first ones, so that all ranks take the same number of steps.

    Raises:
        ValueError: If a number is out of range or a word unknown.

    Examples:
        >>> sampler = ClipSampler(5, seed=1)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(sampler) == sorted(first), list(sampler) == first
        (True, False)
        >>> resumed = ClipSampler(5, seed=1)
        >>> resumed.load_state_dict({"seed": 1, "num_clips": 5, "epoch": 0, "position": 2})
        >>> list(resumed) == first[2:]
        True
    """

    def __init__(
        self,
        num_clips: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        remainder: Literal["keep", "drop", "repeat"] = "keep",
    ) -> None:
        if num_clips < 0 or seed < 0:
            raise ValueError(
                f"`num_clips` and `seed` must not be negative; got {num_clips} and {seed}."
            )
        check_range("world_size", world_size, 1)
        check_range("rank", rank, 0, world_size - 1)
        check_choice("remainder", remainder, ("keep", "drop", "repeat"))
        self.num_clips = num_clips
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.remainder = remainder
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int, *, position: int = 0) -> None:
        """Choose the order of an epoch, and where in it to start.

        Args:
            epoch: Epoch, counted from 0.
            position: Clips of this epoch that all ranks together have taken already.

        Raises:
            ValueError: If one of them is out of range.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must not be negative; got {epoch}.")
        # With "repeat", an epoch ends a little beyond its last clip.
        check_range("position", position, 0, self.num_clips + self.world_size - 1)
        self.epoch = epoch
        self.position = position

    def state_dict(self, position: int) -> dict[str, int]:
        """Describe where the run is; goes into its checkpoint.

        Args:
            position: Clips of this epoch that all ranks together have taken: steps times clips per
                step times ranks.

        Returns:
            Plain numbers.

        Raises:
            ValueError: If the position is out of range.
        """
        check_range("position", position, 0, self.num_clips + self.world_size - 1)
        return {
            "seed": self.seed,
            "num_clips": self.num_clips,
            "epoch": self.epoch,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where a run was stopped.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it is of another order: another seed or another number of clips.
        """
        for name in ("seed", "num_clips"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the run that is resumed had `{name}` {state[name]}, this one has "
                    f"{getattr(self, name)}: its order cannot be continued."
                )
        self.set_epoch(state["epoch"], position=state["position"])

    def _share(self) -> tuple[int, int]:
        """Clips that are left, and how many of them (or beyond them) are dealt out."""
        left = max(self.num_clips - self.position, 0)
        uneven = left % self.world_size
        if self.remainder == "keep" or not uneven:
            return left, left
        return left, left - uneven + (self.world_size if self.remainder == "repeat" else 0)

    def __len__(self) -> int:
        _, dealt = self._share()
        return len(range(self.rank, dealt, self.world_size))

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_clips)
        else:
            order = np.arange(self.num_clips)
        left, dealt = self._share()
        rest = order[self.position :]
        if dealt > left:
            # From the start of the epoch again, as often as it takes.
            rest = np.concatenate([rest, np.resize(order, dealt - left)])
        return iter(rest[:dealt][self.rank :: self.world_size].tolist())


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
