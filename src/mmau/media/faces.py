"""Faces in a stream of frames: what finds them, what finds their landmarks, who is followed."""

from __future__ import annotations

from collections.abc import Callable

from mmau.media._face_types import (
    CropSource,
    Face,
    FaceDetections,
    FaceDetector,
    FaceLandmarks,
    FaceRegion,
    FrameAware,
    LandmarkExtractor,
    box_overlap,
)
from mmau.media.face_tracking import FaceTracker, PeopleTracker
from mmau.registry import Registry

__all__ = [
    "FACE_DETECTORS",
    "LANDMARK_EXTRACTORS",
    "CropSource",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceRegion",
    "FaceTracker",
    "FrameAware",
    "LandmarkExtractor",
    "PeopleTracker",
    "box_overlap",
]

FACE_DETECTORS: Registry[Callable[..., FaceDetector]] = Registry(
    "face detector", group="mmau.face_detectors"
)
"""Face detectors by name; each is called with its own options and gives a `FaceDetector`."""

FACE_DETECTORS.register_lazy(
    "mediapipe",
    "mmau.media.mediapipe_faces:MediaPipeFaceDetector",
    summary="MediaPipe's bundled full-range and short-range face detectors.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
FACE_DETECTORS.register_lazy(
    "retinaface",
    "mmau.media.retinaface:RetinaFaceDetector",
    summary="RetinaFace through uniface, with weights that you have downloaded.",
    extra="retinaface",
    requires=("uniface", "onnxruntime"),
)
FACE_DETECTORS.register_lazy(
    "precomputed",
    "mmau.media.precomputed_faces:PrecomputedFaceDetector",
    summary="Boxes, or landmarks, of every frame from a CSV table.",
)
FACE_DETECTORS.register_lazy(
    "aligned_crops",
    "mmau.media.precomputed_faces:AlignedCropFolder",
    summary="Aligned crops from a folder of numbered pictures (cropped_aligned of Aff-Wild2).",
    extra="landmarks",
    requires=("cv2",),
)

LANDMARK_EXTRACTORS: Registry[Callable[..., LandmarkExtractor]] = Registry(
    "landmark extractor", group="mmau.landmark_extractors"
)
"""Landmark extractors by name; each is called with its own options."""

LANDMARK_EXTRACTORS.register_lazy(
    "mediapipe",
    "mmau.media.mediapipe_faces:MediaPipeLandmarks",
    summary="MediaPipe's bundled face mesh, reduced to 68 points.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
LANDMARK_EXTRACTORS.register_lazy(
    "mediapipe_tasks",
    "mmau.media.mediapipe_tasks:MediaPipeTasksLandmarks",
    summary="A face_landmarker.task file of yours through the Tasks API of MediaPipe.",
    extra="landmarks",
    requires=("mediapipe", "cv2"),
)
LANDMARK_EXTRACTORS.register_lazy(
    "precomputed",
    "mmau.media.precomputed_faces:PrecomputedLandmarks",
    summary="68 landmarks of every frame from a CSV table, such as OpenFace writes.",
)
