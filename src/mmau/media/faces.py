"""Faces in a stream of frames: detectors, landmark extractors, trackers and their options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau._optional import require
from mmau.media.face_alignment import align_faces
from mmau.media.video import VideoFrame
from mmau.registry import Registry


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
    """What a `LandmarkExtractor` finds in a region."""

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
    """Crops that another program has aligned, instead of a detector."""

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


FACE_SELECTIONS = ("largest", "left", "right")

# Boxes that overlap by less show two faces; a detector's box and the landmarks' overlap by 0.4.
_SAME_FACE = 0.1
# A face that was lost is the one that comes back if the boxes overlap by more.
_SAME_PLACE = 0.2


class _Tracker:
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
        self._forget()

    def reset(self, name: str = "") -> None:
        """Forget everything, before another video.

        Args:
            name: Name of its trial, for detectors and extractors that look it up.
        """
        self._forget()
        self._frame = 0
        for part in self._aware:
            part.start_video(name)

    def _forget(self) -> None:
        """Forget all faces."""
        raise NotImplementedError

    def _start_frame(self) -> None:
        for part in self._aware:
            part.start_frame(self._frame)
        self._frame += 1

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


class FaceTracker(_Tracker):
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
        check_every: Frames between two runs of the detector on a followed face.
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
        self.select = select
        super().__init__(detector, extractor, min_confidence, check_every, memory)

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


class PeopleTracker(_Tracker):
    """Follow all faces through a video; each has a number.

    Faces are numbered from 0 in the order in which they come, from left to right in one frame.
    A face that is lost and found again at the same place within `memory` frames keeps its number;
    later, or elsewhere, it gets a new one: faces are told apart by their place, not recognised.

    The detector runs every `check_every` frames, to find new faces and to check the followed ones,
    and while one is missing.

    Args:
        detector: Finds faces.
        extractor: Finds the landmarks inside a region.
        min_confidence: Smallest probability at which the landmark model's face is believed.
        check_every: Frames between two runs of the detector while every face is in view; a face
            that comes in between is found up to so many frames late.
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

    def _follow(self, image: NDArray[np.uint8]) -> dict[int, FaceLandmarks]:
        """The faces that were in view in the last frame and still are."""
        seen: dict[int, FaceLandmarks] = {}
        for number, track in self._tracks.items():
            found = self._look(image, track.region) if track.since_seen == 0 else None
            # A face that moves behind another leaves two tracks on one face: the older keeps it.
            if found is not None and not self._taken(_box_of(found.points), seen):
                self._place(number, found)
                seen[number] = found
        return seen

    def _search(self, image: NDArray[np.uint8], seen: dict[int, FaceLandmarks]) -> None:
        """Ask the detector: `seen` loses what is not a face and gets the new ones."""
        boxes, scores = self.detector.detect(image)
        others_found = any(not self._taken(box, seen) for box in boxes)
        for number in list(seen):
            overlap = box_overlap(self._tracks[number].box, boxes)
            if len(boxes) and overlap.max() >= _SAME_FACE:
                self._tracks[number].score = float(scores[overlap.argmax()])
            elif others_found:
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
        """The number of the face that was last seen at this place, or a new one."""
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


FACE_DETECTORS: Registry[Callable[..., FaceDetector]] = Registry(
    "face detector", group="mmau.face_detectors"
)
"""Face detectors by name; each is called with its own options and gives a `FaceDetector`."""

