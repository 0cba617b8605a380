"""Thresholds with the highest F1, exactly, and cross-fitted so that they can be reported."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes

__all__ = ["best_thresholds", "cross_fitted_predictions", "cross_fitted_thresholds"]


def best_thresholds(prob: Tensor, target: Tensor, *, default: float = 0.5) -> Tensor:
    """Find the thresholds with the highest F1, exactly, among all that make a difference.

    A threshold lies halfway between two neighbouring scores, or at the lowest score; of equally
    good ones the highest wins. On the data it was found on, its F1 is optimistic: score with
    `cross_fitted_predictions`.

    Args:
        prob: `(..., c)`, probability in [0, 1].
        target: `(..., c)`, 1, 0, or -1 or NaN where it is not known.
        default: Threshold of Action Units without positives, which have no best one.

    Returns:
        `(c)`, float64, for decisions `prob >= threshold`.

    Raises:
        ValueError: If the shapes differ, a labelled probability is NaN or outside [0, 1], a label
            is anything else, or `default` is outside [0, 1].

    Examples:
        >>> import torch
        >>> prob = torch.tensor([[0.1], [0.2], [0.4], [0.3]])
        >>> best_thresholds(prob, torch.tensor([[0], [1], [1], [0]]))
        tensor([0.1500], dtype=torch.float64)
    """
    check_shapes(prob=(prob, "... c"), target=(target, "... c"))
    check_range("default", default, 0, 1)
    if prob.shape != target.shape:
        raise ValueError(
            f"`prob` and `target` must have the same shape; got {tuple(prob.shape)} and "
            f"{tuple(target.shape)}."
        )
    scores = prob.detach().reshape(-1, prob.shape[-1]).double()
    labels = target.detach().reshape(scores.shape)
    known = (labels == 0) | (labels == 1)
    if not bool((known | (labels == -1) | labels.isnan()).all()):
        raise ValueError("`target` must be 0 or 1, or -1 or NaN for no label.")
    if not bool(((scores >= 0) & (scores <= 1))[known].all()):
        raise ValueError("`prob` must be in [0, 1], and not NaN, wherever there is a label.")
    found = [
        _best_threshold(scores[known[:, c], c], labels[known[:, c], c] == 1, default)
        for c in range(scores.shape[-1])
    ]
    return torch.tensor(found, dtype=torch.float64)


def _best_threshold(scores: Tensor, positive: Tensor, default: float) -> float:
    if not bool(positive.any()):
        return default
    ranked, order = scores.sort(descending=True)
    true_positive = positive[order].cumsum(0).double()
    predicted = torch.arange(1, len(ranked) + 1, device=scores.device)
    f1 = 2 * true_positive / (predicted + true_positive[-1])
    # A threshold cannot separate equal scores: only the last of a run is a possible cut.
    f1[:-1][ranked[1:] == ranked[:-1]] = -1
    best = int(f1.argmax())
    above = float(ranked[best])
    if best + 1 == len(ranked):
        return above
    below = float(ranked[best + 1])
    middle = (above + below) / 2
    # The middle of two adjacent floats rounds to one of them; then only `above` separates.
    return middle if below < middle <= above else above


def cross_fitted_thresholds(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
) -> dict[str, Tensor]:
    """Choose for each video thresholds on other videos only.

    The groups are dealt into folds; each fold gets the thresholds that are best on all others.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1].
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        groups: Name to what must stay together: the source video of `_left` and `_right` trials, or
            the subject. Each name is its own group if left out.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing; the same seed and names give the same folds.
        default: Threshold of Action Units that have no positives outside the fold.

    Returns:
        Name to `(c)` thresholds, float64, in the order of `probs`.

    Raises:
        ValueError: If the names differ, there are fewer than two groups, or as `best_thresholds`.

    Examples:
        >>> import torch
        >>> probs = {"a": torch.tensor([[0.2], [0.6]]), "b": torch.tensor([[0.4], [0.8]])}
        >>> targets = {"a": torch.tensor([[0], [1]]), "b": torch.tensor([[0], [1]])}
        >>> cross_fitted_thresholds(probs, targets)["a"]  # between 0.4 and 0.8, from b alone
        tensor([0.6000], dtype=torch.float64)
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` must be at least 2; got {num_folds}.")
    different = sorted(set(probs) ^ set(targets))
    if different:
        raise ValueError(
            f"`probs` and `targets` must hold the same videos; {len(different)} are in one of them "
            f"only, such as {different[0]!r}."
        )
    ungrouped = [name for name in probs if groups is not None and name not in groups]
    if ungrouped:
        raise ValueError(f"`groups` lacks {len(ungrouped)} videos, such as {ungrouped[0]!r}.")
    group_of = {name: name if groups is None else groups[name] for name in probs}
    names = sorted(set(group_of.values()))
    if len(names) < 2:
        raise ValueError(f"cross-fitting needs at least 2 videos or groups; got {len(names)}.")
    num_folds = min(num_folds, len(names))
    dealt = np.random.default_rng(seed).permutation(len(names))
    fold_of_group = {names[j]: i % num_folds for i, j in enumerate(dealt)}
    fold_of = {name: fold_of_group[group] for name, group in group_of.items()}
    chosen = []
    for fold in range(num_folds):
        others = [name for name in probs if fold_of[name] != fold]
        prob = torch.cat([probs[name] for name in others])
        target = torch.cat([targets[name] for name in others])
        chosen.append(best_thresholds(prob, target, default=default))
    return {name: chosen[fold_of[name]] for name in probs}


def cross_fitted_predictions(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    default: float = 0.5,
) -> dict[str, Tensor]:
    """Decide every frame with thresholds that were chosen on other videos.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1].
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        groups: Name to what must stay together, such as the source video or the subject.
        num_folds: Number of folds, at least 2; with fewer groups, one fold per group.
        seed: Start of the dealing.
        default: Threshold of Action Units that have no positives outside the fold.

    Returns:
        Name to `(t, c)` decisions, bool; `AUCounts.update` takes them as they are.

    Raises:
        ValueError: As `cross_fitted_thresholds`.
    """
    thresholds = cross_fitted_thresholds(
        probs, targets, groups=groups, num_folds=num_folds, seed=seed, default=default
    )
    return {name: prob >= thresholds[name].to(prob.device) for name, prob in probs.items()}
