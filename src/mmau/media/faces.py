"""Faces in a stream of frames: what finds them, what finds their landmarks, who is followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau.registry import Registry

__all__ = [
    "FACE_DETECTORS",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceRegion",
    "FaceTracker",
    "LandmarkExtractor",
    "box_overlap",
]

FACE_SELECTIONS = ("largest", "left", "right")


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


FACE_DETECTORS: Registry[type[FaceDetector]] = Registry(
    "face detector", group="mmau.face_detectors"
)
"""Face detectors by name; each is called without arguments and gives a `FaceDetector`."""

FACE_DETECTORS.register_lazy(
    "mediapipe",
    "mmau.media.mediapipe_faces:MediaPipeFaceDetector",
    summary="MediaPipe's bundled full-range and short-range face detectors.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)


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


class FaceTracker:
    """Follow one face through a video.

    While a face is in view, its landmarks tell where to look in the next frame, and the detector
    runs only every `check_every` frames, to see that it is still a face and still this one. As
    soon as the landmark model sees no face the detector searches the same frame, so a face that
    vanishes is gone at once and one that returns is found in its first frame.

    Args:
        detector: Finds faces.
        extractor: Finds the landmarks inside a region.
        select: Which of several new faces to follow: `"largest"`, `"left"` or `"right"` (as
            seen). A face that overlaps with the one followed before goes first.
        min_confidence: Smallest probability at which the landmark model's face is believed.
        check_every: Frames between two looks of the detector at a followed face.
        memory: Frames for which the place of a lost face is remembered.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        ```python
        tracker = FaceTracker(MediaPipeFaceDetector(), MediaPipeLandmarks())
        faces = [tracker.update(frame.image) for frame in reader]  # a Face or None per frame
        ```
    """

    def __init__(
        self,
        detector: FaceDetector,
        extractor: LandmarkExtractor,
        *,
        select: str = "largest",
        min_confidence: float = 0.5,
        check_every: int = 30,
        memory: int = 30,
    ) -> None:
        check_choice("select", select, FACE_SELECTIONS)
        check_range("min_confidence", min_confidence, 0, 1)
        check_range("check_every", check_every, 1)
        check_range("memory", memory, 0)
        self.detector = detector
        self.extractor = extractor
        self.select = select
        self.min_confidence = min_confidence
        self.check_every = check_every
        self.memory = memory
        self.reset()

    def reset(self) -> None:
        """Forget everything, before another video."""
        self._region: FaceRegion | None = None
        self._score = 0.0  # of the detector
        self._last_box: NDArray[np.float32] | None = None
        self._since_seen = 0
        self._since_check = 0
        self._face_id = -1

    def update(self, image: NDArray[np.uint8]) -> Face | None:
        """Take the next frame.

        Args:
            image: `(h, w, 3)`, RGB.

        Returns:
            The face, or `None` if there is none.
        """
        found = self._follow(image) or self._search(image)
        if found is None:
            self._region = None
            self._since_seen += 1
            if self._since_seen > self.memory:
                self._last_box = None
            return None
        box = _box_of(found.points)
        if self._last_box is None or box_overlap(self._last_box, box[None])[0] == 0:
            self._face_id += 1
        self._region, self._last_box, self._since_seen = found.region, box, 0
        return Face(
            landmarks=found.points,
            box=box,
            confidence=self._score * found.score,
            face_id=self._face_id,
        )

    # ------------------------------------------------------------------ inside
    def _believable(self, found: FaceLandmarks, image: NDArray[np.uint8]) -> bool:
        height, width = image.shape[:2]
        x, y, side, _ = found.region
        return (
            found.score >= self.min_confidence
            and bool(np.isfinite(found.points).all())
            and 0 <= x <= width
            and 0 <= y <= height
            and 8 <= side <= 4 * max(height, width)
        )

    def _follow(self, image: NDArray[np.uint8]) -> FaceLandmarks | None:
        if self._region is None:
            return None
        found = self.extractor.extract(image, self._region)
        if not self._believable(found, image):
            return None
        self._since_check += 1
        if self._since_check >= self.check_every:
            self._since_check = 0
            boxes, scores = self.detector.detect(image)
            overlap = box_overlap(_box_of(found.points), boxes)
            if len(boxes) and overlap.max() < 0.1:
                return None  # a face elsewhere and none here: start anew from that
            if len(boxes):  # a detector that is blind to this pose does not end the track
                self._score = float(scores[overlap.argmax()])
        return found

    def _search(self, image: NDArray[np.uint8]) -> FaceLandmarks | None:
        boxes, scores = self.detector.detect(image)
        for index in self._order(boxes):
            found = self.extractor.extract(image, _region_of(boxes[index]))
            # A second look, from the landmarks' own region: the quality of a followed frame, and
            # the face upright if it was tilted.
            if found.score >= self.min_confidence / 2:
                found = self.extractor.extract(image, found.region)
            if self._believable(found, image):
                self._score = float(scores[index])
                self._since_check = 0
                return found
        return None

    def _order(self, boxes: NDArray[np.float32]) -> list[int]:
        """Indices of detections, the one to follow first."""
        if self.select == "largest":
            preference = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        else:
            centre = boxes[:, 0] + boxes[:, 2]
            preference = -centre if self.select == "left" else centre
        continues = np.zeros(len(boxes), dtype=bool)
        if self._last_box is not None:
            continues = box_overlap(self._last_box, boxes) > 0.2
        return [int(i) for i in np.lexsort((-preference, ~continues))]


def _box_of(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)


def _region_of(box: NDArray[np.float32]) -> FaceRegion:
    """A square half as large again as the detector's box: forehead, chin and ears inside."""
    left, top, right, bottom = (float(value) for value in box)
    return FaceRegion((left + right) / 2, (top + bottom) / 2, 1.5 * max(right - left, bottom - top))


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
