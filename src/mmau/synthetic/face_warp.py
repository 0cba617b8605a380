"""Render a photograph with its face moved by Action Units, by one backward warp per frame.

The displacements of the vertices are spread to a coarse pixel grid once per clip, separately for
what is above and what is below the mouth line; a frame then costs one matrix product and one
resampling. Between parted lips, where the photograph shows nothing, a mouth is painted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_range, check_shapes
from mmau.action_units import AU_NAMES
from mmau.synthetic.expressions import au_displacements, identity_displacement
from mmau.synthetic.face_template import (
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    FaceTemplate,
    Placement,
    build_template,
)
from mmau.synthetic.photographs import PHOTOGRAPHS, load_mesh, load_photograph

CANVAS_MARGIN = 1.25
"""Canvas side over picture side, so that head and camera motion never show its edge."""
GRID_STEP = 2
"""Pixels of the canvas per cell of the displacement fields."""
SPREAD = 0.55
"""Radius of the kernel that spreads vertex displacements, in template units."""
_INVERSION_ROUNDS = 2
_CAVITY = (74.0, 30.0, 30.0)
_TEETH = (226.0, 208.0, 186.0)


@dataclass(frozen=True)
class Face:
    """A photograph with what is known of the face in it; small enough to send to a worker."""

    name: str
    """Key of `PHOTOGRAPHS`."""
    image: np.ndarray
    """`(h, w, 3)` uint8, the whole photograph."""
    mesh: np.ndarray
    """`(468, 2)` float32 in its pixels."""
    closing: np.ndarray
    """`(468, 2)` in template units: what shuts its mouth."""
    template: FaceTemplate
    """The neutral face that all photographs share."""


def load_faces() -> tuple[Face, ...]:
    """Load both photographs, find their meshes and derive the template from them.

    Returns:
        One face per entry of `PHOTOGRAPHS`, in that order.

    Raises:
        MissingDependencyError: If matplotlib, scikit-image or MediaPipe is not installed.
    """
    meshes = [load_mesh(name) for name in PHOTOGRAPHS]
    template = build_template(
        meshes, mouth_closed=[info.mouth_closed for info in PHOTOGRAPHS.values()]
    )
    return tuple(
        Face(name, load_photograph(name), mesh, closing, template)
        for name, mesh, closing in zip(PHOTOGRAPHS, meshes, template.closing, strict=True)
    )


class FaceWarp:
    """One identity made from one photograph, ready to be rendered with any intensities."""

    def __init__(
        self,
        face: Face,
        size: int,
        *,
        face_height: float = 0.5,
        identity: np.random.Generator | None = None,
        identity_strength: float = 1.0,
    ) -> None:
        check_range("face_height", face_height, 0, 1, open_low=True)
        if size < 32 or size % 2:
            raise ValueError(f"`size` must be an even number of pixels, at least 32; got {size!r}.")
        self.size = size
        self.canvas_size = 2 * round(size * CANVAS_MARGIN / 2)
        self.template = face.template
        mesh = np.asarray(face.mesh, dtype=np.float64)
        scale = face_height * size / float(np.ptp(mesh[:, 1]))
        middle = (mesh.min(0) + mesh.max(0)) / 2 - (0, 0.06 * np.ptp(mesh[:, 1]))
        corner = middle - self.canvas_size / scale / 2
        self._photograph = _cut_canvas(face.image, corner, scale, self.canvas_size)
        found = (mesh - corner) * scale

        still = face.closing.copy()
        if identity is not None:
            still += identity_strength * identity_displacement(face.template, identity)
        to_canvas = Placement.of(found).matrix
        self._unit = Placement.of(found).unit
        moves = au_displacements(face.template) @ to_canvas.T
        still = still @ to_canvas.T
        neutral = found + still
        basis = np.concatenate([moves, still[None]])
        grids = [
            _spread(neutral[side], basis[:, side], self.canvas_size, SPREAD * self._unit)
            for side in (face.template.upper, face.template.lower)
        ]
        self._upper, self._lower = (torch.from_numpy(grid) for grid in grids)
        self._plain = _join_at_mouth(self._upper, self._lower, neutral, self.canvas_size)
        self._neutral = torch.from_numpy(neutral.astype(np.float32))
        self._moves = torch.from_numpy(moves.astype(np.float32))

    def vertices(self, intensities: Tensor, view: Tensor | None = None) -> Tensor:
        """Compute where the mesh is in the rendered pictures."""
        moved = self._neutral + torch.einsum("tc,cvx->tvx", intensities.float(), self._moves)
        view = self._view(len(intensities), view)
        placed = torch.linalg.solve(
            view[:, None, :, :2],
            (2 * moved / self.canvas_size - 1 - view[:, None, :, 2])[..., None],
        )[..., 0]
        placed = (placed + 1) * self.size / 2
        mirrored = torch.linalg.det(view[:, :, :2]) < 0
        swapped = placed[:, torch.from_numpy(self.template.mirror)]
        return torch.where(mirrored[:, None, None], swapped, placed)

    def render(self, intensities: Tensor, view: Tensor | None = None, *, batch: int = 32) -> Tensor:
        """Render one picture per row of intensities."""
        check_shapes(intensities=(intensities, f"t {len(AU_NAMES)}"))
        view = self._view(len(intensities), view)
        pictures = torch.empty(len(intensities), self.size, self.size, 3, dtype=torch.uint8)
        with torch.no_grad():
            for start in range(0, len(intensities), batch):
                stop = start + batch
                some = self._render(intensities[start:stop].float(), view[start:stop])
                pictures[start:stop] = some.clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
        return pictures

    # ------------------------------------------------------------------ one batch
    def _view(self, length: int, view: Tensor | None) -> Tensor:
        if view is None:
            centred = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
            centred[:, :2] *= self.size / self.canvas_size
            return centred.expand(length, 2, 3)
        check_shapes(view=(view, "t 2 3"), sizes={"t": length})
        return view.float()

    def _render(self, intensities: Tensor, view: Tensor) -> Tensor:
        shape = [len(intensities), 3, self.size, self.size]
        look = F.affine_grid(view, shape, align_corners=False)
        pictures = self._sample(self._plain, intensities, look)
        rows, columns = self._mouth_box(intensities, view)
        there = look[:, rows, columns]
        if there.numel():
            pictures[:, :, rows, columns] = self._render_mouth(intensities, there)
        return pictures

    def _sample(self, basis: Tensor, intensities: Tensor, look: Tensor) -> Tensor:
        """Look up the photograph where the face at `look` came from.

        The expression moves points of the *neutral* face, so the way back is the fixed point of
        `origin = look - movement(origin)`; two rounds leave a small fraction of a pixel.
        """
        to_unit = 2 / self.canvas_size
        moves = torch.einsum("tc,cxhw->txhw", intensities, basis[:-1]) * to_unit
        still = basis[-1:].expand(len(look), -1, -1, -1) * to_unit
        origin = look
        for _ in range(_INVERSION_ROUNDS):
            origin = look - _lookup(moves, origin).permute(0, 2, 3, 1)
        source = origin - _lookup(still, origin).permute(0, 2, 3, 1)
        return _lookup(self._photograph.expand(len(look), -1, -1, -1), source)

    def _mouth_box(self, intensities: Tensor, view: Tensor) -> tuple[slice, slice]:
        """Rows and columns of the picture in which any lip of the batch lies, with some margin."""
        lips = sorted({*INNER_UPPER_LIP, *INNER_LOWER_LIP})
        points = self.vertices(intensities, view)[:, lips].reshape(-1, 2)
        margin = 0.6 * self._unit + 2
        low = (points.amin(0) - margin).floor().long().clamp(0, self.size)
        high = (points.amax(0) + margin).ceil().long().clamp(0, self.size)
        return slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))

    def _render_mouth(self, intensities: Tensor, look: Tensor) -> Tensor:
        """Render the box around the mouth with a seam between the lips and a mouth in the gap."""
        position = (look + 1) * self.canvas_size / 2
        moved = self._neutral + torch.einsum("tc,cvx->tvx", intensities, self._moves)
        top = _curve(moved[:, list(INNER_UPPER_LIP)], position[..., 0], self.canvas_size)
        bottom = _curve(moved[:, list(INNER_LOWER_LIP)], position[..., 0], self.canvas_size)
        bottom = torch.maximum(top, bottom)
        gap, y = bottom - top, position[..., 1]
        below, above = torch.sigmoid((y - bottom) / 0.35), torch.sigmoid((top - y) / 0.35)
        # Closed lips meet at a soft line; parted ones split at the middle, under the painted gap.
        seam = torch.sigmoid((y - (top + bottom) / 2) / 0.5)
        seam = torch.where(gap < 1.5, seam, below / (below + above + 1e-6))[:, None]
        upper = self._sample(self._upper, intensities, look)
        lower = self._sample(self._lower, intensities, look)
        lips = upper + (lower - upper) * seam

        depth = ((y - top) / (gap + 1e-3)).clamp(0, 1)[:, None]
        cavity = torch.tensor(_CAVITY)[:, None, None] * (1 - 0.35 * depth)
        teeth = torch.sigmoid((0.3 - depth) * 14) * (gap / (0.8 * self._unit)).clamp(0, 1)[:, None]
        inside = cavity + (torch.tensor(_TEETH)[:, None, None] - cavity) * 0.85 * teeth
        parted = ((1 - below) * (1 - above) * (gap / 1.5).clamp(0, 1))[:, None]
        return lips + (inside - lips) * parted


def _lookup(values: Tensor, at: Tensor) -> Tensor:
    """Bilinear values `(t, c, h, w)` at places `(t, h', w', 2)` between -1 and 1."""
    return F.grid_sample(values, at, padding_mode="border", align_corners=False)


def _cut_canvas(image: np.ndarray, corner: np.ndarray, scale: float, size: int) -> Tensor:
    """Resample the photograph to the canvas, averaging where it shrinks."""
    fine = max(1, int(np.ceil(1 / scale)))
    pixels = (np.arange(size * fine) + 0.5) / (scale * fine)
    height, width = image.shape[:2]
    x = torch.from_numpy((pixels + corner[0]) * 2 / width - 1).float()
    y = torch.from_numpy((pixels + corner[1]) * 2 / height - 1).float()
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    picture = F.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(picture, fine)


def _spread(centres: np.ndarray, basis: np.ndarray, size: int, radius: float) -> np.ndarray:
    """Spread displacements `(a, v, 2)` of vertices to a grid `(a, 2, h, w)` in canvas pixels.

    Normalised kernel regression blurs; two rounds of adding back what it misses at the vertices
    make it nearly interpolate there.
    """

    def kernel(points: np.ndarray) -> np.ndarray:
        square = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
        weight = np.exp(-np.maximum(square, 0) / (2 * radius**2))
        spread: np.ndarray = weight / (weight.sum(1, keepdims=True) + 0.03)
        return spread

    wanted = basis.transpose(1, 0, 2).reshape(len(centres), -1)
    at_vertices, values = kernel(centres), wanted
    for _ in range(2):
        values = values + wanted - at_vertices @ values
    cells = size // GRID_STEP
    y, x = (np.mgrid[:cells, :cells] + 0.5) * GRID_STEP
    grid = np.stack([x.ravel(), y.ravel()], 1)
    field = np.zeros((len(grid), values.shape[1]), dtype=np.float32)
    near = ((grid > centres.min(0) - 4 * radius) & (grid < centres.max(0) + 4 * radius)).all(1)
    field[near] = kernel(grid[near]) @ values
    return np.asarray(field.T.reshape(len(basis), 2, cells, cells))


def _join_at_mouth(upper: Tensor, lower: Tensor, neutral: np.ndarray, size: int) -> Tensor:
    """Take the upper field above the neutral mouth line and the lower one below it."""
    contour = (neutral[list(INNER_UPPER_LIP)] + neutral[list(INNER_LOWER_LIP)]) / 2
    cells = size // GRID_STEP
    centres = (np.arange(cells) + 0.5) * GRID_STEP
    line = np.interp(centres, contour[:, 0], contour[:, 1])
    below = torch.from_numpy(centres[:, None] > line[None]).float()
    return upper + (lower - upper) * below


def _curve(points: Tensor, x: Tensor, size: int) -> Tensor:
    """Height of contours `(t, k, 2)` at positions `(t, h, w)`, all in canvas pixels."""
    knots, heights = points[..., 0].contiguous(), points[..., 1]
    columns = torch.arange(size, dtype=torch.float32).expand(len(points), size).contiguous()
    right = torch.searchsorted(knots, columns).clamp(1, knots.shape[1] - 1)
    x0, x1 = knots.gather(1, right - 1), knots.gather(1, right)
    y0, y1 = heights.gather(1, right - 1), heights.gather(1, right)
    table = y0 + ((columns - x0) / (x1 - x0 + 1e-4)).clamp(0, 1) * (y1 - y0)
    place = x.clamp(0, size - 1 - 1e-3)
    index = place.long()
    flat = index.flatten(1)
    low = table.gather(1, flat).view_as(x)
    high = table.gather(1, (flat + 1).clamp(max=size - 1)).view_as(x)
    return low + (high - low) * (place - index)
