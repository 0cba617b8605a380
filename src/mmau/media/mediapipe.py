"""Faces and landmarks by MediaPipe: its bundled models, and a newer one from a file.

MediaPipe's own `FaceMesh` keeps the last frame's face inside its graph: it loses small faces,
returns nothing on the first frame after a cut, and does not tell how sure it is. Here each model is
a graph of its own that maps a prepared image to numbers, and `FaceTracker` decides where to look.

Do not use these objects in a process that was forked after they were made: start workers by spawn.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mediapipe
import numpy as np
from mediapipe.python import packet_creator, packet_getter
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau.landmarks import to_ibug68
from mmau.media.errors import MediaError, check_file
from mmau.media.face_alignment import crop_similarity, estimate_similarity, transform_points
from mmau.media.faces import FaceDetections, FaceLandmarks, FaceRegion, box_overlap
from mmau.registry import MissingDependencyError

__all__ = ["MediaPipeFaceDetector", "MediaPipeLandmarks", "MediaPipeTasksLandmarks"]

_stderr_lock = threading.Lock()


@contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Swallow what native code writes to stderr, unless the block fails."""
    # TensorFlow Lite and absl announce themselves on file descriptor 2 when a graph starts, before
    # any of their own switches works.
    with _stderr_lock, tempfile.TemporaryFile() as captured:
        with suppress(AttributeError, ValueError):  # no stderr at all (pythonw), or closed
            sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(captured.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                captured.seek(0)
                os.write(2, captured.read())


def region_to_square(region: FaceRegion, size: int) -> NDArray[np.float64]:
    """The similarity that turns and scales a region to a square image."""
    centre = np.array([region.x, region.y])
    right = 0.5 * region.side * np.array([np.cos(region.angle), np.sin(region.angle)])
    return estimate_similarity(
        np.stack([centre - right, centre + right]), np.array([[0, size / 2], [size, size / 2]])
    )


_RIGHT_EYE_CORNER, _LEFT_EYE_CORNER = 33, 263


def _landmarks_of_mesh(
    mesh: NDArray[np.float64], matrix: NDArray[np.float64], score: float
) -> FaceLandmarks:
    """The landmarks of a mesh `(468, 2)` in a square, in the image from which `matrix` cut it."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    mesh = transform_points(mesh, inverse)
    points = np.asarray(to_ibug68(mesh), dtype=np.float32)
    # The next region: half as large again as the mesh and turned with the eyes, as in training.
    dx, dy = mesh[_LEFT_EYE_CORNER] - mesh[_RIGHT_EYE_CORNER]
    angle = float(np.arctan2(dy, dx))
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = mesh @ axes.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    x, y = axes.T @ ((low + high) / 2)
    region = FaceRegion(float(x), float(y), 1.5 * float((high - low).max()), angle)
    return FaceLandmarks(points, score, region)


_GRAPH = """
executor {{ type: "ApplicationThreadExecutor" }}
input_stream: "image"
output_stream: "values"
output_stream: "scores"
node {{
  calculator: "ImageToTensorCalculator"
  input_stream: "IMAGE:image"
  output_stream: "TENSORS:input"
  options {{ [mediapipe.ImageToTensorCalculatorOptions.ext] {{
    output_tensor_width: {size}
    output_tensor_height: {size}
    output_tensor_float_range {{ min: {low} max: 1 }}
  }} }}
}}
node {{
  calculator: "InferenceCalculatorCpu"
  input_stream: "TENSORS:input"
  output_stream: "TENSORS:output"
  options {{ [mediapipe.InferenceCalculatorOptions.ext] {{
    model_path: "{model}"
    delegate {{ xnnpack {{ num_threads: 1 }} }}
  }} }}
}}
node {{
  calculator: "SplitTensorVectorCalculator"
  input_stream: "output"
  output_stream: "value_tensor"
  output_stream: "score_tensor"
  options {{ [mediapipe.SplitVectorCalculatorOptions.ext] {{
    ranges {{ begin: 0 end: 1 }}
    ranges {{ begin: 1 end: 2 }}
  }} }}
}}
node {{
  calculator: "TensorsToFloatsCalculator"
  input_stream: "TENSORS:value_tensor"
  output_stream: "FLOATS:values"
}}
node {{
  calculator: "TensorsToFloatsCalculator"
  input_stream: "TENSORS:score_tensor"
  output_stream: "FLOATS:scores"
  options {{ [mediapipe.TensorsToFloatsCalculatorOptions.ext] {{ activation: SIGMOID }} }}
}}
"""


class _Model:
    """One bundled TFLite model: a square image in, values and scores out."""

    def __init__(self, model: str, *, size: int, low: int) -> None:
        self.size = size
        self._outputs: dict[str, list[float]] = {}
        self._count = 0
        path = Path(mediapipe.__file__).parent / "modules" / model
        if not path.is_file():
            raise MissingDependencyError(
                f"mediapipe {mediapipe.__version__} does not bring its model {model!r}; "
                "0.10.14 does: pip install 'mmau[landmarks]'",
                name="mediapipe",
            )
        with quiet_native_stderr():
            self._graph = mediapipe.CalculatorGraph(
                graph_config=_GRAPH.format(model=path.as_posix(), size=size, low=low)
            )
            for stream in ("values", "scores"):
                self._graph.observe_output_stream(stream, self._receive)
            self._graph.start_run()
            self(np.zeros((size, size, 3), dtype=np.uint8))  # models announce themselves once, here

    def _receive(self, stream: str, packet: object) -> None:
        self._outputs[stream] = packet_getter.get_float_list(packet)

    def __call__(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self._outputs.clear()
        self._count += 1  # a graph wants rising times; the models ignore them
        packet = packet_creator.create_image_frame(
            image_format=mediapipe.ImageFormat.SRGB, data=image
        )
        self._graph.add_packet_to_input_stream(stream="image", packet=packet.at(self._count))
        self._graph.wait_until_idle()
        values, scores = self._outputs["values"], self._outputs["scores"]
        return np.asarray(values, np.float32), np.asarray(scores, np.float32)

    def close(self) -> None:
        self._graph.close()


class _BoxModel:
    """A detector of MediaPipe: a letterboxed image in, boxes out.

    Its output has `per_cell` rows for each cell of a grid, for one or more grids of other strides.
    """

    def __init__(
        self, model: str, size: int, *, strides: tuple[int, ...], per_cell: tuple[int, ...]
    ) -> None:
        self._model = _Model(model, size=size, low=-1)
        grids = []
        for stride, count in zip(strides, per_cell, strict=True):
            line = (np.arange(size // stride, dtype=np.float32) + 0.5) / (size // stride)
            y, x = np.meshgrid(line, line, indexing="ij")
            grids.append(np.repeat(np.stack([x.ravel(), y.ravel()], axis=1), count, axis=0))
        self._centres = np.concatenate(grids)  # (n, 2), x then y, in fractions of the square

    def detect(self, image: NDArray[np.uint8], min_score: float) -> FaceDetections:
        height, width = image.shape[:2]
        size = self._model.size
        scale = size / max(height, width)
        shift = (size - scale * np.array([width, height])) / 2  # bars of equal height on both sides
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        values, scores = self._model(crop_similarity(image, matrix, size, outside=0))
        raw = values.reshape(len(self._centres), -1)
        keep = np.flatnonzero(scores >= min_score)
        centre = raw[keep, 0:2] / size + self._centres[keep]
        half = raw[keep, 2:4] / size / 2
        boxes = np.concatenate([centre - half, centre + half], axis=1) * size
        boxes = (boxes - np.tile(shift, 2)) / scale
        return _merge_overlapping(boxes, scores[keep])

    def close(self) -> None:
        self._model.close()


def _merge_overlapping(boxes: NDArray[np.floating], scores: NDArray[np.float32]) -> FaceDetections:
    """Average boxes of one face by their scores (MediaPipe's weighted non-maximum suppression)."""
    merged, best = [], []
    left = np.argsort(-scores)
    while len(left):
        same = box_overlap(boxes[left[0]], boxes[left]) > 0.3
        same[0] = True  # also a box without area is done with
        group = left[same]
        merged.append(np.average(boxes[group], axis=0, weights=scores[group]))
        best.append(scores[left[0]])
        left = left[~same]
    return FaceDetections(
        np.asarray(merged, dtype=np.float32).reshape(-1, 4), np.asarray(best, dtype=np.float32)
    )


class MediaPipeFaceDetector:
    """Find faces with MediaPipe's full-range detector, then with its short-range one.

    The full-range model finds faces down to about a thirteenth of the longer side of the image
    (100 of 1280 pixels); the short-range one, run only where the first found nothing, finds faces
    that fill the image.

    Args:
        min_score: Smallest score of a detection.

    Raises:
        ValueError: If `min_score` is not in [0, 1].

    Examples:
        ```python
        boxes, scores = MediaPipeFaceDetector().detect(image)  # image: (h, w, 3) uint8, RGB
        ```
    """

    def __init__(self, *, min_score: float = 0.5) -> None:
        check_range("min_score", min_score, 0, 1)
        self.min_score = min_score
        self._full_range = _BoxModel(
            "face_detection/face_detection_full_range_sparse.tflite",
            192,
            strides=(4,),
            per_cell=(1,),
        )
        self._short_range = _BoxModel(
            "face_detection/face_detection_short_range.tflite",
            128,
            strides=(8, 16),
            per_cell=(2, 6),
        )

    def detect(self, image: NDArray[np.uint8]) -> FaceDetections:
        """Find all faces of an image `(h, w, 3)`, RGB, best score first."""
        sample = image[::4, ::4]
        if int(sample.max()) - int(sample.min()) < 5:  # one flat tone, give or take coding noise
            return FaceDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        found = self._full_range.detect(image, self.min_score)
        if not len(found.scores):
            found = self._short_range.detect(image, self.min_score)
        return found

    def close(self) -> None:
        """Stop the graphs."""
        self._full_range.close()
        self._short_range.close()


class MediaPipeLandmarks:
    """Find 68 landmarks inside a region with the face mesh model of MediaPipe.

    The 468 vertices of the mesh are reduced by `mmau.landmarks.to_ibug68`.

    Examples:
        ```python
        extractor = MediaPipeLandmarks()
        points, score, region = extractor.extract(image, FaceRegion(x=200, y=180, side=300))
        ```
    """

    def __init__(self) -> None:
        self._model = _Model("face_landmark/face_landmark.tflite", size=192, low=0)

    def extract(self, image: NDArray[np.uint8], region: FaceRegion) -> FaceLandmarks:
        """Find the landmarks of the face in a region, with the probability that it shows one."""
        size = self._model.size
        matrix = region_to_square(region, size)
        values, scores = self._model(crop_similarity(image, matrix, size))
        mesh = values.reshape(-1, 3)[:, :2].astype(np.float64)
        return _landmarks_of_mesh(mesh, matrix, float(scores[0]))

    def close(self) -> None:
        """Stop the graph."""
        self._model.close()


class MediaPipeTasksLandmarks:
    """Find 68 landmarks inside a region with your own `face_landmarker.task` file.

    The file is not part of any package; Google publishes it. It holds a newer mesh model, whose
    468 vertices (the ten of the irises are left out) are reduced by `mmau.landmarks.to_ibug68`. The
    Tasks API gives no probability: a face that is found has the score 1.

    Args:
        model_path: The `.task` file.
        min_score: Smallest score at which the model reports a face.

    Raises:
        MediaError: If there is no such file, or it is not a model of this kind.
        ValueError: If `min_score` is not in [0, 1].

    Examples:
        ```python
        extractor = MediaPipeTasksLandmarks("face_landmarker.task")
        points, score, region = extractor.extract(image, FaceRegion(x=200, y=180, side=300))
        ```
    """

    def __init__(self, model_path: str | os.PathLike[str], *, min_score: float = 0.5) -> None:
        check_range("min_score", min_score, 0, 1)
        try:
            file = check_file(model_path)
        except MediaError as error:
            raise MediaError(
                f"landmark extractor 'mediapipe_tasks' needs a face_landmarker.task file: {error}"
            ) from error
        tasks = mediapipe.tasks
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
        """Find the landmarks of the face in a region; the score is 1 or 0."""
        size = 256
        matrix = region_to_square(region, size)
        square = np.ascontiguousarray(crop_similarity(image, matrix, size))
        shown = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=square)
        faces = self._model.detect(shown).face_landmarks
        if not faces:
            return FaceLandmarks(np.full((68, 2), np.nan, np.float32), 0.0, region)
        mesh = size * np.array([[point.x, point.y] for point in faces[0][:468]])
        return _landmarks_of_mesh(mesh, matrix, 1.0)

    def close(self) -> None:
        """Stop the model."""
        self._model.close()
