"""Landmarks to patches: a clear loop as the oracle, and the laws of a set."""

import math
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional import region_pooling
from mmau.functional.landmark_patches import PATCH_MODES, landmark_patches

# The loop that the benchmark runs against.
LOOP = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "_landmark_loop.py"))
SETS = tuple(mode for mode in PATCH_MODES if mode != "gaussian")
WILD = st.one_of(
    st.floats(-30, 130, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e30, 56.0, 96.0, 112.0, 1e-30]),
)
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 8))
REGIONS = torch.tensor(
    [[0, 1, 2, -1, -1, -1], [2, 3, -1, -1, -1, -1], [4, *[-1] * 5], [5, 0, 3, 1, 4, 2]]
)


def random_points(seed, *leading, low=-40.0, high=264.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*leading, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mode", PATCH_MODES)
@given(
    points=st.lists(st.tuples(WILD, WILD), min_size=6, max_size=6),
    visible=st.lists(st.booleans(), min_size=6, max_size=6),
    grid_size=SIZES,
    ring=st.integers(0, 2),
    sigma=st.floats(0.02, 3.0),
)
def test_equals_the_loop_for_any_points(mode, points, visible, grid_size, ring, sigma):
    # One frame that is surely in pixels, so that the unit is never in doubt. Float64, so that
    # the loop and the tensors round alike.
    landmarks = torch.tensor([points, [(50.0, 60.0)] * 6], dtype=torch.float64)
    seen = torch.tensor([visible, [True] * 6])
    options = {"mode": mode, "ring": ring if mode in SETS else 0, "sigma": sigma}
    weights, valid = landmark_patches(
        landmarks, REGIONS, grid_size, (112, 96), visible=seen, **options
    )
    assert weights.dtype == (torch.float32 if mode in SETS else torch.float64)
    assert torch.isfinite(weights).all()
    assert_close(weights.sum(-1), weights.new_ones(2, 4))
    for frame in range(2):
        expected, expected_valid = LOOP["region_weights"](
            landmarks[frame].tolist(),
            REGIONS.tolist(),
            grid_size,
            (112, 96),
            visible=seen[frame].tolist(),
            **options,
        )
        assert valid[frame].tolist() == expected_valid
        rows = torch.tensor(expected, dtype=torch.float64)
        if mode in SETS:
            assert torch.equal(weights[frame] > 0, rows > 0)
        # The loop's own exponentials lose digits where the softmax does not.
        assert_close(weights[frame].double(), rows, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("grid_size", [(16, 16), (3, 20), (37, 21)])
def test_hulls_of_many_points_equal_the_loop(grid_size):
    for seed in range(4):
        landmarks = random_points(seed, 12, 9, low=20.0 * seed, high=112.0)
        weights, _ = landmark_patches(
            landmarks, torch.arange(9).view(1, 9), grid_size, (112, 112), mode="hull"
        )
        for frame in range(12):
            (row,), _ = LOOP["region_weights"](
                landmarks[frame].tolist(), [range(9)], grid_size, (112, 112), mode="hull"
            )
            assert torch.equal(weights[frame, 0] > 0, torch.tensor(row) > 0)


@given(seed=st.integers(0, 1000), grid_size=SIZES)
def test_points_lie_in_their_hull_and_the_hull_in_the_box(seed, grid_size):
    landmarks = random_points(seed, 6)
    sets = [
        landmark_patches(landmarks, REGIONS, grid_size, (224, 224), mode=mode).weights > 0
        for mode in ("points", "hull", "bbox")
    ]
    for smaller, larger in pairwise(sets):
        assert not (smaller & ~larger).any()


@given(seed=st.integers(0, 1000), share=st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_every_patch_whose_centre_is_among_the_landmarks_is_in_the_hull(seed, share):
    # A point between the landmarks: move the image so that it is the centre of a patch.
    landmarks = random_points(seed, 6, low=60.0, high=160.0)
    mixed = torch.tensor(share, dtype=torch.float64) + 1e-3
    inside = (mixed / mixed.sum()) @ landmarks
    landmarks = landmarks + torch.tensor([105.0, 105.0]) - inside
    weights, _ = landmark_patches(
        landmarks, torch.arange(6).view(1, 6), (16, 16), (224, 224), mode="hull"
    )
    assert weights.view(16, 16)[7, 7] > 0


def test_a_patch_counts_once():
    # Three landmarks on one patch and one on another: one half each, not 3/4 and 1/4.
    landmarks = torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [60.0, 1.0]])
    weights, _ = landmark_patches(landmarks, torch.arange(4).view(1, 4), (1, 2), (100, 100))
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("mode", PATCH_MODES)
@given(seed=st.integers(0, 1000), copies=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_duplicate_landmarks_change_nothing(mode, seed, copies):
    landmarks = random_points(seed, 6)
    single = landmark_patches(landmarks, torch.arange(6).view(1, 6), (7, 5), (224, 224), mode=mode)
    table = torch.tensor([[*range(6), *range(6, 6 + len(copies))]])
    repeated = torch.cat((landmarks, landmarks[copies]))
    assert torch.equal(
        landmark_patches(repeated, table, (7, 5), (224, 224), mode=mode).weights, single.weights
    )


@pytest.mark.parametrize("mode", PATCH_MODES)
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_permuting_regions_permutes_rows(mode, seed, order):
    landmarks = random_points(seed, 2, 6)
    weights, valid = landmark_patches(landmarks, REGIONS, (4, 6), (224, 224), mode=mode)
    permuted = landmark_patches(landmarks, REGIONS[list(order)], (4, 6), (224, 224), mode=mode)
    assert torch.equal(permuted.weights, weights[:, list(order)])
    assert torch.equal(permuted.valid, valid[:, list(order)])


@pytest.mark.parametrize("mode", PATCH_MODES)
@given(seed=st.integers(0, 1000))
def test_mirroring_the_image_mirrors_the_patches(mode, seed):
    landmarks = random_points(seed, 6)
    mirrored = torch.tensor([224.0, 0.0]) + landmarks * torch.tensor([-1.0, 1.0])
    weights, valid = landmark_patches(landmarks, REGIONS, (5, 9), (224, 224), mode=mode)
    there = landmark_patches(mirrored, REGIONS, (5, 9), (224, 224), mode=mode)
    assert_close(there.weights, weights.view(4, 5, 9).flip(-1).flatten(1))
    assert torch.equal(there.valid, valid)


@given(seed=st.integers(0, 1000), covered=st.integers(0, 34))
def test_a_covered_patch_changes_only_the_regions_that_lie_on_it(seed, covered):
    landmarks = random_points(seed, 6, low=0.0, high=224.0)
    cells = (landmarks / torch.tensor([44.8, 32.0])).long()
    visible = cells[:, 1] * 5 + cells[:, 0] != covered
    before, _ = landmark_patches(landmarks, REGIONS, (7, 5), (224, 224))
    after, valid = landmark_patches(landmarks, REGIONS, (7, 5), (224, 224), visible=visible)
    there = before[:, covered] > 0
    assert torch.equal(after[~there], before[~there])
    for region in there.nonzero().flatten().tolist():
        rest = before[region] > 0
        rest[covered] = False
        assert bool(valid[region]) == bool(rest.any())
        if rest.any():
            assert torch.equal(after[region] > 0, rest)


@given(seed=st.integers(0, 1000), changed=st.integers(0, 34))
def test_another_token_reaches_only_the_means_of_its_regions(seed, changed):
    weights, _ = landmark_patches(random_points(seed, 6), REGIONS, (7, 5), (224, 224), mode="hull")
    tokens = torch.randn(35, 3, generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[changed] += 100.0
    before, after = region_pooling(tokens, weights), region_pooling(other, weights)
    moved = (before.local != after.local).any(-1)
    assert torch.equal(moved, weights[:, changed] > 0)
    assert (before.overall != after.overall).all()


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), sigma=st.floats(0.2, 3.0))
def test_the_blur_has_the_gradient_of_its_formula(seed, sigma):
    landmarks = random_points(seed, 2, 6, low=1.0, high=95.0).requires_grad_()
    seen = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) > 0.2

    def blur(points):
        return landmark_patches(
            points, REGIONS, (4, 5), (96, 96), visible=seen, mode="gaussian", sigma=sigma
        ).weights

    assert torch.autograd.gradcheck(blur, (landmarks,))


