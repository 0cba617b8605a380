"""A photograph with its face moved by Action Units, by one backward warp per frame.

Four parts, in the order of use: a neutral, symmetric face template, derived at run time from the
found meshes (no face model is shipped); how Action Units and identities move its vertices; the warp
that moves the pixels accordingly; and patches that cover a part of the face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmau._checks import check_range, check_shapes
from mmau.action_units import AU_NAMES
from mmau.landmarks import MEDIAPIPE468
from mmau.synthetic.photographs import PHOTOGRAPHS, load_mesh, load_photograph
from mmau.synthetic.timeline import check_image_size

# ------------------------------------------------------------------ the template
OUTER_EYES = (33, 263)
"""Vertices of the outer eye corners: image left, image right."""
EYE_DISTANCE = 8.9
"""Distance of the outer eye corners in template units, about centimetres of an adult face."""
EYE_HEIGHT = 2.66
"""Height of the outer eye corners above the origin, which lies below the nose bridge."""
MOUTH_CORNERS = (61, 291)
_MAX_SKEW = 1.0  # template units between a vertex and its mirrored partner; ours have 0.3

INNER_UPPER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
"""Vertices of the inner contour of the upper lip, corner to corner, image left to right."""
INNER_LOWER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
"""Vertices of the inner contour of the lower lip, in the same order."""

# fmt: off
_UPPER_LIP = (
    0, 11, 12, 13, 37, 38, 39, 40, 41, 42, 72, 73, 74, 80, 81, 82, 183, 184, 185, 191,
    267, 268, 269, 270, 271, 272, 302, 303, 304, 310, 311, 312, 407, 408, 409, 415,
)
_LOWER_LIP = (
    14, 15, 16, 17, 77, 84, 85, 86, 87, 88, 89, 90, 91, 95, 96, 146, 178, 179, 180, 181,
    307, 314, 315, 316, 317, 318, 319, 320, 321, 324, 325, 375, 402, 403, 404, 405,
)
# fmt: on
_CORNERS = (61, 291, 78, 308, 76, 306, 62, 292)


@dataclass(frozen=True)
class Placement:
    """The similarity from template units to the pixels of an image."""

    matrix: np.ndarray
    """`(2, 2)`; includes the flip of y, which is up in the template and down in an image."""
    offset: np.ndarray
    """`(2,)`, pixels."""

    @property
    def unit(self) -> float:
        """Pixels per template unit."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    def to_template(self, pixels: np.ndarray) -> np.ndarray:
        """Map pixels to template points."""
        return np.asarray((pixels - self.offset) @ np.linalg.inv(self.matrix).T)

    @classmethod
    def of(cls, mesh: np.ndarray) -> Placement:
        """Read the similarity off the outer eye corners of a mesh."""
        left, right = (np.asarray(mesh[v], dtype=np.float64) for v in OUTER_EYES)
        x_axis = (right - left) / EYE_DISTANCE
        matrix = np.array([[x_axis[0], x_axis[1]], [x_axis[1], -x_axis[0]]])
        return cls(matrix, (left + right) / 2 - matrix @ np.array([0.0, EYE_HEIGHT]))


@dataclass(frozen=True)
class FaceTemplate:
    """A neutral face with its mouth closed, symmetric about x = 0."""

    vertices: np.ndarray
    """`(468, 2)` float64, x to the image's right, y up, in centimetre-like units."""
    mirror: np.ndarray
    """`(468,)` int64, the vertex on the other side."""
    upper: np.ndarray
    """`(468,)` bool, vertices that move with what is above the mouth line."""
    lower: np.ndarray
    """`(468,)` bool, vertices that move with what is below it; both are true beside the mouth."""
    closing: tuple[np.ndarray, ...]
    """Per mesh `(468, 2)` in units: what closes its mouth. Zeros where it was closed."""

    @property
    def mouth_half_width(self) -> float:
        """Distance of a mouth corner from the middle, in units."""
        return float(self.vertices[MOUTH_CORNERS[1], 0])

    def mouth_line(self, x: np.ndarray) -> np.ndarray:
        """Height of the closed mouth at a position."""
        contour = self.vertices[list(INNER_UPPER_LIP)] + self.vertices[list(INNER_LOWER_LIP)]
        return np.asarray(np.interp(x, contour[:, 0] / 2, contour[:, 1] / 2))


