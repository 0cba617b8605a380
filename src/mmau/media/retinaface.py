"""Faces by RetinaFace, as the uniface package runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau._optional import require
from mmau.media._face_types import FaceDetections
from mmau.registry import MissingDependencyError

__all__ = ["RetinaFaceDetector"]


class RetinaFaceDetector:
    """Find faces with RetinaFace, the detector of the paper.

    The weights are not part of uniface and have licences of their own, so nothing is downloaded
    here: `uniface.download_models` does it, once, when you have read them.

    Args:
        model: Which weights, by uniface's name, such as `"retinaface_mnet_v2"` or
            `"retinaface_r34"`.
        min_score: Smallest score of a detection.

    Raises:
        MissingDependencyError: If uniface or ONNX Runtime is not installed, or the weights are
            absent.
        ValueError: If an option is out of range.

    References:
        Deng et al., *RetinaFace: Single-stage Dense Face Localisation in the Wild*, 2019; section
        4.1 of the paper.

    Examples:
        ```python
        boxes, scores = RetinaFaceDetector().detect(image)  # image: (h, w, 3) uint8, RGB
        ```
    """

    def __init__(self, *, model: str = "retinaface_mnet_v2", min_score: float = 0.5) -> None:
        check_range("min_score", min_score, 0, 1)
        purpose = "face detector 'retinaface'"
        require("onnxruntime", purpose=purpose, extra="retinaface")
        uniface = require("uniface", purpose=purpose, extra="retinaface")
        known = require("uniface.constants", purpose=purpose, extra="retinaface").RetinaFaceWeights
        names = {weights.value: weights for weights in known}
        check_choice("model", model, sorted(names))
        file = Path(uniface.get_cache_dir()) / f"{model}.onnx"
        if not file.is_file():
            raise MissingDependencyError(
                f"face detector 'retinaface' needs its weights, which are not at {file}; "
                "to download them: python -c 'import uniface; from uniface.constants import "
                f"RetinaFaceWeights as W; uniface.download_models([W({model!r})])'"
            )
        self._model = uniface.RetinaFace(model_name=names[model], confidence_threshold=min_score)

    def detect(self, image: NDArray[np.uint8]) -> FaceDetections:
        """Find all faces of an image.

        Args:
            image: `(h, w, 3)`, RGB.

        Returns:
            Boxes in pixels, best score first, and their scores.
        """
        found = self._model.detect(np.ascontiguousarray(image[..., ::-1]))  # it wants BGR
        boxes = np.array([face.bbox for face in found], dtype=np.float32).reshape(-1, 4)
        scores = np.array([face.confidence for face in found], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        return FaceDetections(boxes[order], scores[order])
