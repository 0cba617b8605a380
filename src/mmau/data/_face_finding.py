"""From one decoded frame to the aligned faces in it, by components that are chosen by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau._optional import require
from mmau.media._face_types import CropSource, Face, FaceRegion, FrameAware, LandmarkExtractor
from mmau.media.face_alignment import align_faces
from mmau.media.face_tracking import FACE_SELECTIONS, FaceTracker, PeopleTracker
from mmau.media.faces import FACE_DETECTORS, LANDMARK_EXTRACTORS
from mmau.media.video import VideoFrame

__all__ = ["ALL_FACES", "FaceFinder", "FaceOptions", "FaceRow"]

ALL_FACES = "all"


@dataclass(frozen=True)
class FaceOptions:
    """Everything that decides which faces are cut out, and how; travels to worker processes."""

    crop_size: int = 224
    """Side of the crops, in pixels."""
    detector: str = "mediapipe"
    """Name in `FACE_DETECTORS`."""
    landmarks: str = "mediapipe"
    """Name in `LANDMARK_EXTRACTORS`."""
    face: str | int = "largest"
    """`"largest"`, `"left"`, `"right"`, the number of a person, or `"all"`."""
    detector_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the detector."""
    landmark_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the landmark extractor."""

    def check(self, *, several: bool) -> FaceOptions:
        """Refuse what cannot work, before a file is opened or a model is loaded.

        Args:
            several: Whether `face="all"` is possible.

        Returns:
            The options.

        Raises:
            ValueError: If a value is out of range.
            UnknownComponentError: If there is no such detector or extractor.
            MissingDependencyError: If a library is not installed.
            TypeError: If a component takes no such option.
        """
        check_range("crop_size", self.crop_size, 8)
        if isinstance(self.face, bool) or not isinstance(self.face, (str, int)):
            raise TypeError(f"`face` must be a word or the number of a person; got {self.face!r}.")
        if isinstance(self.face, int):
            check_range("face", self.face, 0)
        elif self.face == ALL_FACES and not several:
            raise ValueError(
                "`face='all'` gives one trial per person, so it needs `prepare_dataset`; "
                "choose 'largest', 'left', 'right' or the number of a person."
            )
        else:
            check_choice("face", self.face, (*FACE_SELECTIONS, ALL_FACES))
        FACE_DETECTORS.check_options(self.detector, self.detector_options)
        LANDMARK_EXTRACTORS.check_options(self.landmarks, self.landmark_options)
        return self

    def record(self, name: str) -> dict[str, Any]:
        """Say in JSON what a prepared file of this trial depends on besides its video.

        Args:
            name: Name of the trial.

        Returns:
            The options; each one that names a file or a folder with its size and time.
        """
        return {
            "crop_size": self.crop_size,
            "detector": self.detector,
            "landmarks": self.landmarks,
            "face": self.face,
            "detector_options": _stamped(self.detector_options, name),
            "landmark_options": _stamped(self.landmark_options, name),
        }


def _stamped(options: Mapping[str, Any], name: str) -> dict[str, Any]:
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


class FaceRow(NamedTuple):
    """One face of one frame, cut out."""

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


class FaceFinder:
    """Detector, extractor and tracker of one process.

    Args:
        options: What to look for.
    """

    def __init__(self, options: FaceOptions) -> None:
        require("cv2", purpose="aligning faces", extra="landmarks")
        self.options = options
        self.detector = FACE_DETECTORS.create(options.detector, **options.detector_options)
        try:
            self.extractor: LandmarkExtractor = LANDMARK_EXTRACTORS.create(
                options.landmarks, **options.landmark_options
            )
        except BaseException:
            _close(self.detector)
            raise
        self._one: FaceTracker | None = None
        self._people: PeopleTracker | None = None
        if isinstance(self.detector, CropSource):
            pass  # nobody to follow
        elif options.face in FACE_SELECTIONS:
            self._one = FaceTracker(self.detector, self.extractor, select=str(options.face))
        else:
            self._people = PeopleTracker(self.detector, self.extractor)
        self.seen_ids: set[int] = set()

    @property
    def keeps_everybody(self) -> bool:
        """Whether each person is a trial of its own."""
        return self.options.face == ALL_FACES

    def start(self, name: str) -> None:
        """Get ready for the first frame of a trial.

        Args:
            name: Name of the trial.
        """
        self.seen_ids = set()
        for tracker in (self._one, self._people):
            if tracker is not None:
                tracker.reset(name)
        if isinstance(self.detector, CropSource):
            self.detector.start_video(name)
            if isinstance(self.extractor, FrameAware):
                self.extractor.start_video(name)

    def find(self, frame: VideoFrame) -> list[FaceRow]:
        """Cut the chosen faces out of the next frame.

        Args:
            frame: The frame.

        Returns:
            The faces; at most one unless everybody is kept.
        """
        if isinstance(self.detector, CropSource):
            if isinstance(self.extractor, FrameAware):
                self.extractor.start_frame(frame.index)
            return self._of_crop(self.detector.crop(frame.index))
        if self._one is not None:
            face = self._one.update(frame.image)
            faces = [] if face is None else [face]
        else:
            assert self._people is not None
            faces = self._people.update(frame.image)
            self.seen_ids.update(face.face_id for face in faces)
            if not self.keeps_everybody:
                faces = [face for face in faces if face.face_id == self.options.face]
        return [self._cut(frame.image, face) for face in faces]

    def warnings(self) -> list[str]:
        """What to note about the faces of the video that has just ended."""
        if isinstance(self.options.face, int) and self.options.face not in self.seen_ids:
            ids = ", ".join(map(str, sorted(self.seen_ids))) or "none"
            return [f"no face has the number {self.options.face}; numbers seen: {ids}"]
        return []

    def close(self) -> None:
        """Stop the models now: a process that forks later must not inherit their threads."""
        _close(self.detector)
        _close(self.extractor)

    # ------------------------------------------------------------------ inside
    def _cut(self, image: NDArray[np.uint8], face: Face) -> FaceRow:
        crops, moved = align_faces([image], face.landmarks[None], self.options.crop_size)
        return FaceRow(crops[0], moved[0], face.confidence, face.box, face.face_id)

    def _of_crop(self, crop: NDArray[np.uint8] | None) -> list[FaceRow]:
        """A crop that somebody else has aligned is only brought to size."""
        if crop is None:
            return []
        cv2 = require("cv2", purpose="resizing crops", extra="landmarks")
        height, width = crop.shape[:2]
        found = self.extractor.extract(crop, FaceRegion(width / 2, height / 2, max(width, height)))
        if found.score >= 0.25:  # a second look, centred on the face, as trackers have it
            found = self.extractor.extract(crop, found.region)
        if found.score < 0.5 or not np.isfinite(found.points).all():
            return []
        size = self.options.crop_size
        how = cv2.INTER_AREA if size < min(height, width) else cv2.INTER_LINEAR
        resized = cv2.resize(crop, (size, size), interpolation=how)
        points = (found.points * (size / width, size / height)).astype(np.float32)
        unknown = np.full(4, np.nan, dtype=np.float32)
        return [FaceRow(resized, points, found.score, unknown, 0)]


def _close(part: object) -> None:
    stop = getattr(part, "close", None)
    if stop is not None:
        stop()