def build_template(meshes: Sequence[np.ndarray], *, mouth_closed: Sequence[bool]) -> FaceTemplate:
    """Average meshes into a neutral symmetric face; the closed mouths give it its mouth."""
    aligned = [Placement.of(mesh).to_template(mesh.astype(np.float64)) for mesh in meshes]
    mean = np.mean(aligned, axis=0)
    mirror = np.array(MEDIAPIPE468.mirror)
    if ((mean - (mean * (-1, 1))[mirror]) ** 2).sum(1).max() > _MAX_SKEW**2:
        raise RuntimeError("the found meshes are too skewed to make a symmetric template of them.")

    def symmetric(points: np.ndarray) -> np.ndarray:
        mirrored: np.ndarray = (points + (points * (-1, 1))[mirror]) / 2
        return mirrored

    mean = symmetric(mean)
    closed = symmetric(
        np.mean([a for a, shut in zip(aligned, mouth_closed, strict=True) if shut], axis=0)
    )
    region = _mouth_region(mean)[:, None]
    vertices = mean + region * (closed - mean)
    # What remains between the lips would show as a line: bring both contours to their middle.
    upper, lower = list(INNER_UPPER_LIP), list(INNER_LOWER_LIP)
    middle = (vertices[upper] + vertices[lower]) / 2
    vertices[upper] = vertices[lower] = middle
    closing = tuple(
        np.zeros_like(mean) if shut else region * (vertices - points)
        for points, shut in zip(aligned, mouth_closed, strict=True)
    )
    is_upper, is_lower = _split_at_mouth(vertices)
    return FaceTemplate(vertices, mirror, is_upper, is_lower, closing)


def _mouth_region(vertices: np.ndarray) -> np.ndarray:
    """1 on and around the lips, falling to 0 at the nose, the chin and the cheeks."""
    centre = vertices[[13, 14]].mean(0)
    half_width = vertices[MOUTH_CORNERS[1], 0]
    x, y = ((vertices - centre) / (1.55 * half_width, 0.95 * half_width)).T
    region: np.ndarray = np.clip((1.45 - np.hypot(x, y)) / 0.75, 0, 1)
    return np.asarray(region * region * (3 - 2 * region))


