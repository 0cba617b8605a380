"""Video and sound files: frames with timestamps, faces, landmarks, aligned crops, waveforms.

Importing this package loads none of the libraries that do the work (PyAV, OpenCV, MediaPipe).
"""

from __future__ import annotations

from mmau.media.audio import AudioTrack, read_audio
from mmau.media.errors import MediaError
from mmau.media.face_alignment import align_faces, estimate_similarity
from mmau.media.faces import (
    FACE_DETECTORS,
    Face,
    FaceDetections,
    FaceDetector,
    FaceLandmarks,
    FaceRegion,
    FaceTracker,
    LandmarkExtractor,
)
from mmau.media.video import VideoFrame, VideoInfo, VideoReader

__all__ = [
    "FACE_DETECTORS",
    "AudioTrack",
    "Face",
    "FaceDetections",
    "FaceDetector",
    "FaceLandmarks",
    "FaceRegion",
    "FaceTracker",
    "LandmarkExtractor",
    "MediaError",
    "VideoFrame",
    "VideoInfo",
    "VideoReader",
    "align_faces",
    "estimate_similarity",
    "read_audio",
]
