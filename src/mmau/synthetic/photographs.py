"""The two public-domain photographs and their meshes: nothing is fetched, nothing is stored here.

matplotlib brings one photograph, scikit-image the other, MediaPipe finds the mesh at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from mmau._checks import check_choice
from mmau._optional import require

_require = partial(require, purpose="rendering clips", extra="recipes")

NUM_VERTICES = 468
"""Vertices of MediaPipe's face mesh without the irises."""


@dataclass(frozen=True)
class PhotographInfo:
    """Where a photograph comes from and whom to credit."""

    name: str
    """Short name used in this package."""
    source: str
    """The call that loads it."""
    title: str
    """What it shows."""
    credit: str
    """Who made it."""
    licence: str
    """Its terms."""
    mouth_closed: bool
    """Whether the lips touch; a smile is closed by warping before anything else."""


PHOTOGRAPHS: dict[str, PhotographInfo] = {
    "grace_hopper": PhotographInfo(
        name="grace_hopper",
        source='matplotlib.cbook.get_sample_data("grace_hopper.jpg")',
        title="Official portrait of Grace Hopper (1984)",
        credit="James S. Davis, United States Navy",
        licence="Public domain, a work of the United States federal government",
        mouth_closed=True,
    ),
    "astronaut": PhotographInfo(
        name="astronaut",
        source="skimage.data.astronaut()",
        title="Official portrait of Eileen Collins (crop)",
        credit="NASA, Great Images database",
        licence="Public domain, a work of the United States federal government",
        mouth_closed=False,
    ),
}
"""Name to provenance, in the order in which clips draw them."""


@cache
def load_photograph(name: str) -> np.ndarray:
    """Load one of the photographs from the package that ships it.

    Args:
        name: `"grace_hopper"` or `"astronaut"`.

    Returns:
        `(h, w, 3)`, uint8 RGB, read-only.

    Raises:
        ValueError: If there is no such photograph.
        MissingDependencyError: If the package that ships it is not installed.

    Examples:
        >>> load_photograph("astronaut").shape
        (512, 512, 3)
    """
    check_choice("name", name, PHOTOGRAPHS)
    if name == "grace_hopper":
        pillow = _require("PIL.Image")
        with _require("matplotlib.cbook").get_sample_data("grace_hopper.jpg") as file:
            pixels = np.asarray(pillow.open(file).convert("RGB"))
    else:
        pixels = _require("skimage.data").astronaut()[..., :3]
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels


def find_mesh(image: np.ndarray, *, crop_scales: Sequence[float] = (2.0,)) -> np.ndarray | None:
    """Find MediaPipe's face mesh of the largest face: detector, square crops around it, mesh."""
    # FaceMesh alone loses small faces, hence the crops; their sides are in detected boxes.
    detection = _require("mediapipe.python.solutions.face_detection")
    face_mesh = _require("mediapipe.python.solutions.face_mesh")
    from mmau.media.mediapipe import quiet_native_stderr  # loads MediaPipe

    height, width = image.shape[:2]
    with (
        quiet_native_stderr(),
        detection.FaceDetection(model_selection=1, min_detection_confidence=0.5) as detector,
    ):
        found = detector.process(np.ascontiguousarray(image)).detections
    if not found:
        return None
    boxes = [one.location_data.relative_bounding_box for one in found]
    box = max(boxes, key=lambda b: b.width * b.height)
    centre = ((box.xmin + box.width / 2) * width, (box.ymin + box.height / 2) * height)
    longest = max(box.width * width, box.height * height)
    meshes = []
    with (
        quiet_native_stderr(),
        face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True) as mesher,
    ):
        for scale in crop_scales:
            corner, side, crop = _square_crop(image, centre, scale * longest)
            faces = mesher.process(crop).multi_face_landmarks
            if not faces:
                return None
            points = [(p.x, p.y) for p in faces[0].landmark[:NUM_VERTICES]]
            meshes.append(np.array(points, dtype=np.float64) * side + corner)
    return np.asarray(np.mean(meshes, axis=0), dtype=np.float32)


def _square_crop(
    image: np.ndarray, centre: tuple[float, float], side: float
) -> tuple[tuple[int, int], int, np.ndarray]:
    """Cut a square, repeating the image's edge where it leaves the image."""
    size = int(side)
    left, top = (int(middle - side / 2) for middle in centre)
    height, width = image.shape[:2]
    pad = max(0, -left, -top, left + size - width, top + size - height)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = padded[top + pad : top + pad + size, left + pad : left + pad + size]
    return (left, top), size, np.ascontiguousarray(crop)


def load_mesh(name: str) -> np.ndarray:
    """Find the mesh of one of the photographs."""
    # One crop leaves several pixels of doubt at the ears; the mean over these is steady.
    mesh = find_mesh(load_photograph(name), crop_scales=(1.5, 2.0, 2.5, 3.0))
    if mesh is None:
        raise RuntimeError(f"MediaPipe finds no face in the photograph {name!r}.")
    mesh.setflags(write=False)
    return mesh
