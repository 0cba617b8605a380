"""Following one face, or everybody, through the frames of a video by the overlap of boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau.media._face_types import (
    Face,
    FaceDetector,
    FaceLandmarks,
    FaceRegion,
    FrameAware,
    LandmarkExtractor,
    box_overlap,
)

__all__ = ["FACE_SELECTIONS", "FaceTracker", "PeopleTracker"]

FACE_SELECTIONS = ("largest", "left", "right")

# Boxes that overlap by less show two faces; a detector's box and the landmarks' overlap by 0.4.
_SAME_FACE = 0.1
# A face that was lost is the one that comes back if the boxes overlap by more.
_SAME_PLACE = 0.2


class _Follower:
    """What both trackers share: models, limits, and the way from a detector's box to landmarks."""

    def __init__(
        self,
        detector: FaceDetector,
        extractor: LandmarkExtractor,
        min_confidence: float,
        check_every: int,
        memory: int,
    ) -> None:
        check_range("min_confidence", min_confidence, 0, 1)
        check_range("check_every", check_every, 1)
        check_range("memory", memory, 0)
        self.detector = detector
        self.extractor = extractor
        self.min_confidence = min_confidence
        self.check_every = check_every
        self.memory = memory
        self._aware = [part for part in (detector, extractor) if isinstance(part, FrameAware)]
        # A table knows every frame, so following without it would only add guesses.
        self._asks_every_frame = isinstance(detector, FrameAware)
        self._frame = 0

    def _start_video(self, name: str) -> None:
        self._frame = 0
        for part in self._aware:
            part.start_video(name)

    def _start_frame(self) -> None:
        for part in self._aware:
            part.start_frame(self._frame)
        self._frame += 1

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

    def _look(self, image: NDArray[np.uint8], region: FaceRegion) -> FaceLandmarks | None:
        found = self.extractor.extract(image, region)
        return found if self._believable(found, image) else None

    def _look_twice(
        self, image: NDArray[np.uint8], box: NDArray[np.float32]
    ) -> FaceLandmarks | None:
        """What is at a detector's box, as well seen as in a followed frame."""
        found = self.extractor.extract(image, _region_of(box))
        # From the landmarks' own region the face is centred, and upright if it was tilted.
        if found.score >= self.min_confidence / 2:
            found = self.extractor.extract(image, found.region)
        return found if self._believable(found, image) else None


class FaceTracker(_Follower):
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
        super().__init__(detector, extractor, min_confidence, check_every, memory)
        self.select = select
        self._forget()

    def reset(self, name: str = "") -> None:
        """Forget everything, before another video.

        Args:
            name: Name of its trial, for detectors and extractors that look it up.
        """
        self._forget()
        self._start_video(name)

    def _forget(self) -> None:
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
        self._start_frame()
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
    def _follow(self, image: NDArray[np.uint8]) -> FaceLandmarks | None:
        if self._region is None or self._asks_every_frame:
            return None
        found = self._look(image, self._region)
        if found is None:
            return None
        self._since_check += 1
        if self._since_check >= self.check_every:
            self._since_check = 0
            boxes, scores = self.detector.detect(image)
            overlap = box_overlap(_box_of(found.points), boxes)
            if len(boxes) and overlap.max() < _SAME_FACE:
                return None  # a face elsewhere and none here: start anew from that
            if len(boxes):  # a detector that is blind to this pose does not end the track
                self._score = float(scores[overlap.argmax()])
        return found

    def _search(self, image: NDArray[np.uint8]) -> FaceLandmarks | None:
        boxes, scores = self.detector.detect(image)
        for index in self._order(boxes):
            found = self._look_twice(image, boxes[index])
            if found is not None:
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
            continues = box_overlap(self._last_box, boxes) > _SAME_PLACE
        return [int(i) for i in np.lexsort((-preference, ~continues))]


@dataclass
class _Track:
    """One person as last seen."""

    box: NDArray[np.float32]
    region: FaceRegion
    score: float
    """Of the detector."""
    since_seen: int = 0