def test_the_gradient_of_the_blur_is_finite_and_leaves_lost_points_alone():
    landmarks = random_points(0, 3, 6, low=1.0, high=95.0)
    landmarks[0, 2] = torch.nan
    landmarks[1, 3] = torch.inf
    landmarks[2] = -5.0
    landmarks[0, 1] = landmarks[0, 0]  # two that coincide share their gradient
    landmarks.requires_grad_()
    weights = landmark_patches(landmarks, REGIONS, (4, 5), (96, 96), mode="gaussian").weights
    (gradient,) = torch.autograd.grad((weights * torch.rand_like(weights)).sum(), landmarks)
    assert torch.isfinite(gradient).all()
    lost = ~(torch.isfinite(landmarks).all(-1) & (landmarks >= 0).all(-1))
    assert not gradient[lost].any()
    assert (gradient[~lost] != 0).all()


def test_points_that_coincide_share_the_gradient_of_one():
    def gradient(table, landmarks):
        landmarks = landmarks.detach().requires_grad_()
        weights = landmark_patches(landmarks, table, (4, 5), (96, 96), mode="gaussian").weights
        slope = torch.linspace(-1, 1, 20, dtype=torch.float64)
        return torch.autograd.grad((weights * slope).sum(), landmarks)[0]

    landmarks = random_points(0, 2, low=1.0, high=95.0)
    single = gradient(torch.tensor([[0, 1]]), landmarks)
    twice = gradient(torch.tensor([[0, 1, 2]]), landmarks[[0, 1, 0]])
    assert_close(twice[:2] + torch.stack((twice[2], torch.zeros(2))), single)
    assert_close(twice[2], twice[0])


