"""Confidence intervals by resampling videos, for one system and for the difference between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_range
from mmau.evaluation.counts import AUCounts, f1_of_counts

CountsPerVideo: TypeAlias = "Sequence[AUCounts] | Mapping[str, AUCounts]"


@dataclass(frozen=True)
class BootstrapOptions:
    """How videos are resampled.

    Raises:
        ValueError: If an option is out of range.
    """

    num_resamples: int = 2000
    """Number of draws, at least 100."""
    confidence: float = 0.95
    """Share of the draws inside the interval, in (0, 1)."""
    seed: int = 0
    """Seed of the draws; the same seed gives the same interval."""

    def __post_init__(self) -> None:
        check_range("num_resamples", self.num_resamples, 100)
        check_range("confidence", self.confidence, 0, 1, open_low=True, open_high=True)


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, from the percentiles of a bootstrap by video."""

    estimate: float
    """The number itself, from all videos."""
    low: float
    """Lower end; NaN with a single video."""
    high: float
    """Upper end; NaN with a single video."""
    confidence: float
    """Share of the resamples between the ends."""
    num_videos: int
    """How many videos were resampled."""

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_by_video(
    counts_per_video: CountsPerVideo, options: BootstrapOptions = BootstrapOptions()
) -> Interval:
    """Estimate how much the pooled mean F1 depends on which videos were drawn.

    Videos are drawn with replacement and their counts pooled. Frames of one video resemble each
    other: an interval from resampled frames is 8 to 29 times too narrow. An Action Unit without
    positives in a resample does not enter that resample's mean.

    With few videos no resampling knows enough. In simulations of videos that differ in rate and
    difficulty, intervals of 95 % held the truth in 87 % of the cases with 8 videos, 90 % with 15,
    93 % with 30 and 94 % with 105; bias-corrected and normal intervals did no better.

    Args:
        counts_per_video: One `AUCounts` per video (per subject, where there are several videos of
            one), of the same Action Units.
        options: Number of draws, confidence and seed.

    Returns:
        Mean F1 with its interval.

    Raises:
        ValueError: With fewer than two videos, or with different Action Units.

    Examples:
        >>> import torch
        >>> videos = [AUCounts(1).update(torch.tensor([[p]]), torch.ones(1, 1)) for p in (0.9, 0.1)]
        >>> print(bootstrap_by_video(videos))
        0.667 [0.000, 1.000]
    """
    table = _table(counts_per_video)
    estimate = float(f1_of_counts(table.sum(0)).nanmean())
    return _interval(estimate, _resampled_f1(table, options).nanmean(-1), len(table), options)


def bootstrap_per_au_by_video(
    counts_per_video: Mapping[str, AUCounts], options: BootstrapOptions
) -> dict[str, Interval]:
    """Return name to F1 of each Action Unit, from the draws of `bootstrap_by_video`."""
    table = _table(counts_per_video)
    estimates, scores = f1_of_counts(table.sum(0)).tolist(), _resampled_f1(table, options)
    names = next(iter(counts_per_video.values())).au_names
    return {
        name: _interval(estimates[c], scores[:, c], len(table), options)
        for c, name in enumerate(names)
    }


def paired_bootstrap_by_video(
    first: CountsPerVideo, second: CountsPerVideo, options: BootstrapOptions = BootstrapOptions()
) -> Interval:
    """Estimate the difference in mean F1 between two systems on the same videos, first - second.

    Each draw takes the same videos for both, so the difficulty of the videos cancels: the interval
    is narrower than what two separate intervals suggest. If it excludes 0, the order of the two
    systems does not hang on the choice of videos.

    Args:
        first: One `AUCounts` per video, as a mapping by name or in an order shared with `second`.
        second: The same of the other system.
        options: Number of draws, confidence and seed.

    Returns:
        Difference of the mean F1 with its interval.

    Raises:
        ValueError: If the two were not counted on the same videos with the same labels, and as
            `bootstrap_by_video`.

    Examples:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> good = {name: AUCounts(1).update(one, one) for name in "ab"}
        >>> bad = {name: AUCounts(1).update(1 - one, one) for name in "ab"}
        >>> print(paired_bootstrap_by_video(good, bad))
        1.000 [1.000, 1.000]
    """
    if isinstance(first, Mapping) != isinstance(second, Mapping):
        raise ValueError("`first` and `second` must both be mappings by name or both sequences.")
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        different = sorted(set(first) ^ set(second))
        if different:
            raise ValueError(
                f"`first` and `second` must hold the same videos; {len(different)} are in one of "
                f"them only, such as {different[0]!r}."
            )
        second = {name: second[name] for name in first}
    tables = _table(first), _table(second)
    if tables[0].shape != tables[1].shape:
        raise ValueError(
            f"`first` and `second` must hold the same videos and Action Units; got "
            f"{tuple(tables[0].shape[:2])} and {tuple(tables[1].shape[:2])}."
        )
    positives = [table[..., 0] + table[..., 2] for table in tables]
    labelled = [table.sum(-1) for table in tables]
    if not (torch.equal(*positives) and torch.equal(*labelled)):
        raise ValueError("`first` and `second` were not counted against the same labels.")
    estimates = [float(f1_of_counts(table.sum(0)).nanmean()) for table in tables]
    scores = [_resampled_f1(table, options).nanmean(-1) for table in tables]
    difference = scores[0] - scores[1]
    return _interval(estimates[0] - estimates[1], difference, len(tables[0]), options)


# -------------------------------------------------------------------------------------- internals
def _table(counts_per_video: CountsPerVideo) -> Tensor:
    """`(v, c, 4)` float64; exact, since counts are far below 2**53."""
    if isinstance(counts_per_video, Mapping):
        counts_per_video = list(counts_per_video.values())
    videos = counts_per_video
    if len(videos) < 2:
        raise ValueError(f"an interval by video needs at least 2 videos; got {len(videos)}.")
    if len({video.au_names for video in videos}) > 1:
        raise ValueError("all videos must be counted on the same Action Units.")
    return torch.stack([video.counts for video in videos]).double()


def _resampled_f1(table: Tensor, options: BootstrapOptions) -> Tensor:
    """`(r, c)`; NaN where an Action Unit has no positives in a resample."""
    num_videos = len(table)
    rng = np.random.default_rng(options.seed)
    share = np.full(num_videos, 1 / num_videos)
    drawn = rng.multinomial(num_videos, share, size=options.num_resamples)
    pooled = torch.from_numpy(drawn).double() @ table.flatten(1)
    return f1_of_counts(pooled.reshape(-1, *table.shape[1:]))


def _interval(
    estimate: float, scores: Tensor, num_videos: int, options: BootstrapOptions
) -> Interval:
    confidence = options.confidence
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=scores.dtype)
    low, high = scores.nanquantile(ends).tolist()
    return Interval(estimate, low, high, confidence, num_videos)
