import numpy as np
import pytest

from mmau.media import (
    FACE_DETECTORS,
    FaceDetections,
    FaceLandmarks,
    FaceOptions,
    FaceRegion,
    FaceTracker,
)
from mmau.media.faces import box_overlap

# A toy world: a picture's faces are listed in its first pixels, `x, y, half side` per face.
SHAPE = np.random.default_rng(0).uniform(-1, 1, (68, 2))
SHAPE[0], SHAPE[1] = (-1, -1), (1, 1)


def picture(*faces):
    image = np.zeros((200, 200, 3), np.uint8)
    for index, values in enumerate(faces):
        image[0, index] = values
    return image


def faces_of(image):
    return [tuple(int(v) for v in row) for row in image[0] if row.any()]


class ToyDetector:
    def __init__(self):
        self.calls = 0

    def detect(self, image):
        self.calls += 1
        boxes = [[x - r, y - r, x + r, y + r] for x, y, r in faces_of(image)]
        return FaceDetections(
            np.array(boxes, np.float32).reshape(-1, 4), np.full(len(boxes), 0.9, np.float32)
        )


class ToyLandmarks:
    def extract(self, image, region):
        for x, y, r in faces_of(image):
            if abs(x - region.x) < region.side / 2 and abs(y - region.y) < region.side / 2:
                points = (SHAPE * r + (x, y)).astype(np.float32)
                return FaceLandmarks(points, 0.8, FaceRegion(x, y, 3.0 * r))
        return FaceLandmarks(np.zeros((68, 2), np.float32), 0.01, region)


@pytest.fixture
def tracker():
    return FaceTracker(ToyDetector(), ToyLandmarks(), check_every=10)


def centre(face):
    return tuple((face.box[:2] + face.box[2:]) / 2)


def test_a_face_is_followed_with_few_looks_of_the_detector(tracker):
    found = [tracker.update(picture((50 + i, 80, 20))) for i in range(40)]
    assert [centre(face) for face in found] == [(50 + i, 80) for i in range(40)]
    assert {face.face_id for face in found} == {0}
    assert tracker.detector.calls == 1 + 3  # found once, checked every ten frames
    assert found[0].confidence == pytest.approx(0.9 * 0.8)


def test_a_face_that_vanishes_is_gone_at_once_and_back_at_once(tracker):
    frames = [picture((60, 60, 20))] * 3 + [picture()] * 4 + [picture((140, 60, 20))] * 2
    found = [tracker.update(frame) for frame in frames]
    assert [face is not None for face in found] == [True] * 3 + [False] * 4 + [True] * 2
    assert found[-1].face_id == 1
    assert tracker.update(picture()) is None


def test_a_face_that_returns_is_confirmed_by_the_detector(tracker):
    for frame in (picture((60, 60, 20)), picture(), picture((60, 60, 20))):
        tracker.update(frame)
    assert tracker.detector.calls == 3


def test_after_a_cut_the_new_face_is_found_in_its_first_frame(tracker):
    tracker.update(picture((30, 30, 20)))
    face = tracker.update(picture((150, 150, 30)))
    assert centre(face) == (150, 150)
    assert face.face_id == 1


def test_the_largest_face_is_followed_and_kept_when_a_larger_one_comes(tracker):
    tracker.update(picture((40, 60, 15), (140, 60, 20)))
    for radius in range(20, 60):
        face = tracker.update(picture((140, 60, 20), (40, 60, radius)))
        assert centre(face) == (140, 60)


def test_a_face_lost_for_a_moment_goes_before_a_larger_one(tracker):
    tracker.update(picture((140, 60, 20)))
    tracker.update(picture())
    face = tracker.update(picture((40, 60, 39), (142, 60, 20)))
    assert centre(face) == (142, 60)
    assert face.face_id == 0


@pytest.mark.parametrize(("select", "expected"), [("largest", 100), ("left", 40), ("right", 160)])
def test_the_first_face_is_the_selected_one(select, expected):
    tracker = FaceTracker(ToyDetector(), ToyLandmarks(), select=select)
    face = tracker.update(picture((100, 60, 25), (40, 60, 20), (160, 60, 15)))
    assert centre(face)[0] == expected


def test_a_track_that_left_every_face_is_given_up(tracker):
    """The landmark model believes in a wall; at the next check the detector knows better."""
    tracker.update(picture((40, 60, 20)))
    wall = FaceLandmarks((SHAPE * 20 + (40, 60)).astype(np.float32), 0.9, FaceRegion(40, 60, 60))
    believe = tracker.extractor.extract
    tracker.extractor.extract = lambda image, region: (
        wall if region.x == 40 else believe(image, region)
    )
    found = [tracker.update(picture((150, 150, 20))) for _ in range(10)]
    assert [centre(face) for face in found[:9]] == [(40, 60)] * 9
    assert centre(found[9]) == (150, 150)


def test_reset_forgets(tracker):
    tracker.update(picture((40, 60, 20)))
    tracker.reset()
    assert tracker.update(picture((150, 150, 20))).face_id == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "biggest"}, "`select` must be one of 'largest', 'left', 'right'"),
        ({"min_confidence": 2}, "`min_confidence` must be in"),
        ({"check_every": 0}, "`check_every` must be in"),
        ({"memory": -1}, "`memory` must be in"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FaceTracker(ToyDetector(), ToyLandmarks(), **options)


@pytest.mark.parametrize(
    ("face", "error", "message"),
    [
        ("big", ValueError, "`face` must be one of 'largest', 'left', 'right', 'all'"),
        (-1, ValueError, "`face` must be in"),
        (True, TypeError, "`face` must be a word or the number of a person; got True"),
        (1.5, TypeError, "`face` must be a word or the number of a person; got 1.5"),
    ],
)
def test_a_face_that_cannot_be_chosen_is_refused(face, error, message):
    with pytest.raises(error, match=message):
        FaceOptions(face=face)


def test_overlap_of_a_box_with_itself_and_with_nothing():
    box = np.array([10.0, 10, 30, 40])
    np.testing.assert_allclose(box_overlap(box, np.stack([box, box + 100])), [1, 0])
    assert box_overlap(box, np.zeros((0, 4))).shape == (0,)


def test_the_registry_lists_the_default_detector():
    assert "mediapipe" in FACE_DETECTORS
    with pytest.raises(LookupError, match="no face detector named 'mediapip'; did you mean"):
        FACE_DETECTORS.get("mediapip")
