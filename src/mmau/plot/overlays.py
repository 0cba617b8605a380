"""Overlays on a face: landmarks, the patches of the regions, an attention map. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mmau._checks import check_choice
from mmau._optional import require
from mmau.landmarks import LandmarkScheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pyplot() -> Any:
    """Import matplotlib when something is drawn."""
    return require("matplotlib.pyplot", purpose="mmau.plot", extra="plot")


def _array(values: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().to("cpu", torch.float64))
    return np.asarray(values)


def _show(
    image: Tensor | ArrayLike, ax: Axes | None, *, grey: bool = False
) -> tuple[Axes, int, int]:
    """Draw the image so that data coordinates are pixels from the top-left corner."""
    pixels = _array(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"`image` must have shape (H, W, 3) or (3, H, W); got {tuple(np.shape(_array(image)))}."
        )
    height, width = pixels.shape[:2]
    if ax is None:
        ax = pyplot().figure(figsize=(5, 5 * height / width)).add_axes((0, 0, 1, 1))
    # Values of 0 to 255 may arrive as floats: they are those that leave [0, 1].
    scale = 255 if pixels.dtype == np.uint8 or pixels.max() > 1 else 1
    shown = np.clip(pixels / scale, 0, 1)
    if grey:
        shown = np.repeat((shown @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)
    ax.imshow(shown, extent=(0, width, height, 0))
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
    """Draw landmarks on an image.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        landmarks: `(k, 2)`, x then y, in pixels; NaN is left out.
        scheme: Colours the points by region and adds the derived ones as diamonds.
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
        ax.scatter(points[:, 0], points[:, 1], s=12, c="cyan", edgecolors="black", linewidths=0.4)
    else:
        own = len(points)
        points = np.concatenate([points, np.asarray(scheme.derived_matrix()) @ points])
        ax.scatter(points[:own, 0], points[:own, 1], s=8, c="white", edgecolors="black", lw=0.3)
        colours = _colours(scheme.region_names)
        for indices, colour in zip(scheme.regions.values(), colours, strict=True):
            region = np.asarray(indices)
            for marker, size, chosen in (
                ("o", 18, region[region < own]),
                ("D", 12, region[region >= own]),
            ):
                x, y = points[chosen].T
                ax.scatter(
                    x, y, s=size, color=colour, marker=marker, edgecolors="black", linewidths=0.4
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
    labels: Literal["legend", "inside", "none"] = "legend",
    ax: Axes | None = None,
) -> Axes:
    """Draw the patches of each region on an image; a patch of several regions is striped.

    The image is shown in grey, so that colours mean regions. Left and right of a pair have one
    hue, the left one is lighter. A patch is as opaque as its weight; below a tenth of the largest
    one it is left out. A region without landmarks, whose weights are even, is not drawn, and the
    legend says so.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        weights: `(m, p)`, weights of `LandmarkToPatch` for this image.
        grid_size: Rows and columns `(h, w)` of the patch grid.
        names: Names of the `m` regions.
        labels: Where to write the names: `"legend"`, right of the image; `"inside"`, on the
            regions, for few of them; `"none"`.
        ax: Axes to draw on; a new figure if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If the weights do not fit the grid or the names, or `labels` is none of these.
        MissingDependencyError: If matplotlib is not installed.

    Examples:
        >>> weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> ax = draw_regions(np.zeros((8, 8, 3)), weights, (2, 2), ("brow", "chin"))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['brow', 'chin']
    """
    check_choice("labels", labels, ("legend", "inside", "none"))
    rows, columns = grid_size
    share = _array(weights)
    if share.shape != (len(names), rows * columns):
        raise ValueError(
            f"`weights` must have shape ({len(names)}, {rows * columns}), {len(names)} names by "
            f"{rows} x {columns} patches; got {share.shape}."
        )
    if ax is None:
        width = 7 if labels == "legend" else 5
        ax = pyplot().figure(figsize=(width, 5)).add_axes((0, 0, 5 / width, 1))
    ax, height, width = _show(image, ax, grey=True)
    from matplotlib.patches import Rectangle

    largest = share.max(axis=1, keepdims=True)
    known = (share.min(axis=1, keepdims=True) < largest) | (share.shape[1] == 1)
    member = known & (share >= 0.1 * largest) & (share > 0)
    step_x, step_y = width / columns, height / rows
    _grid_lines(ax, rows, columns, height, width)
    colours = _colours(names)
    for patch in np.flatnonzero(member.any(axis=0)).tolist():
        owners = np.flatnonzero(member[:, patch])
        top, start = divmod(patch, columns)
        for place, owner in enumerate(owners):
            corner = ((start + place / len(owners)) * step_x, top * step_y)
            ax.add_patch(
                Rectangle(
                    corner,
                    step_x / len(owners),
                    step_y,
                    color=colours[owner],
                    alpha=0.55 * float(share[owner, patch] / largest[owner, 0]),
                    linewidth=0,
                )
            )
    for region, colour in enumerate(colours):
        _outline(ax, member[region].reshape(rows, columns), height, width, colour)
    if labels == "legend":
        _legend(ax, names, colours, known[:, 0].tolist())
    elif labels == "inside":
        _inside(ax, member.reshape(-1, rows, columns), names, colours, (step_x, step_y))
    return ax


