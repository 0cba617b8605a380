"""Landmarks to patches: a clear loop as the oracle, and the laws of a set."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.landmark_patches import landmark_patches

WILD = st.one_of(
    st.floats(-30, 130, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e30, 56.0, 96.0, 112.0, 1e-30]),
)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6))
REGIONS = torch.tensor([[0, 1, 2], [2, 3, -1], [4, -1, -1], [5, 0, 3]])


def oracle(landmarks, regions, grid_size, image_size, visible, mode, ring):
    """Patch sets written as one would on paper, frame by frame and region by region."""
    (h, w), (height, width) = grid_size, image_size
    rows = []
    for indices in regions.tolist():
        cells = set()
        for index in indices:
            if index < 0 or not visible[index]:
                continue
            x, y = landmarks[index].tolist()
            if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= width and 0 <= y <= height):
                continue
            cells.add((min(int(y * h / height), h - 1), min(int(x * w / width), w - 1)))
        if mode == "bbox" and cells:
            ys, xs = [y for y, _ in cells], [x for _, x in cells]
            cells = {
                (y, x) for y in range(min(ys), max(ys) + 1) for x in range(min(xs), max(xs) + 1)
            }
        cells = {
            (y, x)
            for y in range(h)
            for x in range(w)
            if any(abs(y - a) <= ring and abs(x - b) <= ring for a, b in cells)
        }
        rows.append(cells)
    return rows


@given(
    points=st.lists(st.tuples(WILD, WILD), min_size=6, max_size=6),
    visible=st.lists(st.booleans(), min_size=6, max_size=6),
    grid_size=SIZES,
    mode=st.sampled_from(["points", "bbox"]),
    ring=st.integers(0, 2),
)
def test_equals_the_loop_for_any_points(points, visible, grid_size, mode, ring):
    # One frame that is surely in pixels, so that the unit is never in doubt. Float64, so that
    # the loop and the tensors round alike.
    landmarks = torch.tensor([points, [(50.0, 60.0)] * 6], dtype=torch.float64)
    seen = torch.tensor([visible, [True] * 6])
    weights, valid = landmark_patches(
        landmarks, REGIONS, grid_size, (112, 96), visible=seen, mode=mode, ring=ring
    )
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert_close(weights.sum(-1), torch.ones(2, 4))
    for frame in range(2):
        sets = oracle(landmarks[frame], REGIONS, grid_size, (112, 96), seen[frame], mode, ring)
        for region, cells in enumerate(sets):
            row = weights[frame, region].view(grid_size)
            assert bool(valid[frame, region]) == bool(cells)
            expected = torch.full(grid_size, 1 / row.numel())
            if cells:
                expected = torch.zeros(grid_size)
                for y, x in cells:
                    expected[y, x] = 1 / len(cells)
            assert_close(row, expected)


def test_a_patch_counts_once():
    # Three landmarks on one patch and one on another: one half each, not 3/4 and 1/4.
    landmarks = torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [60.0, 1.0]])
    weights, _ = landmark_patches(landmarks, torch.arange(4).view(1, 4), (1, 2), (100, 100))
    assert weights.tolist() == [[0.5, 0.5]]


@given(seed=st.integers(0, 1000), copies=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_duplicate_landmarks_change_nothing(seed, copies):
    landmarks = 224 * torch.rand(6, 2, generator=torch.Generator().manual_seed(seed))
    single = landmark_patches(landmarks, torch.arange(6).view(1, 6), (7, 5), (224, 224))
    table = torch.tensor([[*range(6), *range(6, 6 + len(copies))]])
    repeated = torch.cat((landmarks, landmarks[copies]))
    assert torch.equal(
        landmark_patches(repeated, table, (7, 5), (224, 224)).weights, single.weights
    )


@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_permuting_regions_permutes_rows(seed, order):
    landmarks = 300 * torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(seed)) - 40
    weights, valid = landmark_patches(landmarks, REGIONS, (4, 6), (224, 224))
    permuted = landmark_patches(landmarks, REGIONS[list(order)], (4, 6), (224, 224))
    assert torch.equal(permuted.weights, weights[:, list(order)])
    assert torch.equal(permuted.valid, valid[:, list(order)])


def test_normalised_and_pixel_coordinates_agree():
    unit = torch.rand(3, 6, 2, dtype=torch.float64)
    pixels = unit * torch.tensor([192.0, 128.0], dtype=torch.float64)
    a = landmark_patches(unit, REGIONS, (8, 12), (128, 192), coords="normalized")
    b = landmark_patches(pixels, REGIONS, (8, 12), (128, 192))
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("patch_size", [14, 16, 41])
def test_borders_belong_to_the_patch_that_starts_there(patch_size):
    # Exactly on a border; multiplying by the rounded 1 / 41 would fall short of some of them.
    x = float(patch_size) * torch.arange(16)
    landmarks = torch.stack((x, torch.full_like(x, 3.0)), -1)
    size = (16 * patch_size, 16 * patch_size)
    weights, _ = landmark_patches(landmarks, torch.arange(16).view(16, 1), (16, 16), size)
    assert weights.argmax(-1).tolist() == list(range(16))


def test_nothing_visible_is_the_global_mean_and_not_valid():
    landmarks = torch.full((2, 6, 2), torch.nan)
    weights, valid = landmark_patches(landmarks, REGIONS, (3, 4), (48, 64))
    assert not valid.any()
    assert_close(weights, torch.full((2, 4, 12), 1 / 12))


def test_compiles_without_a_graph_break():
    compiled = torch.compile(landmark_patches, fullgraph=True, backend="aot_eager")
    landmarks = 224 * torch.rand(2, 6, 2)
    there = compiled(landmarks, REGIONS, (4, 4), (224, 224), ring=1)
    here = landmark_patches(landmarks, REGIONS, (4, 4), (224, 224), ring=1)
    assert torch.equal(there.weights, here.weights)


PIXELS = torch.full((6, 2), 50.0)


@pytest.mark.parametrize(
    ("landmarks", "options", "error", "sentence"),
    [
        (PIXELS / 100, {}, ValueError, "all below 2, which cannot be pixels; pass coords='norm"),
        (PIXELS, {"coords": "normalized"}, ValueError, "all above 2, which cannot be normalised"),
        (PIXELS.bfloat16(), {}, TypeError, "must be float32 or float64, .* got torch.bfloat16"),
        (PIXELS[:, :1], {}, ValueError, r"`landmarks` must have shape \(\.\.\., k, 2\)"),
        (PIXELS[:4], {}, ValueError, "names landmark 5, but there are 4 landmarks"),
        (PIXELS, {"mode": "hul"}, ValueError, "`mode` must be one of 'points', 'bbox'; got 'hul'"),
        (PIXELS, {"coords": "unit"}, ValueError, "`coords` must be one of"),
        (PIXELS, {"ring": -1}, ValueError, "`ring` must be in .0, inf.; got -1"),
        (PIXELS, {"grid_size": (0, 4)}, ValueError, "`grid_size` must be two positive numbers"),
        (PIXELS, {"image_size": (224, 0)}, ValueError, "`image_size` must be two positive numbers"),
        (PIXELS, {"visible": torch.ones(6)}, TypeError, "`visible` must be a bool tensor"),
        (
            PIXELS,
            {"visible": torch.ones(1, 6) > 0},
            ValueError,
            r"`visible` must have shape \(6,\)",
        ),
    ],
)
def test_wrong_input_is_refused(landmarks, options, error, sentence):
    options = {"grid_size": (4, 4), "image_size": (224, 224), **options}
    with pytest.raises(error, match=sentence):
        landmark_patches(landmarks, REGIONS, **options)


def test_a_missing_face_is_not_a_wrong_unit():
    landmarks = torch.zeros(6, 2)
    nobody = torch.zeros(6, dtype=torch.bool)
    assert not landmark_patches(landmarks, REGIONS, (2, 2), (9, 9), visible=nobody).valid.any()
