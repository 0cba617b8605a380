"""The Action Units of one video over time, with its face crops and its sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmau._files import atomic_write
from mmau.plot.overlays import pyplot
from mmau.tables.formats import PredictedTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_timeline(
    table: PredictedTable,
    *,
    labels: NDArray[np.integer] | None = None,
    waveform: NDArray[np.floating] | None = None,
    audio_start: float = 0.0,
    sample_rate: int = 16000,
    images: NDArray[np.uint8] | None = None,
    num_images: int = 12,
    title: str | None = None,
) -> Figure:
    """Draw the Action Units of one video over time, with its face crops and its sound.

    Args:
        table: Predictions, such as `mmau.inference.AUTable`.
        labels: `(t, c)`, 1 present, 0 absent, -1 unknown; drawn as a bar under each curve.
        waveform: `(n,)`, sound in [-1, 1].
        audio_start: Time of the first sample, in seconds on the table's clock.
        sample_rate: Samples per second of the waveform.
        images: `(t, h, w, 3)`, face crops; some are shown above the curves.
        num_images: How many of them.
        title: Title of the figure.

    Returns:
        The figure; spans without a face are shaded.
    """
    times = np.asarray(table.timestamps)
    num_aus = len(table.au_names)
    heights = [0.9] * num_aus
    extra = [1.6] * (images is not None) + [1.0] * (waveform is not None)
    figure: Figure
    figure, axes = pyplot().subplots(
        len(extra) + num_aus,
        1,
        figsize=(11, 0.55 * num_aus + 1.1 * len(extra) + 0.8),
        height_ratios=[*extra, *heights],
        layout="constrained",
    )
    rows = list(np.atleast_1d(axes))
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    span = (float(times[0]), float(times[-1]) + step)
    if images is not None:
        _filmstrip(rows.pop(0), images, times, np.asarray(table.valid), num_images, span)
    if waveform is not None:
        row = rows.pop(0)
        thin = max(1, len(waveform) // 20000)
        seconds = audio_start + np.arange(0, len(waveform), thin) / sample_rate
        row.plot(seconds, waveform[::thin], color="0.35", linewidth=0.4)
        row.set_ylim(-1, 1)
        row.set_ylabel("sound", rotation=0, ha="right", va="center")
    for c, (name, row) in enumerate(zip(table.au_names, rows, strict=True)):
        color = f"C{c % 10}"
        row.plot(times, table.probability[:, c], color=color, linewidth=1.2)
        row.fill_between(
            times, 0, table.probability[:, c], where=table.active[:, c], color=color, alpha=0.3,
            linewidth=0, step="mid",
        )  # fmt: skip
        row.set_ylim(-0.3 if labels is not None else 0, 1)
        if labels is not None:
            for start, end in _runs(labels[:, c] == 1):
                row.broken_barh(
                    [(times[start], times[end - 1] - times[start] + step)], (-0.25, 0.18),
                    color="black",
                )  # fmt: skip
        row.axhline(0, color="0.6", linewidth=0.6)
        row.set_ylabel(name, rotation=0, ha="right", va="center")
    for row in figure.axes[1 if images is not None else 0 :]:
        for start, end in _runs(~np.asarray(table.valid)):
            row.axvspan(times[start], times[end - 1] + step, color="0.88", zorder=-1, linewidth=0)
        row.set_xlim(*span)
        row.set_yticks([])
        last = row is figure.axes[-1]
        row.spines[["top", "right", "left"]].set_visible(False)
        row.spines["bottom"].set_visible(last)
        row.tick_params(bottom=last, labelbottom=last)
    figure.axes[-1].set_xlabel(
        "seconds; curve: probability, filled: above its threshold, grey: no face found"
        + (", black bar: label" if labels is not None else "")
    )
    if title:
        figure.suptitle(title)
    return figure


def save_timeline(table: PredictedTable, path: str | Path, **options: Any) -> Path:
    """Draw a timeline straight into a file, which is complete or absent.

    Args:
        table: Predictions, such as `mmau.inference.AUTable`.
        path: PNG, PDF or SVG file to write.
        **options: Options of `draw_timeline`.

    Returns:
        The path.
    """
    figure = draw_timeline(table, **options)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
    pyplot().close(figure)
    return Path(path)


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return `(start, end)` of every run of True, `end` exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _filmstrip(
    row: Axes,
    images: NDArray[np.uint8],
    times: NDArray[np.floating],
    valid: NDArray[np.bool_],
    count: int,
    span: tuple[float, float],
) -> None:
    """Show `count` crops at their times; a frame without a face is shown as an empty tile."""
    picks = np.linspace(0, len(images) - 1, 2 * count + 1).round().astype(int)[1::2]
    size = images.shape[1]
    strip = np.full((size, size * count, 3), 225, dtype=np.uint8)
    for i, pick in enumerate(picks):
        if valid[pick]:
            strip[:, i * size : (i + 1) * size] = images[pick]
    row.imshow(strip, extent=(*span, 0, 1), aspect="auto")
    row.set_axis_off()
