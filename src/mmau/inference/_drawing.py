"""Landmarks, region boxes and Action Unit bars drawn into one picture, with OpenCV."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmau._optional import require
from mmau.inference._table import AUTable
from mmau.landmarks import IBUG68

__all__ = ["FrameCanvas"]

_SMALLEST_HEIGHT = 360  # below, names of Action Units cannot be read
_PANEL = 0.42  # width of a person's panel as a share of the height
_MOST_PANELS = 3
_LEAST_LINES = 14  # with few Action Units, lines would be too high for the width of a panel
_INK, _FAINT, _ACTIVE, _PAPER = (235, 235, 235), (120, 120, 120), (255, 170, 60), (28, 28, 28)


class FrameCanvas:
    """Draws rows of a table into the frames of its video.

    Args:
        table: With landmarks and boxes.
        height: Height of the frames in pixels.
        width: Width of the frames in pixels.

    Raises:
        MissingDependencyError: If OpenCV is not installed.
    """

    def __init__(self, table: AUTable, height: int, width: int) -> None:
        self._cv2 = require("cv2", purpose="drawing into a video", extra="landmarks")
        self._table = table
        self._scale = max(1, -(-_SMALLEST_HEIGHT // height))
        self._size = (height * self._scale, width * self._scale)
        self.height = _even(self._size[0])
        # As many panels as there are people at once.
        _, people = np.unique(table.frames, return_counts=True)
        self._num_panels = min(int(people.max(initial=1)), _MOST_PANELS)
        self._panel = round(_PANEL * self.height)
        self.width = _even(self._size[1] + self._num_panels * self._panel)
        self._derived = IBUG68.derived_matrix().double().numpy()
        self._colours = [
            _bright(0.618 * region) for region in range(len(IBUG68.regions))
        ]  # steps of the golden ratio keep neighbours in the list apart in hue

    def draw(self, image: NDArray[np.uint8], rows: list[int]) -> NDArray[np.uint8]:
        """Draw one frame.

        Args:
            image: `(h, w, 3)`, RGB.
            rows: Rows of the table that belong to it, one per person.

        Returns:
            `(height, width, 3)`, the picture on the left and a panel per person on the right.
        """
        cv2 = self._cv2
        height, width = self._size
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas = np.empty((self.height, self.width, 3), dtype=np.uint8)
        canvas[:] = _PAPER
        picture = image.copy()
        for row in rows:
            if self._table.valid[row]:
                self._draw_face(picture, row)
        canvas[:height, :width] = picture
        for place, row in enumerate(rows[: self._num_panels]):
            self._draw_panel(canvas, row, width + place * self._panel)
        return canvas

    # ------------------------------------------------------------------ inside
    def _draw_face(self, picture: NDArray[np.uint8], row: int) -> None:
        cv2, table = self._cv2, self._table
        if table.landmarks is None:
            return
        points = table.landmarks[row].astype(np.float64) * self._scale
        everything = np.concatenate([points, self._derived @ points])
        for colour, members in zip(self._colours, IBUG68.regions.values(), strict=True):
            inside = everything[list(members)]
            low, high = _pixels(inside.min(0) - 1), _pixels(inside.max(0) + 1)
            cv2.rectangle(picture, low, high, colour, 1, cv2.LINE_AA)
        radius = max(1, round(np.ptp(points[:, 1]) / 110))
        for point in points:
            cv2.circle(picture, _pixels(point), radius, _INK, -1, cv2.LINE_AA)
        if table.face_id is not None and table.boxes is not None:
            left, top = (table.boxes[row, :2] * self._scale).tolist()
            self._text(
                picture, f"{int(table.face_id[row])}", (left, max(12.0, top - 6)), 0.6, _ACTIVE
            )

    def _draw_panel(self, canvas: NDArray[np.uint8], row: int, left: int) -> None:
        table = self._table
        names = table.au_names
        line = self.height / max(len(names) + 2, _LEAST_LINES)
        size = line / 42
        title = "" if table.face_id is None else f"person {int(table.face_id[row])}  "
        heading = f"{title}{table.timestamps[row]:.2f} s"
        valid = bool(table.valid[row])
        if not valid:
            heading += "  no face"
        self._text(
            canvas, heading, (left + 0.3 * line, 0.8 * line), size, _INK if valid else _FAINT
        )
        start = left + round(2.9 * line)
        span = left + self._panel - round(0.4 * line) - start
        for c, name in enumerate(names):
            middle = (c + 1.7) * line
            active = bool(table.active[row, c])
            colour = (_ACTIVE if active else _INK) if valid else _FAINT
            self._text(canvas, name, (left + 0.3 * line, middle + 0.22 * line), size, colour)
            probability = float(np.nan_to_num(table.probability[row, c]))
            low, high = round(middle - 0.27 * line), round(middle + 0.27 * line)
            canvas[low:high, start : start + span] = (60, 60, 60)
            canvas[low:high, start : start + round(span * probability)] = colour

    def _text(
        self,
        picture: NDArray[np.uint8],
        text: str,
        place: tuple[float, float],
        size: float,
        colour: tuple[int, int, int],
    ) -> None:
        cv2 = self._cv2
        cv2.putText(
            picture, text, _pixels(place), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA
        )


def _pixels(point: Any) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


def _bright(hue: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _even(size: int) -> int:
    return size + size % 2