FACE_DETECTORS.register_lazy(
    "mediapipe",
    "mmau.media.mediapipe:MediaPipeFaceDetector",
    summary="MediaPipe's bundled full-range and short-range face detectors.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
FACE_DETECTORS.register_lazy(
    "retinaface",
    "mmau.media.external:RetinaFaceDetector",
    summary="RetinaFace through uniface, with weights that you have downloaded.",
    extra="retinaface",
    requires=("uniface", "onnxruntime"),
)
FACE_DETECTORS.register_lazy(
    "precomputed",
    "mmau.media.external:PrecomputedFaceDetector",
    summary="Boxes, or landmarks, of every frame from a CSV table.",
)
FACE_DETECTORS.register_lazy(
    "aligned_crops",
    "mmau.media.external:AlignedCropFolder",
    summary="Aligned crops from a folder of numbered images (cropped_aligned of Aff-Wild2).",
    extra="landmarks",
    requires=("cv2",),
)

LANDMARK_EXTRACTORS: Registry[Callable[..., LandmarkExtractor]] = Registry(
    "landmark extractor", group="mmau.landmark_extractors"
)
"""Landmark extractors by name; each is called with its own options."""

LANDMARK_EXTRACTORS.register_lazy(
    "mediapipe",
    "mmau.media.mediapipe:MediaPipeLandmarks",
    summary="MediaPipe's bundled face mesh, reduced to 68 points.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
LANDMARK_EXTRACTORS.register_lazy(
    "mediapipe_tasks",
    "mmau.media.mediapipe:MediaPipeTasksLandmarks",
    summary="Your face_landmarker.task file through the Tasks API of MediaPipe.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
LANDMARK_EXTRACTORS.register_lazy(
    "precomputed",
    "mmau.media.external:PrecomputedLandmarks",
    summary="68 landmarks of every frame from a CSV table, such as OpenFace writes.",
)


ALL_FACES = "all"


@dataclass(frozen=True)
class FaceOptions:
    """Which faces of a video are followed, and by what they are found.

    Raises:
        TypeError: If `face` is neither a word nor a number.
        ValueError: If `face` is out of range.

    Examples:
        >>> FaceOptions(detector="precomputed", detector_options={"path": "talk.csv"}).face
        'largest'
    """

    detector: str = "mediapipe"
    """Name in `FACE_DETECTORS`."""
    landmarks: str = "mediapipe"
    """Name in `LANDMARK_EXTRACTORS`."""
    face: str | int = "largest"
    """Which of several faces to follow: `"largest"`, `"left"` or `"right"` when one has to be
    chosen, the number that `PeopleTracker` gives to a person, or `"all"`."""
    detector_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the detector, such as `{"path": "boxes.csv"}`."""
    landmark_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the landmark extractor."""

    def __post_init__(self) -> None:
        if isinstance(self.face, bool) or not isinstance(self.face, (str, int)):
            raise TypeError(f"`face` must be a word or the number of a person; got {self.face!r}.")
        if isinstance(self.face, int):
            check_range("face", self.face, 0)
        else:
            check_choice("face", self.face, (*FACE_SELECTIONS, ALL_FACES))

    @property
    def all_faces(self) -> bool:
        """Whether every face is followed, each for itself."""
        return self.face == ALL_FACES

    def check(self, *, one_face: bool = False) -> FaceOptions:
        """Refuse what cannot work, before a file is opened or a model is loaded."""
        if one_face and self.all_faces:
            raise ValueError(
                "`face='all'` gives one trial per person, so it needs `prepare_dataset`; "
                "choose 'largest', 'left', 'right' or the number of a person."
            )
        FACE_DETECTORS.check_options(self.detector, self.detector_options)
        LANDMARK_EXTRACTORS.check_options(self.landmarks, self.landmark_options)
        return self

    def record(self, name: str) -> dict[str, Any]:
        """Say in JSON what a prepared file of this trial depends on besides its video."""
        return {
            "detector": self.detector,
            "landmarks": self.landmarks,
            "face": self.face,
            "detector_options": _stamped(self.detector_options, name),
            "landmark_options": _stamped(self.landmark_options, name),
        }


def _stamped(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options in JSON, with size and time of the files of a trial that they lead to."""
    record: dict[str, Any] = {}
    for key, value in sorted(options.items()):
        record[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, (str, os.PathLike)):
            continue
        for file in (Path(value), Path(value) / name, Path(value) / f"{name}.csv"):
            if file.exists():
                status = file.stat()
                size = status.st_size if file.is_file() else len(os.listdir(file))
                record[f"{key} of the trial"] = [size, status.st_mtime_ns]
    return record


class FaceTrack(NamedTuple):
    """One face in one frame, cut out."""

    crop: NDArray[np.uint8]
    """`(s, s, 3)`, RGB."""
    landmarks: NDArray[np.float32]
    """`(68, 2)`, in crop pixels."""
    confidence: float
    """In [0, 1]."""
    box: NDArray[np.float32]
    """`(4,)`, left, top, right, bottom, in pixels of the upright frame; NaN if unknown."""
    face_id: int
    """Number of the person."""
    frame_landmarks: NDArray[np.float32]
    """`(68, 2)`, in pixels of the upright frame; NaN if unknown."""


class FaceFinder:
    """Detector, landmark extractor and tracker of one process."""

    def __init__(self, options: FaceOptions, crop_size: int = 224) -> None:
        check_range("crop_size", crop_size, 8)
        require("cv2", purpose="aligning faces", extra="landmarks")
        self.options = options
        self.crop_size = crop_size
        self._models = ExitStack()
        self.detector = self._closing(
            FACE_DETECTORS.create(options.detector, **options.detector_options)
        )
        try:
            self.extractor = self._closing(
                LANDMARK_EXTRACTORS.create(options.landmarks, **options.landmark_options)
            )
        except BaseException:
            self.close()
            raise
        self._tracker: FaceTracker | PeopleTracker | None = None
        if isinstance(self.detector, CropSource):
            pass  # there is no face to follow
        elif options.face in FACE_SELECTIONS:
            self._tracker = FaceTracker(self.detector, self.extractor, select=str(options.face))
        else:
            self._tracker = PeopleTracker(self.detector, self.extractor)
        self._face_ids: set[int] = set()

    def start(self, name: str) -> None:
        """Get ready for the first frame of a trial."""
        self._face_ids = set()
        if self._tracker is not None:
            self._tracker.reset(name)
        if isinstance(self.detector, CropSource):
            self.detector.start_video(name)
            if isinstance(self.extractor, FrameAware):
                self.extractor.start_video(name)

    def find(self, frame: VideoFrame) -> list[FaceTrack]:
        """Cut the chosen faces out of the next frame."""
        if isinstance(self.detector, CropSource):
            if isinstance(self.extractor, FrameAware):
                self.extractor.start_frame(frame.index)
            crop = self.detector.crop(frame.index)
            return [] if crop is None else self._of_aligned(crop)
        assert self._tracker is not None
        found = self._tracker.update(frame.image)
        if not isinstance(found, list):
            found = [] if found is None else [found]
        self._face_ids.update(face.face_id for face in found)
        if isinstance(self.options.face, int):
            found = [face for face in found if face.face_id == self.options.face]
        return [self._cut(frame.image, face) for face in found]

    def warnings(self) -> list[str]:
        """What to note about the faces of the video that has just ended."""
        if isinstance(self.options.face, int) and self.options.face not in self._face_ids:
            ids = ", ".join(map(str, sorted(self._face_ids))) or "none"
            return [f"no face has the number {self.options.face}; numbers seen: {ids}"]
        return []

    def close(self) -> None:
        """Stop the models now: a process that forks later must not inherit their threads."""
        self._models.close()

    def _closing(self, model: Any) -> Any:
        if hasattr(model, "close"):
            self._models.callback(model.close)
        return model

    def _cut(self, image: NDArray[np.uint8], face: Face) -> FaceTrack:
        crops, moved = align_faces([image], face.landmarks[None], self.crop_size)
        return FaceTrack(
            crops[0], moved[0], face.confidence, face.box, face.face_id, face.landmarks
        )

    def _of_aligned(self, crop: NDArray[np.uint8]) -> list[FaceTrack]:
        """Bring a crop that was aligned elsewhere to size."""
        cv2 = require("cv2", purpose="resizing crops", extra="landmarks")
        height, width = crop.shape[:2]
        found = self.extractor.extract(crop, FaceRegion(width / 2, height / 2, max(width, height)))
        if found.score >= 0.25:  # a second look, centred on the face, as trackers have it
            found = self.extractor.extract(crop, found.region)
        if found.score < 0.5 or not np.isfinite(found.points).all():
            return []
        size = self.crop_size
        how = cv2.INTER_AREA if size < min(height, width) else cv2.INTER_LINEAR
        resized = cv2.resize(crop, (size, size), interpolation=how)
        points = (found.points * (size / width, size / height)).astype(np.float32)
        unknown = np.full((68, 2), np.nan, dtype=np.float32)
        return [FaceTrack(resized, points, found.score, unknown.ravel()[:4], 0, unknown)]
