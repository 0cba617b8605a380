"""Faces that another program has found: boxes and landmarks from tables, crops from folders."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_choice, check_range
from mmau._optional import require
from mmau.media.errors import MediaError, check_file
from mmau.media.faces import FaceDetections, FaceLandmarks, FaceRegion
from mmau.registry import MissingDependencyError

__all__ = [
    "AlignedCropFolder",
    "PrecomputedFaceDetector",
    "PrecomputedLandmarks",
    "RetinaFaceDetector",
]

_BOX = ("left", "top", "right", "bottom")
_POINTS = tuple(f"{axis}_{index}" for axis in "xy" for index in range(68))


@dataclass(frozen=True)
class TabledFace:
    """One row of a table of faces."""

    box: NDArray[np.float32]
    """`(4,)`, left, top, right, bottom, in pixels of the upright frame."""
    score: float
    """In [0, 1]."""
    points: NDArray[np.float32] | None
    """`(68, 2)`, iBUG-68, in pixels of the upright frame, or `None` if the table has none."""


def read_face_table(path: str | os.PathLike[str]) -> dict[int, list[TabledFace]]:
    """Read a CSV file with one row per frame and face: frame, counted from 0, to its faces."""
    file = check_file(path)
    faces: dict[int, list[TabledFace]] = {}
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = csv.reader(stream)
        header = [name.strip().lower() for name in next(rows, [])]
        column = {name: index for index, name in enumerate(header)}
        if "frame" not in column:
            raise MediaError(f"a table of faces needs a column `frame`, counted from 1: {file}")
        if not all(n in column for n in _BOX) and not all(n in column for n in _POINTS):
            raise MediaError(
                "a table of faces needs the columns left, top, right, bottom or "
                f"x_0..x_67, y_0..y_67: {file}"
            )
        for line, row in enumerate(rows, start=2):
            if not any(cell.strip() for cell in row):
                continue
            try:
                frame, face = _read_row(row, column)
            except (ValueError, IndexError) as error:
                raise MediaError(
                    f"line {line} is not a row of numbers under the header ({error}): {file}"
                ) from error
            if face is not None:
                faces.setdefault(frame - 1, []).append(face)
    return faces


def _read_row(row: list[str], column: Mapping[str, int]) -> tuple[int, TabledFace | None]:
    def cell(name: str, otherwise: float = 1.0) -> float:
        return float(row[column[name]]) if name in column else otherwise

    frame = cell("frame")
    if frame < 1 or frame != int(frame):
        raise ValueError(f"frame {frame:g}")
    if cell("success") == 0:
        return int(frame), None
    points = box = None
    if all(name in column for name in _POINTS):
        points = np.array([cell(name) for name in _POINTS], np.float32).reshape(2, 68).T
        box = np.concatenate([points.min(axis=0), points.max(axis=0)])
    if all(name in column for name in _BOX):
        box = np.array([cell(name) for name in _BOX], np.float32)
    if box is None or not np.isfinite(box).all() or not (box[2:] > box[:2]).all():
        return int(frame), None  # tables say "no face" by zeros or NaN, too
    score = cell("score", cell("confidence"))
    return int(frame), TabledFace(box, min(max(score, 0.0), 1.0), points)


class _Tables:
    """The table of the video that is being read, out of one file or a folder of them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._faces: dict[int, list[TabledFace]] = {}
        self._frame = 0
        if not self.path.is_dir():
            self._faces = self._read(self.path)

    def start_video(self, name: str) -> None:
        """Read the table of a trial, `<path>/<name>.csv` if the path is a folder."""
        if self.path.is_dir():
            self._faces = self._read(self.path / f"{name}.csv")

    def start_frame(self, index: int) -> None:
        """Answer for this frame from now on, counted from 0."""
        self._frame = index

    def _read(self, file: Path) -> dict[int, list[TabledFace]]:
        return read_face_table(file)

    def _faces_here(self) -> list[TabledFace]:
        return self._faces.get(self._frame, [])


class PrecomputedFaceDetector(_Tables):
    """Boxes out of a CSV table with one row per frame and face, instead of a detector.

    Columns, in any order, with more beside them: `frame` (from 1, as in Aff-Wild2 and OpenFace);
    `left, top, right, bottom` or the landmarks `x_0..x_67, y_0..y_67` or both, in pixels of the
    upright frame; and, if there are any, `confidence` or `score` in [0, 1] and `success`, 0 where
    nothing was found. OpenFace's own files can be read as they are.

    Args:
        path: A CSV file, or a folder with one `<name of the trial>.csv` per video.

    Raises:
        MediaError: If a table is missing, has other columns, or a cell is not a number.

    Examples:
        ```python
        faces = FaceOptions(detector="precomputed", detector_options={"path": "talk.csv"})
        prepare_video("talk.mp4", faces=faces)
        ```
    """

    def detect(self, image: NDArray[np.uint8]) -> FaceDetections:
        """Return the boxes of the current frame, whatever the image shows."""
        faces = self._faces_here()
        return FaceDetections(
            np.array([face.box for face in faces], dtype=np.float32).reshape(-1, 4),
            np.array([face.score for face in faces], dtype=np.float32),
        )


