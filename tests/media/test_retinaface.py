"""The adapter to uniface, with a stand-in for the package and its weights."""

import enum
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest

from mmau.media import FACE_DETECTORS
from mmau.registry import MissingDependencyError


class Weights(str, enum.Enum):
    SMALL = "retinaface_mnet_v2"
    LARGE = "retinaface_r34"


class StandIn:
    """Finds a face wherever a picture in BGR is blue, as uniface's RetinaFace would report it."""

    def __init__(self, *, model_name, confidence_threshold):
        self.model_name, self.threshold = model_name, confidence_threshold

    def detect(self, image):
        assert image.flags.c_contiguous
        blue = np.flatnonzero((image[..., 0] > 200).any(axis=0))
        found = [
            types.SimpleNamespace(bbox=np.array([x, 1.0, x + 4.0, 5.0]), confidence=0.5 + x / 100)
            for x in blue
        ]
        return [face for face in found if face.confidence >= self.threshold]


@pytest.fixture
def uniface(monkeypatch, tmp_path):
    package = types.ModuleType("uniface")
    package.RetinaFace, package.get_cache_dir = StandIn, lambda: str(tmp_path)
    constants = types.ModuleType("uniface.constants")
    constants.RetinaFaceWeights = Weights
    monkeypatch.setitem(sys.modules, "uniface", package)
    monkeypatch.setitem(sys.modules, "uniface.constants", constants)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    return tmp_path


def test_boxes_come_best_first_and_pictures_go_in_as_bgr(uniface):
    (uniface / "retinaface_mnet_v2.onnx").write_bytes(b"weights")
    detector = FACE_DETECTORS.create("retinaface", min_score=0.52)
    image = np.zeros((20, 30, 3), np.uint8)
    image[5, [1, 7, 20], 2] = 255  # blue in RGB
    image[5, 25, 0] = 255  # red
    boxes, scores = detector.detect(image)
    np.testing.assert_allclose(scores, [0.7, 0.57])
    np.testing.assert_allclose(boxes, [[20, 1, 24, 5], [7, 1, 11, 5]])
    assert boxes.dtype == scores.dtype == np.float32
    empty = detector.detect(np.zeros_like(image))
    assert empty.boxes.shape == (0, 4)


def test_absent_weights_are_one_sentence_with_the_command_and_nothing_is_downloaded(uniface):
    with pytest.raises(
        MissingDependencyError,
        match=r"^face detector 'retinaface' needs its weights, which are not at .*r34\.onnx; "
        r"to download them: python -c .*download_models",
    ) as caught:
        FACE_DETECTORS.create("retinaface", model="retinaface_r34")
    assert "\n" not in str(caught.value)


def test_wrong_options_are_refused(uniface):
    with pytest.raises(ValueError, match="`model` must be one of 'retinaface_mnet_v2', 'retina"):
        FACE_DETECTORS.create("retinaface", model="retinaface")
    with pytest.raises(ValueError, match="`min_score` must be in"):
        FACE_DETECTORS.create("retinaface", min_score=2)


@pytest.mark.parametrize("absent", ["uniface", "onnxruntime"])
def test_an_absent_library_is_one_sentence(uniface, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(
        MissingDependencyError,
        match=rf"^face detector 'retinaface' needs '{absent}', which is not installed: "
        r'pip install "mmau\[retinaface\]"$',
    ):
        FACE_DETECTORS.create("retinaface")


@pytest.mark.skipif(
    find_spec("uniface") is None or find_spec("onnxruntime") is None, reason="no uniface here"
)
def test_the_real_package_has_what_the_adapter_uses(monkeypatch, tmp_path):
    """Without its weights: names, places and the signature of its detector."""
    import inspect

    import uniface as package

    monkeypatch.setenv("UNIFACE_CACHE_DIR", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"retinaface_mnet_v2\.onnx; to download"):
        FACE_DETECTORS.create("retinaface")
    assert {"model_name", "confidence_threshold"} <= set(
        inspect.signature(package.RetinaFace).parameters
    )
