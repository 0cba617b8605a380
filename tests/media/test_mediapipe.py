import os
import sys
import types

import numpy as np
import pytest

from mmau.landmarks import to_ibug68
from mmau.media import (
    FACE_DETECTORS,
    LANDMARK_EXTRACTORS,
    FaceRegion,
    FaceTracker,
    MediaError,
    align_faces,
)
from mmau.media.face_alignment import transform_points
from mmau.media.faces import box_overlap
from mmau.registry import MissingDependencyError

cv2 = pytest.importorskip("cv2")
mediapipe = pytest.importorskip("mediapipe")

from mmau.media.mediapipe import (  # noqa: E402
    MediaPipeFaceDetector,
    MediaPipeLandmarks,
    _Model,
    quiet_native_stderr,
    region_to_square,
)

NAMES = ["grace_hopper", "astronaut"]


@pytest.fixture(scope="module")
def detector():
    detector = MediaPipeFaceDetector()
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def extractor():
    extractor = MediaPipeLandmarks()
    yield extractor
    extractor.close()


@pytest.fixture
def tracker(detector, extractor):
    return FaceTracker(detector, extractor)


def rotated(image, degrees):
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(image, matrix, (width, height))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [0, 1])
def test_boxes_are_those_of_mediapipes_own_graph(portraits, detector, name, model):
    ours = (detector._short_range, detector._full_range)[model].detect(portraits[name], 0.5)
    with mediapipe.solutions.face_detection.FaceDetection(
        min_detection_confidence=0.5, model_selection=model
    ) as solution:
        theirs = solution.process(portraits[name]).detections
    height, width = portraits[name].shape[:2]
    box = theirs[0].location_data.relative_bounding_box
    expected = np.array([box.xmin, box.ymin, box.xmin + box.width, box.ymin + box.height])
    assert len(ours.boxes) == len(theirs) == 1
    assert box_overlap(expected * [width, height, width, height], ours.boxes)[0] > 0.9
    assert ours.scores[0] == pytest.approx(theirs[0].score[0], abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_points_are_those_of_mediapipes_own_mesh(portraits, tracker, name):
    image = portraits[name]
    with mediapipe.solutions.face_mesh.FaceMesh(static_image_mode=True) as solution:
        mesh = solution.process(image).multi_face_landmarks[0].landmark
    points = np.array([[p.x, p.y] for p in mesh]) * image.shape[1::-1]
    ours = tracker.update(image).landmarks
    expected = to_ibug68(points)
    eyes = np.linalg.norm(expected[45] - expected[36])
    # Another region around the face moves points by a percent or two of the eye distance.
    assert np.linalg.norm(ours - expected, axis=1).mean() < 0.03 * eyes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [96, 192, 512, 1600])
def test_a_portrait_of_any_size_is_found_and_lies_in_its_crop(portraits, tracker, name, width):
    image = portraits[name]
    height = round(width * image.shape[0] / image.shape[1])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    face = tracker.update(image)
    _, (points,) = align_faces([image], face.landmarks[None], 224)
    assert 0.5 < face.confidence <= 1
    assert points[17:27, 1].min() > 11  # brows, with room to rise
    assert 170 < points[8, 1] < 200  # chin, with room to drop
    assert points[:, 0].min() > 10
    assert points[:, 0].max() < 214
    assert points[36:42, 0].max() < points[42:48, 0].min()  # the subject's right eye on the left


@pytest.mark.parametrize("degrees", [-40, -20, 20, 40])
def test_a_tilted_face_has_the_same_crop(portraits, tracker, degrees):
    image = portraits["astronaut"]
    upright = align_faces([image], tracker.update(image).landmarks[None], 224)[1]
    tracker.reset()
    tilted = rotated(image, degrees)
    turned = align_faces([tilted], tracker.update(tilted).landmarks[None], 224)[1]
    assert np.linalg.norm(turned - upright, axis=2).mean() < 6  # of 112 between the eyes


def test_a_small_face_in_a_large_image_is_found(portraits, tracker):
    scene = np.full((720, 1280, 3), 90, np.uint8)
    small = cv2.resize(portraits["astronaut"], (500, 500), interpolation=cv2.INTER_AREA)
    scene[200:700, 700:1200] = small  # the face in it is about 100 pixels wide
    face = tracker.update(scene)
    expected = 500 / 512 * np.array([226, 130]) + (700, 200)
    np.testing.assert_allclose(face.landmarks.mean(axis=0), expected, atol=15)


def test_a_hidden_face_is_gone_at_once_and_back_in_its_first_frame(portraits, tracker):
    face = cv2.resize(portraits["astronaut"], (192, 192), interpolation=cv2.INTER_AREA)
    grey = np.full_like(face, 110)
    noise = np.random.default_rng(0).integers(0, 255, face.shape, dtype=np.uint8)
    frames = [face, face, grey, grey, face, noise, face, face[:, ::-1].copy()]
    found = [tracker.update(frame) is not None for frame in frames]
    assert found == [True, True, False, False, True, False, True, True]


