"""Following all faces, in a toy world and with two photographs side by side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.media import FaceDetections, FaceLandmarks, FaceRegion, PeopleTracker

# A picture's faces are listed in its first pixels, `x, y, half side` per face.
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
    """Sees the face nearest to the middle of a region."""

    def extract(self, image, region):
        def distance(face):
            return np.hypot(face[0] - region.x, face[1] - region.y)

        near = [face for face in faces_of(image) if distance(face) < region.side / 2]
        if not near:
            return FaceLandmarks(np.zeros((68, 2), np.float32), 0.01, region)
        x, y, r = min(near, key=distance)
        points = (SHAPE * r + (x, y)).astype(np.float32)
        return FaceLandmarks(points, 0.8, FaceRegion(x, y, 3.0 * r))


@pytest.fixture
def tracker():
    return PeopleTracker(ToyDetector(), ToyLandmarks(), check_every=10, memory=5)


def places(faces):
    return {face.face_id: tuple((face.box[:2] + face.box[2:]) / 2) for face in faces}


def test_people_are_numbered_from_left_to_right_and_keep_their_numbers(tracker):
    for step in range(40):
        seen = tracker.update(picture((150 - step, 60, 15), (30 + step, 140, 20)))
        assert places(seen) == {0: (30 + step, 140), 1: (150 - step, 60)}
    assert tracker.detector.calls == 1 + 3  # once, then every ten frames
    assert seen[0].confidence == pytest.approx(0.9 * 0.8)


@given(steps=st.lists(st.tuples(*[st.booleans()] * 3), min_size=1, max_size=25))
def test_every_face_in_view_is_one_row_and_nobody_is_two(steps):
    """People at fixed places who come and go as they like; the detector looks at every frame."""
    tracker = PeopleTracker(ToyDetector(), ToyLandmarks(), check_every=1, memory=100)
    spots = [(30, 40, 15), (100, 40, 15), (170, 40, 15)]
    known = {}
    for present in steps:
        here = [spot for spot, is_here in zip(spots, present, strict=True) if is_here]
        seen = places(tracker.update(picture(*here)))
        assert sorted(seen.values()) == [(x, y) for x, y, _ in here]
        for number, place in seen.items():
            assert known.setdefault(number, place) == place
    assert len(set(known.values())) == len(known)


def test_somebody_who_comes_later_is_seen_at_the_next_look(tracker):
    for _ in range(4):
        tracker.update(picture((40, 60, 20)))
    both = [tracker.update(picture((40, 60, 20), (150, 60, 20))) for _ in range(10)]
    assert [len(seen) for seen in both] == [1] * 6 + [2] * 4
    assert places(both[-1]) == {0: (40, 60), 1: (150, 60)}


def test_somebody_who_leaves_is_gone_at_once_and_back_with_the_same_number(tracker):
    two, one = picture((40, 60, 20), (150, 60, 20)), picture((150, 60, 20))
    frames = [two] * 2 + [one] * 3 + [two]
    assert [sorted(places(tracker.update(f))) for f in frames] == [[0, 1]] * 2 + [[1]] * 3 + [
        [0, 1]
    ]


def test_after_too_long_or_elsewhere_it_is_a_new_number(tracker):
    tracker.update(picture((40, 60, 20)))
    for _ in range(6):
        assert tracker.update(picture()) == []
    assert list(places(tracker.update(picture((40, 60, 20))))) == [1]
    assert list(places(tracker.update(picture((150, 60, 20))))) == [2]


def test_two_tracks_do_not_end_on_one_face(tracker):
    """One walks behind the other and is hidden; the number that stays is the older one's."""
    for x in range(50, 98, 2):
        seen = tracker.update(picture((100, 60, 20), (x, 60, 20)))
        boxes = [tuple(face.box) for face in seen]
        assert len(set(boxes)) == len(boxes)
    seen = tracker.update(picture((100, 60, 20)))
    assert len(seen) == 1


def test_a_wall_that_the_mesh_believes_in_is_dropped_when_a_face_is_elsewhere(tracker):
    tracker.update(picture((40, 60, 20)))
    wall = FaceLandmarks((SHAPE * 20 + (40, 60)).astype(np.float32), 0.9, FaceRegion(40, 60, 60))
    believe = tracker.extractor.extract
    tracker.extractor.extract = lambda image, region: (
        wall if region.x == 40 else believe(image, region)
    )
    for _ in range(12):
        seen = places(tracker.update(picture((150, 150, 20))))
    assert seen == {1: (150, 150)}


def test_a_pose_that_only_the_detector_does_not_see_is_kept(tracker):
    two = picture((40, 60, 20), (150, 60, 20))
    tracker.update(two)
    detect = tracker.detector.detect
    tracker.detector.detect = lambda image: detect(picture((150, 60, 20)))
    for _ in range(25):
        assert sorted(places(tracker.update(two))) == [0, 1]


def test_reset_forgets_everybody(tracker):
    tracker.update(picture((40, 60, 20)))
    tracker.reset()
    assert places(tracker.update(picture((150, 150, 20)))) == {0: (150, 150)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 2}, "`min_confidence` must be in"),
        ({"check_every": 0}, "`check_every` must be in"),
        ({"memory": -1}, "`memory` must be in"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PeopleTracker(ToyDetector(), ToyLandmarks(), **options)


def test_two_photographs_side_by_side_are_two_people(portraits):
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("mediapipe")
    from mmau.media.mediapipe import MediaPipeFaceDetector, MediaPipeLandmarks

    small = [
        cv2.resize(portraits[name][:460], (240, 240), interpolation=cv2.INTER_AREA)
        for name in ("grace_hopper", "astronaut")
    ]
    grey = np.full_like(small[0], 110)
    tracker = PeopleTracker(MediaPipeFaceDetector(), MediaPipeLandmarks())
    counts = []
    for left, right in [small] * 3 + [(grey, small[1])] * 2 + [(small[0], grey)]:
        seen = tracker.update(np.concatenate([left, right], axis=1))
        counts.append([face.face_id for face in seen])
        for face in seen:
            assert (face.box[2] < 250) == (face.face_id == 0)
    assert counts == [[0, 1]] * 3 + [[1]] * 2 + [[0]]
