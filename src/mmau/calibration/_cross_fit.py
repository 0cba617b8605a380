"""Decisions about a video that were not tuned on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from torch import Tensor

from mmau.calibration._thresholds import SHRINKAGE, fit_thresholds

__all__ = ["cross_fitted_predictions", "cross_fitted_thresholds", "deal_folds"]


def deal_folds(
    names: Collection[str],
    others: Collection[str],
    groups: Mapping[str, str] | None,
    *,
    num_folds: int,
    seed: int,
) -> dict[str, int]:
    """Deal groups of videos into folds, by name, so that the order of a mapping does not matter.

    Args:
        names: Names of the videos.
        others: Names that must be the same, of the labels.
        groups: Name to what must stay together; each name by itself if left out.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing.

    Returns:
        Name to fold, from 0, in the order of `names`.

    Raises:
        ValueError: If the names differ, a group is missing or there are fewer than two groups.
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` must be at least 2; got {num_folds}.")
    different = sorted(set(names) ^ set(others))
    if different:
        raise ValueError(
            f"`probs` and `targets` must hold the same videos; {len(different)} are in one of them "
            f"only, such as {different[0]!r}."
        )
    ungrouped = [name for name in names if groups is not None and name not in groups]
    if ungrouped:
        raise ValueError(f"`groups` lacks {len(ungrouped)} videos, such as {ungrouped[0]!r}.")
    group_of = {name: name if groups is None else groups[name] for name in names}
    dealt_groups = sorted(set(group_of.values()))
    if len(dealt_groups) < 2:
        raise ValueError(
            f"cross-fitting needs at least 2 videos or groups; got {len(dealt_groups)}."
        )
    num_folds = min(num_folds, len(dealt_groups))
    dealt = np.random.default_rng(seed).permutation(len(dealt_groups))
    fold_of_group = {dealt_groups[j]: i % num_folds for i, j in enumerate(dealt)}
    return {name: fold_of_group[group] for name, group in group_of.items()}


def cross_fitted_thresholds(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> dict[str, Tensor]:
    """Choose for each video thresholds on other videos only.

    The groups are dealt into folds; each fold gets the thresholds that `fit_thresholds` chooses on
    all others.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1].
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        groups: Name to what must stay together: the source video of `_left` and `_right` trials, or
            the subject. Each name is its own group if left out.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing; the same seed and names give the same folds.
        default: Threshold to draw towards, and that of Action Units that have no positives outside
            the fold.
        shrinkage: Videos that the default is worth; 0 for none.

    Returns:
        Name to `(c)` thresholds, float64, in the order of `probs`.

    Raises:
        ValueError: If the names differ, there are fewer than two groups, or as `best_thresholds`.

    Examples:
        >>> import torch
        >>> probs = {"a": torch.tensor([[0.2], [0.6]]), "b": torch.tensor([[0.4], [0.8]])}
        >>> targets = {"a": torch.tensor([[0], [1]]), "b": torch.tensor([[0], [1]])}
        >>> # Between 0.4 and 0.8, from b alone.
        >>> cross_fitted_thresholds(probs, targets, shrinkage=0)["a"]
        tensor([0.6000], dtype=torch.float64)
    """
    fold_of = deal_folds(probs, targets, groups, num_folds=num_folds, seed=seed)
    chosen = []
    for fold in range(max(fold_of.values()) + 1):
        others = {name: prob for name, prob in probs.items() if fold_of[name] != fold}
        chosen.append(
            fit_thresholds(others, targets, groups=groups, default=default, shrinkage=shrinkage)
        )
    return {name: chosen[fold_of[name]] for name in probs}


def cross_fitted_predictions(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> dict[str, Tensor]:
    """Decide every frame with thresholds that were chosen on other videos.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1].
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        groups: Name to what must stay together, such as the source video or the subject.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing.
        default: Threshold to draw towards, and that of Action Units that have no positives outside
            the fold.
        shrinkage: Videos that the default is worth; 0 for none.

    Returns:
        Name to `(t, c)` decisions, bool; `AUCounts.update` takes them as they are.

    Raises:
        ValueError: As `cross_fitted_thresholds`.
    """
    thresholds = cross_fitted_thresholds(
        probs,
        targets,
        groups=groups,
        num_folds=num_folds,
        seed=seed,
        default=default,
        shrinkage=shrinkage,
    )
    return {name: prob >= thresholds[name].to(prob.device) for name, prob in probs.items()}
