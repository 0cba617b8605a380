"""Overlays on a face: landmarks, the patches of the regions, an attention map. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mmau.landmarks import LandmarkScheme
from mmau.registry import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_attention", "draw_landmarks", "draw_regions"]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MissingDependencyError(
            "mmau.plot needs 'matplotlib', which is not installed: pip install \"mmau[plot]\"",
            name="matplotlib",
        ) from error
    return plt


def _array(values: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().to("cpu", torch.float64))
    return np.asarray(values)


def _show(image: Tensor | ArrayLike, ax: Axes | None) -> tuple[Axes, int, int]:
    """Draw the picture so that data coordinates are pixels from the top-left corner."""
    pixels = _array(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"`image` must have shape (H, W, 3) or (3, H, W); got {tuple(np.shape(_array(image)))}."
        )
    height, width = pixels.shape[:2]
    if ax is None:
        plt = _pyplot()
        ax = plt.figure(figsize=(5, 5 * height / width)).add_axes((0, 0, 1, 1))
    # Values of 0 to 255 may arrive as floats: they are those that leave [0, 1].
    scale = 255 if pixels.dtype == np.uint8 or pixels.max() > 1 else 1
    ax.imshow(np.clip(pixels / scale, 0, 1), extent=(0, width, height, 0))
    ax.set_axis_off()
    return ax, height, width


def draw_landmarks(
    image: Tensor | ArrayLike,
    landmarks: Tensor | ArrayLike,
    *,
    scheme: LandmarkScheme | None = None,
    numbers: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw landmarks on a picture.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        landmarks: `(k, 2)`, x then y, in pixels; NaN is left out.
        scheme: Colours the points by region and adds the derived ones as crosses.
        numbers: Whether to write the index beside each point.
        ax: Axes to draw on; a new figure if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong.
        MissingDependencyError: If matplotlib is not installed.

    Examples:
        >>> ax = draw_landmarks(np.zeros((8, 8, 3)), [[2.0, 3.0]])
        >>> [float(edge) for edge in ax.get_xlim()]
        [0.0, 8.0]
    """
    points = _array(landmarks)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"`landmarks` must have shape (k, 2); got {points.shape}.")
    if scheme is not None and len(points) != scheme.num_points:
        raise ValueError(
            f"`landmarks` must have the {scheme.num_points} points of {scheme.name!r}; "
            f"got {len(points)}."
        )
    ax, _, _ = _show(image, ax)
    if scheme is None:
        ax.scatter(points[:, 0], points[:, 1], s=9, c="cyan", linewidths=0)
    else:
        own = len(points)
        points = np.concatenate([points, np.asarray(scheme.derived_matrix()) @ points])
        ax.scatter(points[:own, 0], points[:own, 1], s=6, c="white", linewidths=0)
        for indices, colour in zip(
            scheme.regions.values(), _colours(scheme.num_regions), strict=True
        ):
            for marker, chosen in (
                ("o", [index for index in indices if index < own]),
                ("x", [index for index in indices if index >= own]),
            ):
                ax.scatter(
                    points[chosen, 0], points[chosen, 1], s=14, color=colour, marker=marker, lw=1
                )
    if numbers:
        for index, (x, y) in enumerate(points):
            if np.isfinite((x, y)).all():
                ax.annotate(str(index), (x, y), fontsize=5, color="white")
    return ax


def draw_regions(
    image: Tensor | ArrayLike,
    weights: Tensor | ArrayLike,
    grid_size: tuple[int, int],
    names: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw the patches of each region on a picture; a patch of several regions is striped.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        weights: `(m, p)`, weights of `LandmarkToPatch` for this picture.
        grid_size: Rows and columns `(h, w)` of the patch grid.
        names: Names of the `m` regions.
        ax: Axes to draw on; a new figure if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If the weights do not fit the grid or the names.
        MissingDependencyError: If matplotlib is not installed.

    Examples:
        >>> weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> ax = draw_regions(np.zeros((8, 8, 3)), weights, (2, 2), ("brow", "chin"))
        >>> [text.get_text() for text in ax.texts]
        ['brow', 'chin']
    """
    rows, columns = grid_size
    share = _array(weights)
    if share.shape != (len(names), rows * columns):
        raise ValueError(
            f"`weights` must have shape ({len(names)}, {rows * columns}), {len(names)} names by "
            f"{rows} x {columns} patches; got {share.shape}."
        )
    ax, height, width = _show(image, ax)
    member = share > 0
    step_x, step_y = width / columns, height / rows
    _grid_lines(ax, rows, columns, height, width)
    from matplotlib.patches import Rectangle

    colours = _colours(len(names))

    for patch in np.flatnonzero(member.any(axis=0)).tolist():
        owners = np.flatnonzero(member[:, patch])
        top, start = divmod(patch, columns)
        for place, owner in enumerate(owners):
            corner = ((start + place / len(owners)) * step_x, top * step_y)
            colour = colours[owner]
            ax.add_patch(
                Rectangle(
                    corner, step_x / len(owners), step_y, color=colour, alpha=0.5, linewidth=0
                )
            )
    for region, name in enumerate(names):
        row, column = np.divmod(np.flatnonzero(member[region]), columns)
        if len(row):
            ax.text(
                (column.mean() + 0.5) * step_x,
                (row.mean() + 0.5) * step_y,
                name.replace("_", "\n"),
                fontsize=6,
                color="white",
                ha="center",
                va="center",
                bbox={"facecolor": colours[region], "pad": 1.0, "linewidth": 0},
            )
    return ax


def draw_attention(
    image: Tensor | ArrayLike,
    attention_map: Tensor | ArrayLike,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw an attention map over a picture, patch by patch, brighter where more is attended.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        attention_map: `(h, w)`, attention of one region on the patch grid, at least 0: one head,
            or the mean of the heads, such as `out.attention[0].mean(0)[region].view(h, w)`.
        ax: Axes to draw on; a new figure if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong.
        MissingDependencyError: If matplotlib is not installed.

    Examples:
        >>> ax = draw_attention(np.zeros((8, 8, 3)), torch.rand(2, 2))
        >>> len(ax.images)
        2
    """
    heat = _array(attention_map)
    if heat.ndim != 2:
        raise ValueError(
            f"`attention_map` must have shape (h, w), the patch grid; got {heat.shape}."
        )
    ax, height, width = _show(image, ax)
    # The picture stays clear where nothing is attended.
    opacity = 0.8 * heat / max(float(heat.max()), np.finfo(float).tiny)
    ax.imshow(
        heat,
        extent=(0, width, height, 0),
        cmap="plasma",
        alpha=opacity,
        interpolation="nearest",
        vmin=0.0,
    )
    return ax


def _grid_lines(ax: Axes, rows: int, columns: int, height: int, width: int) -> None:
    ax.vlines(np.linspace(0, width, columns + 1), 0, height, colors="white", lw=0.3, alpha=0.4)
    ax.hlines(np.linspace(0, height, rows + 1), 0, width, colors="white", lw=0.3, alpha=0.4)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)


def _colours(count: int) -> list[Any]:
    plt = _pyplot()
    # Steps of the golden ratio keep neighbours in the list apart in hue.
    return [plt.get_cmap("hsv")((region * 0.618) % 1.0) for region in range(count)]
