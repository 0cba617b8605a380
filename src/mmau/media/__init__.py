"""Video and sound files: frames with timestamps, faces, landmarks, aligned crops, waveforms.

Importing this package loads none of the libraries that do the work (PyAV, OpenCV, MediaPipe).
"""

from __future__ import annotations

from mmau.media.audio import AudioTrack, iterate_audio, read_audio
from mmau.media.errors import MediaError
from mmau.media.face_alignment import align_faces
from mmau.media.faces import (
    FACE_DETECTORS,
    LANDMARK_EXTRACTORS,
    Face,
    FaceDetections,
    FaceDetector,
    FaceLandmarks,
    FaceOptions,
    FaceRegion,
    FaceTracker,
    LandmarkExtractor,
    PeopleTracker,
)
from mmau.media.video import VideoFrame, VideoReader

__all__ = [
    "FACE_DETECTORS",
    "LANDMARK_EXTRACTORS",
    "AudioTrack",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceOptions",
    "FaceRegion",
    "FaceTracker",
    "LandmarkExtractor",
    "MediaError",
    "PeopleTracker",
    "VideoFrame",
    "VideoReader",
    "align_faces",
    "iterate_audio",
    "read_audio",
]
