"""Landmarks to patches, region by region, as a module that knows a landmark scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_shapes
from mmau.functional.landmark_patches import (
    PatchRegions,
    check_patch_options,
    check_visible,
    landmark_patches,
)
from mmau.landmarks import LANDMARK_SCHEMES, LandmarkScheme


def _resolve(regions: str | LandmarkScheme | Mapping[str, Sequence[int]]) -> LandmarkScheme:
    if isinstance(regions, str):
        return LANDMARK_SCHEMES.get(regions)
    if isinstance(regions, LandmarkScheme):
        return regions
    if not isinstance(regions, Mapping):
        raise TypeError(
            "`regions` must be the name of a landmark scheme, a LandmarkScheme, or a table such as "
            f"{{'nose': (27, 28)}}; got {type(regions).__name__}."
        )
    indices = [i for points in regions.values() if isinstance(points, Sequence) for i in points]
    numbers = [i for i in indices if isinstance(i, int) and i >= 0]
    # The checks, and their messages, are those of the scheme.
    return LandmarkScheme("custom", max(numbers, default=0) + 1, regions)


class LandmarkToPatch(nn.Module):
    """Find the patches under the landmarks of each facial region.

    A patch counts once however many landmarks it holds. Landmarks that are NaN, infinite, off the
    image or not visible do not count; a derived point (a cheek, the forehead) counts if all points
    that it is made of are known. A region without a usable landmark is given the weights of the
    global mean and `valid=False`. The module has no parameters, and its result keeps full
    precision under autocast and in a half-precision model.

    Args:
        regions: Name of a landmark scheme (`"ibug68"`, `"mediapipe468"`), a `LandmarkScheme`, or a
            table of region names to landmark indices.
        mode: `"points"` (the paper), `"bbox"`, `"hull"` or `"gaussian"`, as in `landmark_patches`.
        coords: `"pixel"`, x from 0 to W, or `"normalized"`, x from 0 to 1. The origin is the
            top-left corner of the top-left pixel.
        ring: Number of rings of neighbouring patches to add around each region; not for a blur.
        sigma: Standard deviation of `"gaussian"` in patches, positive.

    Shape:
        - landmarks: `(..., k, 2)`, x right then y down
        - visible: `(..., k)` bool
        - output: `PatchRegions`, weights `(..., m, p)` and valid `(..., m)`

    Raises:
        UnknownComponentError: If there is no scheme of this name.
        TypeError: If `regions` is none of these, or holds something other than integers.
        ValueError: If a table names points that do not exist, or an option is out of range.

    References:
        Section 3.2 of the paper.

    Examples:
        >>> mapper = LandmarkToPatch("ibug68")
        >>> landmarks = 224 * torch.rand(2, 68, 2)
        >>> weights, valid = mapper(landmarks, grid_size=(16, 16), image_size=(224, 224))
        >>> weights.shape, bool(valid.all())
        (torch.Size([2, 13, 256]), True)
    """

    regions: Tensor
    _derived_bits: Tensor
    _derived_parts: Tensor

    def __init__(
        self,
        regions: str | LandmarkScheme | Mapping[str, Sequence[int]] = "ibug68",
        *,
        mode: Literal["points", "bbox", "hull", "gaussian"] = "points",
        coords: Literal["pixel", "normalized"] = "pixel",
        ring: int = 0,
        sigma: float = 0.5,
    ) -> None:
        super().__init__()
        check_patch_options(mode, coords, ring, sigma)
        self.scheme = _resolve(regions)
        self.mode, self.coords, self.ring, self.sigma = mode, coords, ring, sigma
        # Tables are constants: also where the weights of a model are built without memory.
        with torch.device("cpu"):
            table, matrix = self.scheme.region_table(), self.scheme.derived_matrix()
        self.register_buffer("regions", table, persistent=False)
        most = int((matrix != 0).sum(-1).amax()) if len(matrix) else 0
        # Not a product with the matrix: where a user allows fast matrix products, it would round.
        parts = matrix.abs().topk(most).indices
        weights = matrix.gather(1, parts)
        # Places without a weight name the first point again, which the derived one needs anyway.
        self.register_buffer(
            "_derived_parts", torch.where(weights != 0, parts, parts[:, :1]), persistent=False
        )
        # As the bits of float32, since `.half()` and `.to(torch.bfloat16)` round every buffer of
        # floats, and a rounded weight moves the point to another patch.
        self.register_buffer("_derived_bits", weights.view(torch.int32), persistent=False)

    @property
    def num_regions(self) -> int:
        """Number `m` of regions."""
        return self.scheme.num_regions

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions, in the order of the axis `m`."""
        return self.scheme.region_names

    def forward(
        self,
        landmarks: Tensor,
        grid_size: tuple[int, int],
        image_size: tuple[int, int],
        visible: Tensor | None = None,
    ) -> PatchRegions:
        """Map the landmarks of each frame onto its patch grid.

        Args:
            landmarks: `(..., k, 2)` float32 or float64, in pixels or normalised, as `coords` says.
            grid_size: Rows and columns `(h, w)` of the patch grid.
            image_size: Height and width `(H, W)` of the image in pixels.
            visible: `(..., k)` bool, False for landmarks to leave out.

        Returns:
            Weights `(..., m, p)`, float32, and valid regions `(..., m)`.

        Raises:
            TypeError: If the landmarks are of low precision or `visible` is not bool.
            ValueError: If the number of landmarks is not that of the scheme, or the coordinates are
                obviously in the other unit.
        """
        check_shapes(landmarks=(landmarks, "... k 2"))
        num_points, needed = landmarks.shape[-2], self.scheme.num_points
        if num_points < needed if self.scheme.name == "custom" else num_points != needed:
            with_irises = num_points == needed + 10
            hint = "; the irises come last: landmarks[..., :468, :]" if with_irises else ""
            raise ValueError(
                f"`landmarks` must have {needed} points for the regions of "
                f"{self.scheme.name!r}; got {num_points}{hint}."
            )
        check_visible(landmarks, visible)
        if len(self._derived_parts):
            landmarks, visible = self._append_derived(landmarks, visible)
        return landmark_patches(
            landmarks,
            self.regions,
            grid_size,
            image_size,
            visible=visible,
            mode=self.mode,
            coords=self.coords,
            ring=self.ring,
            sigma=self.sigma,
        )

    def _append_derived(
        self, landmarks: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add the derived points; one that is made of an unknown point is unknown, too."""
        weights = self._derived_bits.view(torch.float32).to(landmarks.dtype)
        derived = (landmarks[..., self._derived_parts, :] * weights.unsqueeze(-1)).sum(-2)
        if visible is not None:
            visible = torch.cat((visible, visible[..., self._derived_parts].all(-1)), -1)
        return torch.cat((landmarks, derived), -2), visible

    def extra_repr(self) -> str:
        """Scheme and options, as `print` shows them."""
        width = f"sigma={self.sigma:g}" if self.mode == "gaussian" else f"ring={self.ring}"
        return (
            f"{self.scheme.name!r}, num_regions={self.num_regions}, mode={self.mode!r}, "
            f"coords={self.coords!r}, {width}"
        )
