import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.media.face_alignment import (
    STABLE_POINTS,
    STABLE_TEMPLATE,
    align_faces,
    crop_similarity,
    estimate_similarity,
    transform_points,
)


def similarity(scale, angle, x, y):
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


numbers = {
    "scale": st.floats(0.05, 20),
    "angle": st.floats(-3.1, 3.1),
    "x": st.floats(-500, 500),
    "y": st.floats(-500, 500),
}


@given(**numbers, seed=st.integers(0, 99), count=st.integers(2, 12))
def test_an_exact_similarity_is_found(scale, angle, x, y, seed, count):
    points = np.random.default_rng(seed).normal(size=(3, count, 2)) * 50
    matrix = similarity(scale, angle, x, y)
    found = estimate_similarity(points, transform_points(points, matrix))
    np.testing.assert_allclose(found, np.broadcast_to(matrix, found.shape), atol=1e-8 * (1 + 500))


def test_the_fit_is_the_least_squares_one_of_skimage():
    from skimage.transform import SimilarityTransform

    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(8, 2)), rng.normal(size=(8, 2)) + 3
    expected = SimilarityTransform.from_estimate(source, target).params[:2]
    np.testing.assert_allclose(estimate_similarity(source, target), expected, atol=1e-12)


def test_a_set_with_nan_gives_nan_and_spoils_no_other():
    points = np.random.default_rng(0).normal(size=(2, 5, 2))
    spoilt = points.copy()
    spoilt[0, 3] = np.nan
    found = estimate_similarity(spoilt, points)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], [[1, 0, 0], [0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (8, 3), (1, 2)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"must have shape \(\.\.\., k, 2\) with one k of at least 2"
    ):
        estimate_similarity(np.ones(shape), np.ones(shape))


def test_points_without_extent_are_refused():
    with pytest.raises(ValueError, match="all points of a set in `source` coincide"):
        estimate_similarity(np.ones((4, 2)), np.eye(4, 2))


# ---------------------------------------------------------------------- images
def spots(centres, size=240, radius=4.0):
    """A dark image with a bright, smooth spot at each centre (corner origin)."""
    y, x = np.mgrid[:size, :size] + 0.5
    image = sum(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2)) for cx, cy in centres)
    return np.repeat((255 * np.clip(image, 0, 1))[..., None], 3, axis=2).round().astype(np.uint8)


def spot_centre(image):
    weight = image[..., 0].astype(float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@given(scale=st.floats(0.2, 3), angle=st.floats(-3, 3))
def test_pixels_go_where_points_go(scale, angle):
    """Also where the crop is shrunk first: no half pixel is lost on any path."""
    centre = np.array([[121.3, 117.8]])
    matrix = similarity(scale, angle, 0, 0)
    matrix[:, 2] += 60 - transform_points(centre, matrix)[0]
    crop = crop_similarity(spots(centre), matrix, 120)
    np.testing.assert_allclose(spot_centre(crop), transform_points(centre, matrix)[0], atol=0.1)


def test_a_shift_by_whole_pixels_copies_them():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    crop = crop_similarity(image, similarity(1, 0, -2, -1), 2)
    np.testing.assert_array_equal(crop, image[1:3, 2:4])


@pytest.mark.parametrize("factor", [2, 3.7, 8])
def test_shrinking_averages_instead_of_skipping(factor):
    """A one pixel chessboard becomes grey, not another chessboard."""
    chess = (np.indices((400, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = np.repeat(chess[..., None], 3, axis=2)
    crop = crop_similarity(image, similarity(1 / factor, 0, 0, 0), 40)
    inner = crop[2:-2, 2:-2].astype(float)
    assert abs(inner.mean() - 127.5) < 3
    assert inner.std() < 30


@pytest.mark.parametrize(("outside", "expected"), [(None, 90), (7, 7)])
def test_beyond_the_edge_is_what_was_asked_for(outside, expected):
    image = np.full((20, 20, 3), 90, np.uint8)
    crop = crop_similarity(image, similarity(1, 0, 30, 0), 20, outside=outside)
    assert (crop == expected).all()


# ---------------------------------------------------------------------- faces
def face(seed=0):
    """68 points, the stable ones in the template's shape, with some noise."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (68, 2))
    points[list(STABLE_POINTS)] = STABLE_TEMPLATE + rng.normal(0, 0.002, (8, 2))
    return points


@given(scale=st.floats(40, 400), angle=st.floats(-3, 3), x=st.floats(-50, 50), y=st.floats(0, 90))
def test_the_crop_does_not_depend_on_place_size_and_tilt(scale, angle, x, y):
    placed = transform_points(face(), similarity(scale, angle, x, y))
    image = np.zeros((60, 60, 3), np.uint8)
    _, straight = align_faces([image], 100 * face()[None], 64)
    _, moved = align_faces([image], placed[None], 64)
    np.testing.assert_allclose(moved, straight, atol=1e-3)
    assert moved.dtype == np.float32


def test_frames_without_a_face_are_zero_and_nan():
    landmarks = 100 * np.stack([face(0), face(1), face(2)])
    landmarks[1, 20] = np.nan
    crops, moved = align_faces(np.full((3, 100, 100, 3), 200, np.uint8), landmarks, 32)
    assert crops.shape == (3, 32, 32, 3)
    assert crops[0].min() == crops[2].min() == 200
    assert crops[1].max() == 0
    assert np.isnan(moved[1]).all()
    assert np.isfinite(moved[[0, 2]]).all()


def test_a_wrong_number_of_landmarks_is_refused():
    with pytest.raises(
        ValueError, match=r"`landmarks` must have shape \(t, 68, 2\) with t = 2 images"
    ):
        align_faces(np.zeros((2, 9, 9, 3), np.uint8), np.zeros((2, 5, 2)), 32)
    with pytest.raises(ValueError, match="`size` must be in"):
        align_faces(np.zeros((1, 9, 9, 3), np.uint8), np.zeros((1, 68, 2)), 2)
