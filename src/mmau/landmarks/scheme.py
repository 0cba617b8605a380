"""What a set of facial landmarks is: how many points, which form a region, which mirror which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from mmau._checks import check_shapes, did_you_mean


def _as_indices(owner: str, points: object, num_all: int) -> tuple[int, ...]:
    """Check one list of point indices; errors name its owner."""
    if isinstance(points, (str, bytes)) or not isinstance(points, Iterable):
        raise TypeError(f"{owner} must be a sequence of point indices; got {points!r}.")
    indices = tuple(points)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise TypeError(f"{owner} must hold integers; got {index!r}.")
        if not 0 <= int(index) < num_all:
            raise ValueError(
                f"{owner} names point {index}, but points run from 0 to {num_all - 1}."
            )
    plain = tuple(int(index) for index in indices)
    if not plain:
        raise ValueError(f"{owner} is empty; it needs at least one point.")
    if len(set(plain)) != len(plain):
        twice = sorted({index for index in plain if plain.count(index) > 1})
        raise ValueError(f"{owner} names point {twice[0]} twice.")
    return plain


def _check_involution(owner: str, permutation: Sequence[int], size: int, what: str) -> None:
    if sorted(permutation) != list(range(size)):
        raise ValueError(f"{owner} must be a permutation of 0 to {size - 1}; got {permutation!r}.")
    for index, image in enumerate(permutation):
        if permutation[image] != index:
            raise ValueError(
                f"{owner} must undo itself, but {what} {index} goes to {image} "
                f"and {image} goes to {permutation[image]}."
            )


@dataclass(frozen=True)
class LandmarkScheme:
    r"""A landmark convention as data: regions, mirror tables and points derived from others.

    "Left" and "right" are the subject's own, as in FACS: the right brow is left in the image.
    Derived points stand where a convention has none (iBUG-68 has no cheek and no forehead). Each is
    a weighted sum of the scheme's own points whose weights sum to one, so that it moves, turns and
    scales with the face. Derived point `i` has the index `num_points + i` in `regions`.

    Args:
        name: Name of the convention.
        num_points: Number `k` of points that a detector returns.
        regions: Region name to the indices of its points, own or derived. Their order is the order
            of the regions axis `m` everywhere.
        mirror: For each point, the point that takes its place in a mirrored image; or `None`.
        region_mirror: Region name to the name of its mirror image; regions left out mirror onto
            themselves. Needs `mirror`.
        derived: Name of a derived point to `{point index: weight}`, weights summing to one.

    Raises:
        TypeError: If a table holds something other than integers.
        ValueError: If a table names points or regions that do not exist, is empty, names a point
            twice, or is not symmetric under its own mirror.

    Examples:
        >>> scheme = LandmarkScheme(
        ...     "three", 3, {"right": (0, 3), "left": (1, 4), "chin": (2,)},
        ...     mirror=(1, 0, 2), region_mirror={"right": "left", "left": "right"},
        ...     derived={"right_cheek": {0: 0.5, 2: 0.5}, "left_cheek": {1: 0.5, 2: 0.5}},
        ... )
        >>> scheme.region_permutation
        (1, 0, 2)
        >>> scheme.derived_matrix()
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 0.5000, 0.5000]])
    """

    name: str
    num_points: int
    regions: Mapping[str, Sequence[int]]
    mirror: tuple[int, ...] | None = None
    region_mirror: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_points < 1:
            raise ValueError(f"`num_points` must be at least 1; got {self.num_points}.")
        if not isinstance(self.regions, Mapping) or not self.regions:
            raise ValueError(
                "`regions` must map at least one region name to point indices, such as "
                f"{{'nose': (27, 28)}}; got {self.regions!r}."
            )
        self._check_derived()
        num_all = self.num_points + len(self.derived)
        regions = {
            region: _as_indices(f"region {region!r}", points, num_all)
            for region, points in self.regions.items()
        }
        # A frozen dataclass is written through `object`, once, while it is being built.
        object.__setattr__(self, "regions", regions)
        for table in ("region_mirror", "derived"):
            object.__setattr__(self, table, dict(getattr(self, table)))
        self._check_mirror()

    def _check_derived(self) -> None:
        for name, weights in self.derived.items():
            _as_indices(f"derived point {name!r}", weights, self.num_points)
            total = sum(weights.values())
            if abs(total - 1) > 1e-6:
                raise ValueError(
                    f"the weights of derived point {name!r} must sum to 1; got {total:g}."
                )

    def _known_region(self, owner: str, region: str) -> None:
        if region not in self.regions:
            raise ValueError(
                f"{owner} names no region of {self.name!r}: {region!r}"
                f"{did_you_mean(region, self.regions)} Regions: {', '.join(self.regions)}."
            )

    def _check_mirror(self) -> None:
        if self.mirror is None:
            if self.region_mirror:
                raise ValueError("`region_mirror` needs `mirror`, the permutation of the points.")
            return
        object.__setattr__(self, "mirror", tuple(self.mirror))
        _check_involution("`mirror`", self.mirror, self.num_points, "point")
        for region, image in self.region_mirror.items():
            self._known_region("`region_mirror`", region)
            self._known_region("`region_mirror`", image)
        _check_involution("`region_mirror`", self.region_permutation, self.num_regions, "region")
        full = self._full_mirror()
        for region, points in self.regions.items():
            image = self.region_mirror.get(region, region)
            mirrored = {full[point] for point in points}
            if mirrored != set(self.regions[image]):
                raise ValueError(
                    f"region {region!r} mirrors onto points {sorted(mirrored)}, but region "
                    f"{image!r} holds {sorted(self.regions[image])}."
                )

    def _full_mirror(self) -> tuple[int, ...]:
        """The mirror permutation with the derived points appended."""
        assert self.mirror is not None
        full = list(self.mirror)
        rows = [dict(weights) for weights in self.derived.values()]
        for name, weights in self.derived.items():
            image = {self.mirror[point]: weight for point, weight in weights.items()}
            if image not in rows:
                raise ValueError(
                    f"derived point {name!r} has no mirror image: none is made of {image}."
                )
            full.append(self.num_points + rows.index(image))
        return tuple(full)

    @property
    def num_regions(self) -> int:
        """Number `m` of regions."""
        return len(self.regions)

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions, in the order of the axis `m`."""
        return tuple(self.regions)

    @property
    def region_permutation(self) -> tuple[int, ...]:
        """For each region, the index of its mirror image."""
        names = self.region_names
        return tuple(names.index(self.region_mirror.get(name, name)) for name in names)

    def region_table(self) -> Tensor:
        """Return the points of each region as one tensor `(m, j)` int64, padded with -1."""
        longest = max(len(points) for points in self.regions.values())
        rows = [(*points, *[-1] * (longest - len(points))) for points in self.regions.values()]
        return torch.tensor(rows, dtype=torch.int64)

    def derived_matrix(self) -> Tensor:
        """Return a matrix `(k', k)` float32: derived points are `matrix @ landmarks`."""
        matrix = torch.zeros(len(self.derived), self.num_points)
        for row, weights in enumerate(self.derived.values()):
            for point, weight in weights.items():
                matrix[row, point] = weight
        return matrix

    def subset(self, names: Sequence[str]) -> LandmarkScheme:
        """Return the same convention with some of its regions.

        Points and derived points stay. The mirror tables stay if every region's mirror image is
        among those named.

        Args:
            names: Names of regions, in the order of the new regions axis.

        Returns:
            A scheme of the same name.

        Raises:
            ValueError: If a region is unknown or named twice, or none is.

        Examples:
            >>> scheme = LandmarkScheme("two", 2, {"lip": (0,), "chin": (1,)})
            >>> scheme.subset(["chin"]).region_names
            ('chin',)
        """
        for name in names:
            self._known_region("`names`", name)
        if len(set(names)) != len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise ValueError(f"`names` has region {twice!r} twice.")
        closed = all(self.region_mirror.get(name, name) in names for name in names)
        return LandmarkScheme(
            self.name,
            self.num_points,
            {name: self.regions[name] for name in names},
            mirror=self.mirror if closed else None,
            region_mirror={
                region: image
                for region, image in self.region_mirror.items()
                if closed and region in names
            },
            derived=self.derived,
        )

    def flip(self, landmarks: Tensor, width: float) -> Tensor:
        """Return the landmarks of the image mirrored left to right.

        Args:
            landmarks: `(..., k, 2)`, x then y, in pixels or normalised.
            width: Width of the image in the same unit: pixels, or 1 if normalised.

        Returns:
            `(..., k, 2)`; point `i` is again what the scheme calls point `i`. Region tensors
            `(..., m, ...)` of the mirrored image are in the order `region_permutation`.

        Raises:
            ValueError: If the scheme has no mirror table or the shape is wrong.

        Examples:
            >>> scheme = LandmarkScheme("two", 2, {"right": (0,)}, mirror=None)
            >>> scheme.flip(torch.zeros(2, 2), 224)
            Traceback (most recent call last):
            ...
            ValueError: the scheme 'two' has no `mirror` table, so it cannot be flipped.
        """
        if self.mirror is None:
            raise ValueError(
                f"the scheme {self.name!r} has no `mirror` table, so it cannot be flipped."
            )
        check_shapes(landmarks=(landmarks, "... k 2"), sizes={"k": self.num_points})
        swapped = landmarks[..., list(self.mirror), :]
        return torch.stack((width - swapped[..., 0], swapped[..., 1]), dim=-1)