def test_the_blur_narrows_to_the_nearest_patch_and_widens_to_the_mean():
    landmarks = torch.tensor([[10.0, 9.0]])
    narrow, wide = (
        landmark_patches(
            landmarks, torch.zeros(1, 1).long(), (3, 4), (48, 64), mode="gaussian", sigma=sigma
        ).weights
        for sigma in (1e-3, 1e3)
    )
    assert narrow.dtype == torch.float32
    assert_close(narrow, torch.eye(12)[:1])
    assert_close(wide, torch.full((1, 12), 1 / 12), rtol=1e-4, atol=0)


def test_the_blur_of_a_long_clip_is_that_of_its_chunks():
    # More frames than are treated at once.
    landmarks = random_points(0, 700, 6)
    whole = landmark_patches(landmarks, REGIONS, (14, 15), (224, 224), mode="gaussian").weights
    chunks = [
        landmark_patches(chunk, REGIONS, (14, 15), (224, 224), mode="gaussian").weights
        for chunk in landmarks.split(100)
    ]
    assert torch.equal(whole, torch.cat(chunks))


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


@pytest.mark.parametrize("mode", PATCH_MODES)
@pytest.mark.parametrize("frames", [2, 0])
def test_nothing_visible_is_the_global_mean_and_not_valid(mode, frames):
    landmarks = torch.full((frames, 6, 2), torch.nan)
    weights, valid = landmark_patches(landmarks, REGIONS, (3, 4), (48, 64), mode=mode)
    assert not valid.any()
    assert_close(weights, torch.full((frames, 4, 12), 1 / 12))


@pytest.mark.parametrize("mode", PATCH_MODES)
def test_compiles_without_a_graph_break(mode):
    options = {"mode": mode, "ring": int(mode in SETS)}
    compiled = torch.compile(landmark_patches, fullgraph=True, backend="aot_eager")
    landmarks = 224 * torch.rand(2, 6, 2)
    there = compiled(landmarks, REGIONS, (4, 4), (224, 224), **options)
    here = landmark_patches(landmarks, REGIONS, (4, 4), (224, 224), **options)
    assert torch.equal(there.weights, here.weights)


def test_values_and_gradient_do_not_change_under_autocast():
    landmarks = random_points(0, 3, 6).float().requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weights = landmark_patches(
                landmarks, REGIONS, (4, 4), (224, 224), mode="gaussian"
            ).weights
            results.append((weights, *torch.autograd.grad(weights.square().sum(), landmarks)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


PIXELS = torch.full((6, 2), 50.0)


@pytest.mark.parametrize(
    ("landmarks", "options", "error", "sentence"),
    [
        (PIXELS / 100, {}, ValueError, "below 2, .* cannot be pixels; the largest is 0.5. Pass co"),
        (
            PIXELS,
            {"coords": "normalized"},
            ValueError,
            "above 2, .* the smallest is 50. Pass coords='pixel'",
        ),
        (PIXELS.bfloat16(), {}, TypeError, "must be float32 or float64, .* got torch.bfloat16"),
        (PIXELS[:, :1], {}, ValueError, r"`landmarks` must have shape \(\.\.\., k, 2\)"),
        (PIXELS[:4], {}, ValueError, "names landmark 5, but there are 4 landmarks"),
        (
            PIXELS,
            {"mode": "hul"},
            ValueError,
            "must be one of 'points', 'bbox', 'hull', 'gaussian'; got",
        ),
        (PIXELS, {"coords": "unit"}, ValueError, "`coords` must be one of"),
        (PIXELS, {"ring": -1}, ValueError, "`ring` must be in .0, inf.; got -1"),
        (PIXELS, {"mode": "gaussian", "ring": 1}, ValueError, "`ring` adds patches .* by `sigma`"),
        (PIXELS, {"mode": "gaussian", "sigma": 0.0}, ValueError, "`sigma` must be in .0, inf."),
        (PIXELS, {"grid_size": (0, 4)}, ValueError, r"`grid_size` must be two .* got \(0, 4\)"),
        (PIXELS, {"grid_size": 16}, ValueError, "`grid_size` must be two positive .* got 16"),
        (PIXELS, {"grid_size": (4.0, 4)}, ValueError, "two positive whole numbers"),
        (PIXELS, {"image_size": (224, 0)}, ValueError, "`image_size` must be two positive whole"),
        (PIXELS, {"regions": REGIONS.float()}, TypeError, "int32 or int64 .* got torch.float32"),
        (PIXELS, {"regions": REGIONS[:, :0]}, ValueError, r"at least one .* got \(4, 0\)"),
        (PIXELS, {"regions": REGIONS - 1}, ValueError, "`regions` must be padded with -1; got -2"),
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
    options = {"regions": REGIONS, "grid_size": (4, 4), "image_size": (224, 224), **options}
    with pytest.raises(error, match=sentence):
        landmark_patches(landmarks, **options)


def test_a_missing_face_is_not_a_wrong_unit():
    landmarks = torch.zeros(6, 2)
    nobody = torch.zeros(6, dtype=torch.bool)
    assert not landmark_patches(landmarks, REGIONS, (2, 2), (9, 9), visible=nobody).valid.any()
