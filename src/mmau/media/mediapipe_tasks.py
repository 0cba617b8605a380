"""Landmarks by a model file of the Tasks API of MediaPipe."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau._optional import require
from mmau.landmarks import to_ibug68
from mmau.media._face_regions import region_around_mesh, region_to_square
from mmau.media._face_types import FaceLandmarks, FaceRegion
from mmau.media._native_log import quiet_native_stderr
from mmau.media.errors import MediaError, check_file
from mmau.media.face_alignment import crop_similarity, transform_points

__all__ = ["MediaPipeTasksLandmarks"]

_SIZE = 256
_MESH = 468


class MediaPipeTasksLandmarks:
    """Find 68 landmarks inside a region with a `face_landmarker.task` file of yours.

    The file is not part of any package; its publisher is Google. It holds a newer mesh model, whose
    468 vertices (the ten of the irises are left out) are reduced by `mmau.landmarks.to_ibug68`. The
    Tasks API gives no probability: a face that is found has the score 1.

    Args:
        model_path: The `.task` file.
        min_score: Smallest score at which the model reports a face.

    Raises:
        MissingDependencyError: If MediaPipe is not installed.
        MediaError: If there is no such file, or it is no model of this kind.
        ValueError: If `min_score` is not in [0, 1].

    Examples:
        ```python
        extractor = MediaPipeTasksLandmarks("face_landmarker.task")
        points, score, region = extractor.extract(image, FaceRegion(x=200, y=180, side=300))
        ```
    """

    def __init__(self, model_path: str | os.PathLike[str], *, min_score: float = 0.5) -> None:
        check_range("min_score", min_score, 0, 1)
        self._mediapipe = require(
            "mediapipe", purpose="landmark extractor 'mediapipe_tasks'", extra="landmarks"
        )
        try:
            file = check_file(model_path)
        except MediaError as error:
            raise MediaError(
                f"landmark extractor 'mediapipe_tasks' needs a face_landmarker.task file: {error}"
            ) from error
        tasks = self._mediapipe.tasks
        options = tasks.vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_path=str(file)),
            num_faces=1,
            min_face_detection_confidence=min_score,
            min_face_presence_confidence=min_score,
        )
        try:
            with quiet_native_stderr():
                self._model = tasks.vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise MediaError(
                f"not a face landmarker model that MediaPipe can load: {file} ({error})"
            ) from error

    def extract(self, image: NDArray[np.uint8], region: FaceRegion) -> FaceLandmarks:
        """Find the landmarks of the face in a region.

        Args:
            image: `(h, w, 3)`, RGB.
            region: Where the face is, with some room around it.

        Returns:
            Points in image pixels, 1 or 0, and the region for the next frame.
        """
        matrix = region_to_square(region, _SIZE)
        square = np.ascontiguousarray(crop_similarity(image, matrix, _SIZE))
        picture = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=square)
        faces = self._model.detect(picture).face_landmarks
        if not faces:
            return FaceLandmarks(np.full((68, 2), np.nan, np.float32), 0.0, region)
        in_square = _SIZE * np.array([[point.x, point.y] for point in faces[0][:_MESH]])
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        mesh = transform_points(in_square, inverse)
        points = np.asarray(to_ibug68(mesh), dtype=np.float32)
        return FaceLandmarks(points, 1.0, region_around_mesh(mesh))

    def close(self) -> None:
        """Stop the model."""
        self._model.close()
