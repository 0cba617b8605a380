"""What detectors, landmark extractors and trackers hand to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CropSource",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceRegion",
    "FrameAware",
    "LandmarkExtractor",
    "box_overlap",
]


class FaceDetections(NamedTuple):
    """What a `FaceDetector` finds in one image."""

    boxes: NDArray[np.float32]
    """`(n, 4)`, left, top, right, bottom, in pixels; may reach beyond the image."""
    scores: NDArray[np.float32]
    """`(n,)`, in [0, 1]."""


class FaceDetector(Protocol):
    """Finds faces in a single image."""

    def detect(self, image: NDArray[np.uint8]) -> FaceDetections:
        """Find all faces of an image `(h, w, 3)`, RGB."""
        ...


class FaceRegion(NamedTuple):
    """A square around a face, turned with it."""

    x: float
    """Centre, pixels."""
    y: float
    """Centre, pixels."""
    side: float
    """Pixels."""
    angle: float = 0.0
    """Radians, clockwise as seen, between the image's and the face's horizontal."""


class FaceLandmarks(NamedTuple):
    """What a `LandmarkExtractor` sees in a region."""

    points: NDArray[np.float32]
    """`(68, 2)`, iBUG-68, in image pixels."""
    score: float
    """Probability, in [0, 1], that the region shows a face at all."""
    region: FaceRegion
    """Where to look for the same face in the next frame."""


class LandmarkExtractor(Protocol):
    """Finds the landmarks of the face inside a region; keeps no memory of other frames."""

    def extract(self, image: NDArray[np.uint8], region: FaceRegion) -> FaceLandmarks:
        """Find the landmarks of the face in a region of an image `(h, w, 3)`, RGB."""
        ...


@runtime_checkable
class FrameAware(Protocol):
    """A detector or extractor that answers by the number of the frame, out of a file.

    Trackers tell it where they are. Its word counts in every frame: where its file has no face
    there is none.
    """

    def start_video(self, name: str) -> None:
        """Get ready for frame 0 of the trial of this name."""
        ...

    def start_frame(self, index: int) -> None:
        """Answer for this frame from now on, counted from 0."""
        ...


@runtime_checkable
class CropSource(Protocol):
    """Aligned crops that somebody else has cut, instead of a detector."""

    def start_video(self, name: str) -> None:
        """Get ready for the trial of this name."""
        ...

    def crop(self, index: int) -> NDArray[np.uint8] | None:
        """Return the crop `(h, w, 3)` of a frame, counted from 0, or `None` if there is none."""
        ...


@dataclass(frozen=True)
class Face:
    """The followed face in one frame."""

    landmarks: NDArray[np.float32]
    """`(68, 2)`, iBUG-68, in image pixels."""
    box: NDArray[np.float32]
    """`(4,)`, left, top, right, bottom of the landmarks, in pixels."""
    confidence: float
    """In [0, 1]: the detector's score when it last saw the face, times the landmark model's
    probability that this frame still shows it."""
    face_id: int
    """Counts up when another face is followed, after a cut or a gap."""


def box_overlap(box: NDArray[np.floating], boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union of one box with several.

    Args:
        box: `(4,)`, left, top, right, bottom.
        boxes: `(n, 4)`.

    Returns:
        `(n,)`, in [0, 1].

    Examples:
        >>> box_overlap(np.array([0.0, 0, 2, 2]), np.array([[1.0, 0, 3, 2], [5, 5, 6, 6]]))
        array([0.33, 0.  ])
    """
    box, boxes = np.asarray(box, dtype=np.float64), np.asarray(boxes, dtype=np.float64)
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    total = np.prod(np.clip(box[2:] - box[:2], 0, None)) + areas - common
    overlap: NDArray[np.float64] = common / np.maximum(total, 1e-12)
    return overlap
