"""Video and sound files: frames with timestamps, faces, landmarks, aligned crops, waveforms.

Importing this package loads none of the libraries that do the work (PyAV, OpenCV, MediaPipe).
"""

from __future__ import annotations

from mmau.media.audio import AudioSegment, AudioTrack, iterate_audio, read_audio
from mmau.media.errors import MediaError
from mmau.media.face_alignment import align_faces, estimate_similarity
from mmau.media.faces import (
    FACE_DETECTORS,
    LANDMARK_EXTRACTORS,
    CropSource,
    Face,
    FaceDetections,
    FaceDetector,
    FaceLandmarks,
    FaceRegion,
    FaceTracker,
    FrameAware,
    LandmarkExtractor,
    PeopleTracker,
)
from mmau.media.video import VideoFrame, VideoInfo, VideoReader

__all__ = [
    "FACE_DETECTORS",
    "LANDMARK_EXTRACTORS",
    "AudioSegment",
    "AudioTrack",
    "CropSource",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceRegion",
    "FaceTracker",
    "FrameAware",
    "LandmarkExtractor",
    "MediaError",
    "PeopleTracker",
    "VideoFrame",
    "VideoInfo",
    "VideoReader",
    "align_faces",
    "estimate_similarity",
    "iterate_audio",
    "read_audio",
]
