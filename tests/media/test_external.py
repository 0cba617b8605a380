"""Tables and folders of faces that another program has found, and the adapter to uniface."""

import enum
import inspect
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest

from mmau.media import (
    FACE_DETECTORS,
    LANDMARK_EXTRACTORS,
    FaceRegion,
    FaceTracker,
    MediaError,
)
from mmau.media.external import read_face_table
from mmau.media.faces import CropSource, FrameAware
from mmau.registry import MissingDependencyError

IMAGE = np.zeros((200, 200, 3), np.uint8)
BOXES = (
    "frame,left,top,right,bottom,score\n1,10,20,50,80,0.9\n1,100,20,150,80,0.8\n3,12,22,52,82,1\n"
)


def table(folder, text, name="a.csv"):
    (folder / name).write_text(text)
    return folder / name


def points_csv(rows):
    names = [f"{axis}_{i}" for axis in "xy" for i in range(68)]
    lines = [f"{frame}," + ",".join(f"{v:.3f}" for v in points.T.ravel()) for frame, points in rows]
    return "\n".join(["frame," + ",".join(names), *lines])


def test_frames_count_from_one_in_the_file_and_from_zero_here(tmp_path):
    faces = read_face_table(table(tmp_path, BOXES))
    assert {frame: len(rows) for frame, rows in faces.items()} == {0: 2, 2: 1}
    assert faces[2][0].box.tolist() == [12, 22, 52, 82]
    assert faces[0][1].score == pytest.approx(0.8)
    assert faces[0][0].points is None


@pytest.mark.parametrize(
    "row",
    ["1,0,0,0,0,0.9", "1,nan,20,50,80,0.9", "1,50,20,10,80,0.9"],
    ids=["zeros", "nan", "inside out"],
)
def test_a_row_without_a_box_is_a_frame_without_a_face(tmp_path, row):
    assert read_face_table(table(tmp_path, f"frame,left,top,right,bottom,score\n{row}\n")) == {}


def test_headers_as_they_are_found(tmp_path):
    """A byte order mark, blanks, capitals, CRLF, more columns, empty lines."""
    text = "\ufeffFrame, Left ,TOP,right,bottom,success,pose_Rx\r\n1,1,2,3,4,1,x\r\n\r\n"
    text += "2,1,2,3,4,0,x\r\n"
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert list(read_face_table(path)) == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a column `frame`, counted from 1: .*a.csv|the file is empty"),
        ("left,top,right,bottom\n", r"needs a column `frame`, counted from 1: .*a\.csv"),
        ("frame,left,top\n1,2,3\n", r"needs the columns left, top, right, bottom or x_0\.\.x_67"),
        (
            "frame,left,top,right,bottom\n1,2,3,4,five\n",
            r"line 2 is not a row of numbers under the header \(could not convert .*a\.csv",
        ),
        ("frame,left,top,right,bottom\n1,2,3\n", "line 2 is not a row of numbers"),
        ("frame,left,top,right,bottom\n0,1,2,3,4\n", r"line 2 is not a row of numbers .*frame 0"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(MediaError, match=message):
        read_face_table(table(tmp_path, text))


def test_the_detector_answers_by_frame(tmp_path):
    detector = FACE_DETECTORS.create("precomputed", path=table(tmp_path, BOXES))
    assert isinstance(detector, FrameAware)
    assert not isinstance(detector, CropSource)
    detector.start_video("whatever")
    counts = []
    for index in range(4):
        detector.start_frame(index)
        counts.append(len(detector.detect(IMAGE).boxes))
    assert counts == [2, 0, 1, 0]
    assert detector.detect(IMAGE).boxes.shape == (0, 4)


def test_a_folder_has_one_table_per_trial(tmp_path):
    (tmp_path / "deep").mkdir()
    table(tmp_path, BOXES, "deep/talk.csv")
    detector = FACE_DETECTORS.create("precomputed", path=tmp_path)
    detector.start_video("deep/talk")
    detector.start_frame(0)
    assert len(detector.detect(IMAGE).boxes) == 2
    with pytest.raises(MediaError, match=r"no such file: .*other\.csv"):
        detector.start_video("other")


def test_landmarks_are_those_nearest_to_the_region(tmp_path):
    rng = np.random.default_rng(0)
    one, two = rng.uniform(20, 60, (68, 2)), rng.uniform(120, 160, (68, 2))
    path = table(tmp_path, points_csv([(1, one), (1, two)]))
    extractor = LANDMARK_EXTRACTORS.create("precomputed", path=path)
    extractor.start_frame(0)
    found = extractor.extract(IMAGE, FaceRegion(130, 140, 60))
    np.testing.assert_allclose(found.points, two, atol=1e-3)
    assert found.score == 1
    assert abs(found.region.x - 140) < 2
    assert extractor.extract(IMAGE, FaceRegion(90, 90, 40)).score == 0
    extractor.start_frame(1)
    assert extractor.extract(IMAGE, FaceRegion(130, 140, 60)).score == 0


def test_a_tracker_follows_the_table_and_nothing_else(tmp_path):
    points = np.random.default_rng(0).uniform(40, 90, (68, 2))
    path = table(tmp_path, points_csv([(1, points), (2, points + 3), (4, points)]))
    tracker = FaceTracker(
        FACE_DETECTORS.create("precomputed", path=path),
        LANDMARK_EXTRACTORS.create("precomputed", path=path),
    )
    tracker.reset("any")
    found = [tracker.update(IMAGE) for _ in range(5)]
    assert [face is not None for face in found] == [True, True, False, True, False]
    np.testing.assert_allclose(found[1].landmarks, points + 3, atol=1e-3)


def test_a_table_without_landmarks_is_no_source_of_landmarks(tmp_path):
    table(tmp_path, BOXES)
    for make in (
        lambda: LANDMARK_EXTRACTORS.create("precomputed", path=tmp_path / "a.csv"),
        lambda: LANDMARK_EXTRACTORS.create("precomputed", path=tmp_path).start_video("a"),
    ):
        with pytest.raises(MediaError, match=r"the table has no landmarks x_0\.\.x_67.*a\.csv"):
            make()


def test_crops_are_not_boxes(tmp_path):
    source = FACE_DETECTORS.create("aligned_crops", path=tmp_path)
    assert isinstance(source, CropSource)
    with pytest.raises(TypeError, match="'aligned_crops' has crops, not boxes"):
        source.detect(IMAGE)


# ---------------------------------------------------------------------- RetinaFace
# A stand-in for uniface and its weights.
class Weights(str, enum.Enum):
    SMALL = "retinaface_mnet_v2"
    LARGE = "retinaface_r34"


class StandIn:
    """Finds a face wherever an image in BGR is blue, as uniface's RetinaFace would report it."""

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


def test_boxes_come_best_first_and_images_go_in_as_bgr(uniface):
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


def test_absent_weights_are_named_with_the_command_and_nothing_is_downloaded(uniface):
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
def test_an_absent_library_is_named(uniface, monkeypatch, absent):
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
    import uniface as package

    monkeypatch.setenv("UNIFACE_CACHE_DIR", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"retinaface_mnet_v2\.onnx; to download"):
        FACE_DETECTORS.create("retinaface")
    assert {"model_name", "confidence_threshold"} <= set(
        inspect.signature(package.RetinaFace).parameters
    )