def test_a_cut_to_another_face_costs_no_frame(portraits, tracker):
    for name in (*NAMES, *NAMES):
        found = tracker.update(portraits[name])
        assert found is not None
        (box,) = tracker.detector.detect(portraits[name]).boxes
        assert box_overlap(box, found.box[None])[0] > 0.4


def test_a_followed_face_has_the_points_of_one_found_alone(portraits, detector, extractor):
    image = portraits["astronaut"]
    shifts = [np.roll(image, 3 * i, axis=1) for i in range(12)]
    tracker = FaceTracker(detector, extractor)
    followed = [tracker.update(frame).landmarks for frame in shifts]
    for frame, points in zip(shifts[-2:], followed[-2:], strict=True):
        alone = FaceTracker(detector, extractor).update(frame).landmarks
        assert np.abs(points - alone).mean() < 1.5  # pixels; the eyes are 80 apart


@pytest.mark.parametrize("value", [0, 110, 255])
def test_a_blank_image_has_no_face(detector, extractor, value):
    blank = np.full((120, 160, 3), value, np.uint8)
    assert len(detector.detect(blank).boxes) == 0
    assert extractor.extract(blank, FaceRegion(80, 60, 100)).score < 0.01


def test_a_faint_face_is_not_taken_for_a_blank_image(portraits, detector):
    faint = (110 + (portraits["grace_hopper"].astype(float) - 110) * 0.05).astype(np.uint8)
    assert len(detector.detect(faint).boxes) == 1


def test_a_score_is_between_0_and_1():
    with pytest.raises(ValueError, match="`min_score` must be in"):
        MediaPipeFaceDetector(min_score=2)


def test_the_registered_detector_is_this_one():
    assert FACE_DETECTORS.get("mediapipe") is MediaPipeFaceDetector


def test_the_native_libraries_stay_quiet(capfd):
    MediaPipeLandmarks().close()
    MediaPipeFaceDetector().close()
    sys.stderr.write("still there")
    assert capfd.readouterr().err == "still there"


def test_what_native_code_says_before_it_fails_is_not_swallowed(capfd):
    def fail():
        os.write(2, b"the reason")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), quiet_native_stderr():
        fail()
    assert capfd.readouterr().err == "the reason"


def test_a_mediapipe_without_its_models_is_said_to_be_one():
    with pytest.raises(MissingDependencyError, match=r"mediapipe .* does not bring .*'mmau\[landm"):
        _Model("no_such_model.tflite", size=64, low=0)


# ------------------------------------------------------------------ the Tasks API, with a stand-in
MESH = np.random.default_rng(0).uniform(0.2, 0.8, (478, 2))


class StandIn:
    """Sees the same 478 points in every image that is not black."""

    closed = False

    def detect(self, image):
        if not image.numpy_view().any():
            return types.SimpleNamespace(face_landmarks=[])
        points = [types.SimpleNamespace(x=x, y=y) for x, y in MESH]
        return types.SimpleNamespace(face_landmarks=[points])

    def close(self):
        self.closed = True


@pytest.fixture
def tasks_extractor(monkeypatch, tmp_path):
    model = tmp_path / "face_landmarker.task"
    model.write_bytes(b"model")
    wanted = []

    def create(options):
        wanted.append(options)
        return StandIn()

    monkeypatch.setattr(
        mediapipe.tasks.vision.FaceLandmarker, "create_from_options", staticmethod(create)
    )
    made = LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=model, min_score=0.4)
    assert wanted[0].base_options.model_asset_path == str(model)
    assert wanted[0].min_face_detection_confidence == 0.4
    return made


@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_points_go_back_to_the_image_also_out_of_a_tilted_region(tasks_extractor, angle):
    region = FaceRegion(80, 60, 64, angle)
    found = tasks_extractor.extract(np.full((120, 160, 3), 90, np.uint8), region)
    expected = to_ibug68(256 * MESH[:468])
    in_square = transform_points(found.points, region_to_square(region, 256))
    np.testing.assert_allclose(in_square, expected, atol=1e-2)
    assert found.score == 1
    assert found.points.dtype == np.float32
    middle = transform_points(
        np.array([[128.0, 128]]),
        np.linalg.inv(np.vstack([region_to_square(region, 256), [0, 0, 1]]))[:2],
    )[0]
    np.testing.assert_allclose([found.region.x, found.region.y], middle, atol=3)


def test_no_face_has_score_zero_and_nan_points(tasks_extractor):
    region = FaceRegion(80, 60, 64)
    found = tasks_extractor.extract(np.zeros((120, 160, 3), np.uint8), region)
    assert found.score == 0
    assert np.isnan(found.points).all()
    assert found.region == region
    tasks_extractor.close()
    assert tasks_extractor._model.closed


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(
        MediaError,
        match=r"^landmark extractor 'mediapipe_tasks' needs a face_landmarker\.task file: "
        r"no such file: .*face\.task$",
    ):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path / "face.task")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "text.task").write_text("not a model")
    with pytest.raises(
        MediaError, match=r"^not a face landmarker model that MediaPipe can load: .*text\.task \("
    ):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path / "text.task")


def test_a_score_is_a_probability(tmp_path):
    with pytest.raises(ValueError, match="`min_score` must be in"):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path, min_score=2)