class PrecomputedLandmarks(_Tables):
    """Landmarks out of a table such as OpenFace writes; see `PrecomputedFaceDetector`.

    Args:
        path: A CSV file, or a folder with one `<name of the trial>.csv` per video.

    Raises:
        MediaError: If a table is missing or has no landmarks.

    Examples:
        ```python
        options = {"path": "openface/"}
        faces = FaceOptions(
            detector="precomputed", detector_options=options,
            landmarks="precomputed", landmark_options=options,
        )
        prepare_dataset(videos, "prepared", faces=faces)
        ```
    """

    def _read(self, file: Path) -> dict[int, list[TabledFace]]:
        table = read_face_table(file)
        if any(face.points is None for faces in table.values() for face in faces):
            raise MediaError(f"the table has no landmarks x_0..x_67, y_0..y_67: {file}")
        return table

    def extract(self, image: NDArray[np.uint8], region: FaceRegion) -> FaceLandmarks:
        """Return the landmarks whose middle is nearest to that of a region, and inside it."""
        best, nearest = None, region.side / 2
        for face in self._faces_here():
            x, y = (face.box[:2] + face.box[2:]) / 2
            distance = float(np.hypot(x - region.x, y - region.y))
            if distance <= nearest:
                best, nearest = face.points, distance
        if best is None:
            return FaceLandmarks(np.full((68, 2), np.nan, np.float32), 0.0, region)
        return FaceLandmarks(best, 1.0, _region_around(best))


def _region_around(points: NDArray[np.floating]) -> FaceRegion:
    """An upright square half as large again as the extent of points."""
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = (low + high) / 2
    return FaceRegion(float(x), float(y), 1.5 * float((high - low).max()))


class AlignedCropFolder:
    """Aligned crops as numbered image files, such as `cropped_aligned` of Aff-Wild2.

    `00001.jpg` is the first frame of the video. A frame whose number is missing has no
    face. Files whose name is not a number are left alone.

    Args:
        path: Folder with one sub-folder per trial, by its name.

    Raises:
        MediaError: If there is no such folder.

    Examples:
        ```python
        faces = FaceOptions(detector="aligned_crops", detector_options={"path": "cropped_aligned"})
        prepare_video("1-30.mp4", faces=faces)
        ```
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MediaError(f"no such folder of aligned crops: {self.path}")
        self._files: dict[int, Path] = {}

    def start_video(self, name: str) -> None:
        """List the crops of a trial."""
        folder = self.path / name
        if not folder.is_dir():
            raise MediaError(f"no folder with the aligned crops of {name!r}: {folder}")
        self._files = {
            int(file.stem): file
            for file in sorted(folder.iterdir())
            if file.stem.isdigit() and file.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp")
        }

    def crop(self, index: int) -> NDArray[np.uint8] | None:
        """Return the crop `(h, w, 3)`, RGB, of a frame, counted from 0, or `None`."""
        file = self._files.get(index + 1)
        if file is None:
            return None
        cv2 = require("cv2", purpose="reading aligned crops", extra="landmarks")
        data = np.fromfile(file, dtype=np.uint8)
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if bgr is None:
            raise MediaError(f"not an image that can be decoded: {file}")
        crop: NDArray[np.uint8] = np.ascontiguousarray(bgr[..., ::-1])
        return crop

    def detect(self, image: NDArray[np.uint8]) -> NoReturn:
        """Refuse: crops do not say where in the image they come from."""
        raise TypeError("'aligned_crops' has crops, not boxes: use it through prepare_video.")


class RetinaFaceDetector:
    """Find faces with RetinaFace, the detector of the paper.

    The weights are not part of uniface and have their own licences, so nothing is downloaded here:
    `uniface.download_models` does it, once, when you have read them.

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
        """Find all faces of an image `(h, w, 3)`, RGB, best score first."""
        found = self._model.detect(np.ascontiguousarray(image[..., ::-1]))  # it wants BGR
        boxes = np.array([face.bbox for face in found], dtype=np.float32).reshape(-1, 4)
        scores = np.array([face.confidence for face in found], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        return FaceDetections(boxes[order], scores[order])