def _split_at_mouth(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell what is above the mouth line from what is below; beside the mouth both are true."""
    x, y = vertices.T
    height = vertices[list(_CORNERS), 1].mean()
    beside = np.abs(x) > 1.02 * vertices[MOUTH_CORNERS[1], 0]
    upper, lower = (y > height) | beside, (y < height) | beside
    for members, mine, other in ((_UPPER_LIP, upper, lower), (_LOWER_LIP, lower, upper)):
        mine[list(members)], other[list(members)] = True, False
    for vertex in _CORNERS:
        upper[vertex] = lower[vertex] = True
    return upper, lower


# ------------------------------------------------------------------ movements
# Every movement is a sum of Gaussian bumps whose centres hang on named vertices, so that they
# follow the template. The amplitudes are set by eye; they are not a measured face model.
# The vertices that bumps hang on, at the right of the image (the subject's left).
INNER_BROW, MID_BROW, OUTER_BROW = 336, 334, 300
UPPER_LID, LOWER_LID, OUTER_EYE = 386, 374, 263
CHEEK, NASOLABIAL, NOSE_WING = 280, 425, 327
MOUTH_CORNER, UPPER_LIP, LOWER_LIP = 291, 267, 314
LOWER_LIP_MIDDLE, CHIN = 17, 152


@dataclass(frozen=True)
class Bump:
    """One Gaussian push, mirrored to the other side of the face unless its centre is at x = 0."""

    anchor: int
    """Vertex that its centre hangs on."""
    radius: float
    """Standard deviation in template units."""
    outward: float = 0.0
    """Displacement away from the middle at full intensity, in template units."""
    up: float = 0.0
    """Displacement upwards at full intensity, in template units."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Centre minus anchor, outward and up, in template units."""
    side: Literal["both", "upper", "lower"] = "both"
    """Which side of the mouth line moves."""


BUMPS: dict[str, tuple[Bump, ...]] = {
    "AU1": (Bump(INNER_BROW, 1.3, outward=-0.1, up=1.0, offset=(0.0, 0.4)),),
    "AU2": (Bump(OUTER_BROW, 1.5, up=0.95, offset=(-0.5, 0.7)),),
    "AU4": (
        Bump(INNER_BROW, 1.5, outward=-0.45, up=-0.75, offset=(0.2, 0.0)),
        Bump(MID_BROW, 1.5, outward=-0.1, up=-0.35),
    ),
    "AU6": (
        Bump(CHEEK, 1.4, up=0.6, offset=(-0.4, 0.9)),
        Bump(OUTER_EYE, 1.0, outward=-0.25, offset=(1.45, -0.15)),
        Bump(LOWER_LID, 0.8, up=0.22, offset=(0.1, -0.4)),
    ),
    "AU7": (
        Bump(UPPER_LID, 0.7, up=-0.3),
        Bump(LOWER_LID, 0.7, up=0.32, offset=(0.0, -0.15)),
    ),
    "AU10": (
        Bump(UPPER_LIP, 0.9, up=0.65, offset=(0.4, 0.0), side="upper"),
        Bump(NOSE_WING, 0.9, outward=0.05, up=0.4),
        # The lower lip follows, so that the lips hardly part: parting them is AU25.
        Bump(LOWER_LIP, 0.9, up=0.45, offset=(0.4, 0.4), side="lower"),
    ),
    "AU12": (
        Bump(MOUTH_CORNER, 1.2, outward=0.6, up=0.8),
        Bump(NASOLABIAL, 1.4, outward=0.15, up=0.4),
    ),
    "AU15": (
        Bump(MOUTH_CORNER, 1.0, outward=0.05, up=-0.65),
        Bump(MOUTH_CORNER, 1.2, outward=0.05, up=-0.45, offset=(0.3, -1.3)),
    ),
    "AU23": (
        Bump(MOUTH_CORNER, 1.0, outward=-0.55),
        Bump(UPPER_LIP, 0.8, up=-0.22, side="upper"),
        Bump(LOWER_LIP, 0.8, up=0.26, side="lower"),
    ),
    "AU24": (
        Bump(UPPER_LIP, 0.9, up=-0.38, side="upper"),
        Bump(LOWER_LIP, 0.9, up=0.42, side="lower"),
        Bump(LOWER_LIP_MIDDLE, 1.0, up=0.2, offset=(0.0, -1.2), side="lower"),
    ),
    "AU25": (
        Bump(LOWER_LIP, 1.3, up=-0.55, side="lower"),
        Bump(UPPER_LIP, 1.0, up=0.15, side="upper"),
    ),
    "AU26": (),  # the jaw is not a bump: see `_jaw_drop`
}
"""Movements of each Action Unit at full intensity, in the order of `AU_NAMES`."""

JAW_DROP = 1.25
"""How far the chin falls in AU26 at full intensity, in template units."""


def _bump(template: FaceTemplate, bump: Bump) -> np.ndarray:
    x, y = template.vertices.T
    centre = template.vertices[bump.anchor] + bump.offset
    on_midline = abs(centre[0]) < 1e-6
    moves = {"both": np.ones_like(x), "upper": template.upper, "lower": template.lower}[bump.side]
    total = np.zeros_like(template.vertices)
    for sign in (1.0,) if on_midline else (-1.0, 1.0):
        squared = (x - sign * centre[0]) ** 2 + (y - centre[1]) ** 2
        weight = np.exp(-squared / (2 * bump.radius**2)) * moves
        if not on_midline:
            # Two mirrored bumps near the midline add up there: take the share of one.
            weight = weight / (1 + np.exp(-2 * (centre[0] / bump.radius) ** 2))
        total[:, 0] += sign * bump.outward * weight
        total[:, 1] += bump.up * weight
    return total


def _jaw_drop(template: FaceTemplate) -> np.ndarray:
    """Everything under the mouth line goes down, fading towards the ears and above the mouth."""
    x, y = template.vertices.T
    corner = template.vertices[MOUTH_CORNER]
    chin = template.vertices[CHIN]
    line = template.mouth_line(x)
    drop = np.zeros_like(template.vertices)
    half_jaw = 1.07 * template.vertices[454, 0]
    sideways = np.clip(1 - (np.abs(x) / half_jaw) ** 3, 0, 1)
    below = np.clip((line - y) / 0.35, 0, 1) * template.lower
    beside = np.clip((corner[1] + 2.5 - y) / (corner[1] + 2.5 - chin[1]), 0, 1)
    # The inner lower lip lies on the mouth line itself and moves with the jaw.
    reach = template.mouth_half_width
    inner_lip = (~template.upper) * np.sqrt(np.clip(1 - (x / (0.97 * reach)) ** 2, 0, 1))
    squared = (np.abs(x) - corner[0]) ** 2 + (y - corner[1]) ** 2
    at_corner = 0.35 * np.exp(-squared / (2 * 0.6**2))
    amount = np.maximum(np.maximum(below * sideways, inner_lip), at_corner)
    drop[:, 1] = -JAW_DROP * amount * np.where(np.abs(x) > 1.02 * reach, beside, 1.0)
    return drop


def au_displacements(template: FaceTemplate) -> np.ndarray:
    """Compute how far each Action Unit moves each vertex at full intensity."""
    moved = np.zeros((len(AU_NAMES), *template.vertices.shape))
    for index, name in enumerate(AU_NAMES):
        for bump in BUMPS[name]:
            moved[index] += _bump(template, bump)
    moved[AU_NAMES.index("AU26")] += _jaw_drop(template)
    return moved


def identity_displacement(template: FaceTemplate, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth change of proportions, so that clips of one photograph differ."""
    x, y = template.vertices.T
    width, jaw, height, brow, mouth = np.clip(rng.standard_normal(5), -2, 2)
    brow_line, mouth_line = template.vertices[MID_BROW, 1], template.vertices[13, 1]
    change = np.zeros_like(template.vertices)
    change[:, 0] = x * (0.05 * width + 0.06 * jaw * np.exp(-(((y - mouth_line + 2) / 3) ** 2)))
    change[:, 1] = (
        0.03 * height * y
        + 0.25 * brow * np.exp(-(((y - brow_line) / 2) ** 2))
        + 0.25 * mouth * np.exp(-(((y - mouth_line) / 2) ** 2))
    )
    return change


# ------------------------------------------------------------------ the warp
# Displacements of vertices are spread to a coarse pixel grid once per clip, separately above and
# below the mouth line; a frame then costs one matrix product and one resampling. Between parted
# lips, where the photograph shows nothing, a mouth is painted.
CANVAS_MARGIN = 1.25
"""Canvas side over image side, so that head and camera motion never show its edge."""
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


@cache
def load_faces() -> tuple[Face, ...]:
    """Load the photographs, find their meshes and derive the template from them, once."""
    meshes = [load_mesh(name) for name in PHOTOGRAPHS]
    mouth_closed = [info.mouth_closed for info in PHOTOGRAPHS.values()]
    template = build_template(meshes, mouth_closed=mouth_closed)
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
        check_image_size(size)
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
        placement = Placement.of(found)
        self._unit = placement.unit
        moves = au_displacements(face.template) @ placement.matrix.T
        still = still @ placement.matrix.T
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
        """Compute where the mesh is in the rendered images."""
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
        """Render one image per row of intensities."""
        check_shapes(intensities=(intensities, f"t {len(AU_NAMES)}"))
        view = self._view(len(intensities), view)
        images = torch.empty(len(intensities), self.size, self.size, 3, dtype=torch.uint8)
        with torch.no_grad():
            for start in range(0, len(intensities), batch):
                stop = start + batch
                some = self._render(intensities[start:stop].float(), view[start:stop])
                images[start:stop] = some.clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
        return images

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
        images = self._sample(self._plain, intensities, look)
        rows, columns = self._mouth_box(intensities, view)
        there = look[:, rows, columns]
        if there.numel():
            images[:, :, rows, columns] = self._render_mouth(intensities, there)
        return images

    def _sample(self, basis: Tensor, intensities: Tensor, look: Tensor) -> Tensor:
        """Look up the photograph where the face at `look` came from."""
        to_unit = 2 / self.canvas_size
        moves = torch.einsum("tc,cxhw->txhw", intensities, basis[:-1]) * to_unit
        still = basis[-1:].expand(len(look), -1, -1, -1) * to_unit
        # The expression moves points of the *neutral* face, so the way back is the fixed point of
        # `origin = look - movement(origin)`; two rounds leave a small fraction of a pixel.
        origin = look
        for _ in range(_INVERSION_ROUNDS):
            origin = look - _lookup(moves, origin).permute(0, 2, 3, 1)
        source = origin - _lookup(still, origin).permute(0, 2, 3, 1)
        return _lookup(self._photograph.expand(len(look), -1, -1, -1), source)

    def _mouth_box(self, intensities: Tensor, view: Tensor) -> tuple[slice, slice]:
        """Rows and columns of the image in which any lip of the batch lies, with some margin."""
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
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    source = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(source, fine)


def _spread(centres: np.ndarray, basis: np.ndarray, size: int, radius: float) -> np.ndarray:
    """Spread displacements `(a, v, 2)` of vertices to a grid `(a, 2, h, w)` in canvas pixels."""

    def kernel(points: np.ndarray) -> np.ndarray:
        square = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
        weight = np.exp(-np.maximum(square, 0) / (2 * radius**2))
        spread: np.ndarray = weight / (weight.sum(1, keepdims=True) + 0.03)
        return spread

    wanted = basis.transpose(1, 0, 2).reshape(len(centres), -1)
    at_vertices, values = kernel(centres), wanted
    # Normalised kernel regression blurs; adding back what it misses at the vertices twice makes it
    # nearly interpolate there.
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


# ------------------------------------------------------------------ occlusion
def occlude(
    rng: np.random.Generator,
    frames: np.ndarray,
    mesh: np.ndarray,
    vertex: np.ndarray,
    radius: np.ndarray,
) -> None:
    """Paint what `draw_occluders` drew over the images, in place; it moves with the face."""
    height, width = frames.shape[1:3]
    rows, columns = np.mgrid[0:height, 0:width]
    texture, before = None, -1
    for index in range(len(frames)):
        if vertex[index] != before or texture is None:
            before, texture = int(vertex[index]), _occluder(rng, height, width)
        if before < 0 or np.isnan(mesh[index]).any():
            continue
        x, y = mesh[index, before]
        reach = radius[index] * np.ptp(mesh[index, :, 1])
        inside = (columns - x) ** 2 + (rows - y) ** 2 <= reach**2
        frames[index][inside] = texture[inside]


def _occluder(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A blotchy texture with grain, `(h, w, 3)` uint8."""
    colours = draw_blotches(rng, (height, width), cells=12, brightness=(20, 220), mode="bilinear")
    return np.asarray(colours + rng.integers(-6, 7, (height, width, 1))).astype(np.uint8)


def draw_blotches(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    cells: int,
    brightness: tuple[float, float],
    mode: Literal["bilinear", "bicubic"],
) -> np.ndarray:
    """Soft blotches of two colours, `(h, w, 3)` float32."""
    colours = rng.uniform(*brightness, (2, 3)).astype(np.float32)
    noise = torch.from_numpy(rng.uniform(0, 1, (1, 1, cells, cells)).astype(np.float32))
    smooth = F.interpolate(noise, size=shape, mode=mode, align_corners=True)
    mix = smooth[0, 0].clamp(0, 1).numpy()[..., None]
    return np.asarray(colours[0] + mix * (colours[1] - colours[0]))