class PeopleTracker(_Follower):
    """Follow everybody through a video; a person is a number.

    People are numbered from 0 in the order in which they come, from left to right in one frame.
    Somebody who is lost and found again at the same place within `memory` frames keeps the number;
    later, or elsewhere, it is a new one: faces are told apart by their place, not recognised.

    The detector runs every `check_every` frames, to see who came and that everybody is still a
    face, and while somebody is missing.

    Args:
        detector: Finds faces.
        extractor: Finds the landmarks inside a region.
        min_confidence: Smallest probability at which the landmark model's face is believed.
        check_every: Frames between two looks of the detector while everybody is in view; who comes
            in between is seen up to so many frames late.
        memory: Frames for which the place of a lost face is remembered.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        ```python
        tracker = PeopleTracker(MediaPipeFaceDetector(), MediaPipeLandmarks())
        for frame in reader:
            for face in tracker.update(frame.image):
                print(frame.index, face.face_id, face.box)
        ```
    """

    def __init__(
        self,
        detector: FaceDetector,
        extractor: LandmarkExtractor,
        *,
        min_confidence: float = 0.5,
        check_every: int = 10,
        memory: int = 30,
    ) -> None:
        super().__init__(detector, extractor, min_confidence, check_every, memory)
        self._forget()

    def reset(self, name: str = "") -> None:
        """Forget everybody, before another video.

        Args:
            name: Name of its trial, for detectors and extractors that look it up.
        """
        self._forget()
        self._start_video(name)

    def _forget(self) -> None:
        self._tracks: dict[int, _Track] = {}
        self._next_id = 0
        self._since_check = self.check_every

    def update(self, image: NDArray[np.uint8]) -> list[Face]:
        """Take the next frame.

        Args:
            image: `(h, w, 3)`, RGB.

        Returns:
            The faces in view, in the order of their numbers.
        """
        self._start_frame()
        self._since_check += 1
        seen = {} if self._asks_every_frame else self._follow(image)
        if len(seen) < len(self._tracks) or not seen or self._since_check >= self.check_every:
            self._since_check = 0
            self._search(image, seen)
        for number, track in list(self._tracks.items()):
            track.since_seen = 0 if number in seen else track.since_seen + 1
            if track.since_seen > self.memory:
                del self._tracks[number]
        return [
            Face(
                found.points,
                _box_of(found.points),
                self._tracks[number].score * found.score,
                number,
            )
            for number, found in sorted(seen.items())
        ]

    # ------------------------------------------------------------------ inside
    def _follow(self, image: NDArray[np.uint8]) -> dict[int, FaceLandmarks]:
        """Who was in view in the last frame and still is."""
        seen: dict[int, FaceLandmarks] = {}
        for number, track in self._tracks.items():
            found = self._look(image, track.region) if track.since_seen == 0 else None
            # Somebody who walks behind another leaves two tracks on one face: the older keeps it.
            if found is not None and not self._taken(_box_of(found.points), seen):
                self._place(number, found)
                seen[number] = found
        return seen

    def _search(self, image: NDArray[np.uint8], seen: dict[int, FaceLandmarks]) -> None:
        """Ask the detector who is there; `seen` loses walls and wins newcomers."""
        boxes, scores = self.detector.detect(image)
        strangers = any(not self._taken(box, seen) for box in boxes)
        for number in list(seen):
            overlap = box_overlap(self._tracks[number].box, boxes)
            if len(boxes) and overlap.max() >= _SAME_FACE:
                self._tracks[number].score = float(scores[overlap.argmax()])
            elif strangers:
                del seen[number]  # a face elsewhere and none here; else it is only hard to detect
        for index in np.argsort(boxes[:, 0], kind="stable"):
            if self._taken(boxes[index], seen):
                continue
            found = self._look_twice(image, boxes[index])
            if found is None or self._taken(_box_of(found.points), seen):
                continue
            number = self._number_of(_box_of(found.points), seen)
            self._place(number, found, float(scores[index]))
            seen[number] = found

    def _taken(self, box: NDArray[np.float32], seen: dict[int, FaceLandmarks]) -> bool:
        others = np.array([self._tracks[number].box for number in seen]).reshape(-1, 4)
        return bool((box_overlap(box, others) > _SAME_FACE).any())

    def _number_of(self, box: NDArray[np.float32], seen: dict[int, FaceLandmarks]) -> int:
        """Who was last seen at this place, or a new number."""
        missing = [number for number in self._tracks if number not in seen]
        if missing:
            overlap = box_overlap(box, np.array([self._tracks[n].box for n in missing]))
            if overlap.max() > _SAME_PLACE:
                return missing[int(overlap.argmax())]
        self._next_id += 1
        return self._next_id - 1

    def _place(self, number: int, found: FaceLandmarks, score: float | None = None) -> None:
        if score is None:
            score = self._tracks[number].score
        self._tracks[number] = _Track(_box_of(found.points), found.region, score)


def _box_of(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)


def _region_of(box: NDArray[np.float32]) -> FaceRegion:
    """A square half as large again as the detector's box: forehead, chin and ears inside."""
    left, top, right, bottom = (float(value) for value in box)
    return FaceRegion((left + right) / 2, (top + bottom) / 2, 1.5 * max(right - left, bottom - top))