def draw_attention(
    image: Tensor | ArrayLike,
    attention_map: Tensor | ArrayLike,
    *,
    query: Tensor | ArrayLike | None = None,
    colorbar: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw an attention map over an image, patch by patch, brighter where more is attended.

    The image is shown in grey and stays clear where little is attended. The scale runs from zero to
    at least twice uniform attention, so a uniform map looks uniform.

    Args:
        image: `(H, W, 3)` or `(3, H, W)`, 0 to 255 or 0 to 1.
        attention_map: `(h, w)`, attention of one region on the patch grid, at least 0: one head,
            or the mean of the heads, such as `out.attention[0].mean(0)[region].view(h, w)`.
        query: `(h, w)`, weights of the region whose query it is; its patches are outlined.
        colorbar: Whether to add a scale, in multiples of uniform attention.
        ax: Axes to draw on; a new figure if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape is wrong, or a value is negative or not finite.
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
    if not np.isfinite(heat).all() or heat.min() < 0:
        raise ValueError(
            "`attention_map` must be finite and at least 0; its values run from "
            f"{heat.min():g} to {heat.max():g}."
        )
    region = None if query is None else _array(query)
    if region is not None and region.shape != heat.shape:
        raise ValueError(
            f"`query` must have the shape {heat.shape} of `attention_map`; got {region.shape}."
        )
    ax, height, width = _show(image, ax, grey=True)
    heat = heat / max(float(heat.mean()), np.finfo(float).tiny)
    top = max(float(heat.max()), 2.0)
    drawn = ax.imshow(
        heat,
        extent=(0, width, height, 0),
        cmap="inferno",
        alpha=0.15 + 0.7 * heat / top,
        interpolation="nearest",
        vmin=0.0,
        vmax=top,
    )
    if region is not None:
        _outline(ax, region > 0, height, width, "cyan")
    if colorbar:
        scale = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03)
        scale.set_label("times uniform attention")
    return ax


def _outline(ax: Axes, member: NDArray[Any], height: int, width: int, colour: Any) -> None:
    """Draw the border of a set of patches."""
    from matplotlib.collections import LineCollection

    rows, columns = member.shape
    padded = np.pad(member.astype(np.int8), 1)
    scale = np.array([width / columns, height / rows])
    upright = np.argwhere(np.diff(padded, axis=1)[1:-1])  # row, column of the line
    level = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])
    lines = [((x, y), (x, y + 1)) for y, x in upright] + [((x, y), (x + 1, y)) for y, x in level]
    if lines:
        ax.add_collection(LineCollection(np.asarray(lines) * scale, colors=[colour], lw=1.2))


def _legend(ax: Axes, names: Sequence[str], colours: list[Any], known: list[bool]) -> None:
    """Name the regions beside the image, and say which are not visible."""
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, label=name.replace("_", " ") + ("" if seen else " (not visible)"))
        for name, colour, seen in zip(names, colours, known, strict=True)
    ]
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False
    )


def _inside(
    ax: Axes,
    member: NDArray[Any],
    names: Sequence[str],
    colours: list[Any],
    step: tuple[float, float],
) -> None:
    """Write each name on its region."""
    for patches, name, colour in zip(member, names, colours, strict=True):
        row, column = np.nonzero(patches)
        if len(row):
            ax.text(
                (column.mean() + 0.5) * step[0],
                (row.mean() + 0.5) * step[1],
                name.replace("_", "\n"),
                fontsize=7,
                color="white",
                ha="center",
                va="center",
                bbox={"facecolor": colour, "pad": 1.0, "linewidth": 0},
            )


def _grid_lines(ax: Axes, rows: int, columns: int, height: int, width: int) -> None:
    """Draw the patch grid."""
    ax.vlines(np.linspace(0, width, columns + 1), 0, height, colors="white", lw=0.3, alpha=0.4)
    ax.hlines(np.linspace(0, height, rows + 1), 0, width, colors="white", lw=0.3, alpha=0.4)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)


def _colours(names: Sequence[str]) -> list[Any]:
    """One hue for a part of the face; its left side is lighter."""
    to_rgb = require("matplotlib.colors", purpose="mmau.plot", extra="plot").hsv_to_rgb
    parts = [name.removeprefix("left_").removeprefix("right_") for name in names]
    # Steps of the golden ratio keep neighbours in the list apart in hue.
    hues = {part: (0.618 * place) % 1.0 for place, part in enumerate(dict.fromkeys(parts))}
    return [
        to_rgb((hues[part], 0.45, 1.0) if name.startswith("left_") else (hues[part], 0.95, 0.85))
        for name, part in zip(names, parts, strict=True)
    ]
