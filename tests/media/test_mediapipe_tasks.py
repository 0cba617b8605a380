"""The adapter to the Tasks API: what is said about its file, and a stand-in for its model."""

import types

import numpy as np
import pytest

from mmau.landmarks import to_ibug68
from mmau.media import LANDMARK_EXTRACTORS, FaceRegion, MediaError
from mmau.media.face_alignment import transform_points
from mmau.media.mediapipe import region_to_square

mediapipe = pytest.importorskip("mediapipe")
pytest.importorskip("cv2")

MESH = np.random.default_rng(0).uniform(0.2, 0.8, (478, 2))


class StandIn:
    """Sees the same 478 points in every picture that is not black."""

    closed = False

    def detect(self, picture):
        if not picture.numpy_view().any():
            return types.SimpleNamespace(face_landmarks=[])
        points = [types.SimpleNamespace(x=x, y=y) for x, y in MESH]
        return types.SimpleNamespace(face_landmarks=[points])

    def close(self):
        self.closed = True


@pytest.fixture
def extractor(monkeypatch, tmp_path):
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
def test_points_go_back_to_the_picture_also_out_of_a_tilted_region(extractor, angle):
    region = FaceRegion(80, 60, 64, angle)
    found = extractor.extract(np.full((120, 160, 3), 90, np.uint8), region)
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


def test_no_face_has_score_zero_and_nan_points(extractor):
    region = FaceRegion(80, 60, 64)
    found = extractor.extract(np.zeros((120, 160, 3), np.uint8), region)
    assert found.score == 0
    assert np.isnan(found.points).all()
    assert found.region == region
    extractor.close()
    assert extractor._model.closed


def test_an_absent_file_is_one_sentence(tmp_path):
    with pytest.raises(
        MediaError,
        match=r"^landmark extractor 'mediapipe_tasks' needs a face_landmarker\.task file: "
        r"no such file: .*face\.task$",
    ):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path / "face.task")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "text.task").write_text("no model")
    with pytest.raises(
        MediaError, match=r"^not a face landmarker model that MediaPipe can load: .*text\.task \("
    ):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path / "text.task")


def test_a_score_is_a_probability(tmp_path):
    with pytest.raises(ValueError, match="`min_score` must be in"):
        LANDMARK_EXTRACTORS.create("mediapipe_tasks", model_path=tmp_path, min_score=2)
