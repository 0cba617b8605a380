"""Thresholds with the highest F1, exactly; drawn towards a default where they rest on little."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from mmau._checks import check_range, check_shapes

SHRINKAGE = 2.0
"""How many videos the default threshold is worth, unless something else is said."""

# A threshold of exactly 0 or 1 has no log-odds.
CERTAIN = 1e-6


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


def shrink_thresholds(
    thresholds: Tensor,
    num_groups: Tensor,
    *,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> Tensor:
    r"""Draw thresholds towards a default, the more the fewer videos they were chosen on.

    $$
    \text{logit}(\tau') = \frac{v}{v + s} \text{logit}(\tau) + \frac{s}{v + s} \text{logit}(\tau_0)
    $$

    with v the number of videos in which the Action Unit occurs, s the `shrinkage` and $\tau_0$ the
    default. Frames do not count: a smile of a thousand frames is one observation of where to cut.
    With v = s the threshold lies halfway (in log-odds); with v = 0 it is the default; with s = 0
    nothing is shrunk. An Action Unit that occurs in a hundred videos hardly moves.

    Args:
        thresholds: `(c)`, in [0, 1].
        num_groups: `(c)`, videos with at least one frame labelled 1, per Action Unit.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth, at least 0.

    Returns:
        `(c)`, float64, in [0, 1].

    Raises:
        ValueError: If shapes differ or a number is out of range.

    Examples:
        >>> import torch
        >>> shrink_thresholds(torch.tensor([0.2, 0.2]), torch.tensor([2, 200]))  # odds 1/4 -> 1/2
        tensor([0.3333, 0.2022], dtype=torch.float64)
    """
    check_shapes(thresholds=(thresholds, "c"), num_groups=(num_groups, "c"))
    check_range("default", default, 0, 1, open_low=True, open_high=True)
    check_range("shrinkage", shrinkage, 0, float("inf"), open_high=True)
    if not bool(((thresholds >= 0) & (thresholds <= 1)).all()):
        raise ValueError(f"`thresholds` must be in [0, 1]; got {thresholds.tolist()}.")
    if not bool((num_groups >= 0).all()):
        raise ValueError(f"`num_groups` must not be negative; got {num_groups.tolist()}.")
    thresholds, count = thresholds.double(), num_groups.double()
    if shrinkage == 0:
        return torch.where(count > 0, thresholds, default)
    share = count / (count + shrinkage)
    start = torch.tensor(default, dtype=torch.float64).logit()
    logits = thresholds.clamp(CERTAIN, 1 - CERTAIN).logit()
    return (share * logits + (1 - share) * start).sigmoid()


def fit_thresholds(
    probs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str] | None = None,
    default: float = 0.5,
    shrinkage: float = SHRINKAGE,
) -> Tensor:
    """Choose thresholds on all given videos: what a checkpoint ships, not what a table reports.

    `best_thresholds` over all frames, then `shrink_thresholds` by the number of videos in which an
    Action Unit occurs.

    Args:
        probs: Video (trial) name to `(t, c)` probabilities in [0, 1].
        targets: The same names to `(t, c)` labels, 1, 0, or -1 or NaN.
        groups: Name to what counts as one video. Each name is its own group if left out.
        default: Threshold to draw towards, in (0, 1).
        shrinkage: Videos that the default is worth; 0 for none.

    Returns:
        `(c)`, float64.

    Raises:
        ValueError: If there is no video, and as `best_thresholds` and `shrink_thresholds`.

    Examples:
        >>> import torch
        >>> probs = {"a": torch.tensor([[0.1], [0.3]])}
        >>> fit_thresholds(probs, {"a": torch.tensor([[0], [1]])}, shrinkage=0)
        tensor([0.2000], dtype=torch.float64)
        >>> fit_thresholds(probs, {"a": torch.tensor([[0], [1]])})  # one video against two
        tensor([0.3865], dtype=torch.float64)
    """
    if not probs:
        raise ValueError("`probs` must hold at least one video; got none.")
    prob = torch.cat([probs[name] for name in probs])
    target = torch.cat([targets[name] for name in probs])
    best = best_thresholds(prob, target, default=default)
    count = num_positive_groups({name: targets[name] for name in probs}, groups)
    return shrink_thresholds(best, count, default=default, shrinkage=shrinkage)


def num_positive_groups(
    targets: Mapping[str, Tensor], groups: Mapping[str, str] | None = None
) -> Tensor:
    """Count the groups of videos in which each Action Unit is labelled 1 at least once."""
    occurs: dict[str, Tensor] = {}
    for name, target in targets.items():
        group = name if groups is None else groups[name]
        here = (target == 1).any(0).cpu()
        occurs[group] = occurs[group] | here if group in occurs else here
    return torch.stack(list(occurs.values())).sum(0)


def deal_folds(
    names: Collection[str],
    others: Collection[str],
    groups: Mapping[str, str] | None,
    *,
    num_folds: int,
    seed: int,
) -> dict[str, int]:
    """Deal groups of videos into folds, by name, so that the order of a mapping does not matter."""
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
