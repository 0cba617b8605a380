"""The mapper with real schemes: derived points, flips, precision, user tables."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.landmark_patches import PATCH_MODES
from mmau.landmarks import IBUG68, LANDMARK_SCHEMES
from mmau.modules.landmark_to_patch import LandmarkToPatch
from mmau.registry import UnknownComponentError

NAMES = list(LANDMARK_SCHEMES)


def points_inside(mapper, *leading, seed=0, size=(224, 224)):
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    unit = torch.rand(*leading, mapper.scheme.num_points, 2, generator=generator)
    return unit * torch.tensor([width, height])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", PATCH_MODES)
def test_shapes_and_rows(name, mode):
    mapper = LandmarkToPatch(name, mode=mode)
    landmarks = points_inside(mapper, 2, 3, size=(96, 128))
    weights, valid = mapper(landmarks, grid_size=(6, 8), image_size=(96, 128))
    assert weights.shape == (2, 3, mapper.num_regions, 48)
    assert valid.shape == (2, 3, mapper.num_regions)
    assert weights.dtype == torch.float32
    assert valid.all()
    assert len(mapper.region_names) == mapper.num_regions
    assert_close(weights.sum(-1), torch.ones(2, 3, mapper.num_regions))
    assert not mapper.state_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", PATCH_MODES)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_flipping_the_image_flips_patches_and_swaps_left_and_right(name, mode, seed):
    mapper = LandmarkToPatch(name, mode=mode, ring=int(mode != "gaussian"))
    landmarks = points_inside(mapper, seed=seed, size=(160, 224))
    there = mapper(mapper.scheme.flip(landmarks, 224), (10, 14), (160, 224))
    here = mapper(landmarks, (10, 14), (160, 224))
    order = list(mapper.scheme.region_permutation)
    flipped = here.weights[order].view(-1, 10, 14).flip(-1).flatten(1)
    # Mirrored coordinates are rounded, which only the blur can feel.
    assert_close(there.weights, flipped, rtol=1e-4, atol=1e-5)
    assert torch.equal(there.valid, here.valid[order])


def test_cheeks_are_derived_and_follow_the_face():
    mapper = LandmarkToPatch("ibug68")
    landmarks = points_inside(mapper) / 4
    cheek = mapper.region_names.index("right_cheek")
    here = mapper(landmarks, (16, 16), (224, 224)).weights[cheek].view(16, 16)
    moved = mapper(landmarks + 28, (16, 16), (224, 224)).weights[cheek].view(16, 16)
    # 28 pixels are two patches.
    assert_close(here.roll((2, 2), (0, 1)), moved)


@pytest.mark.parametrize("lost", ["nan", "invisible"])
def test_a_derived_point_needs_all_the_points_it_is_made_of(lost):
    mapper = LandmarkToPatch("ibug68")
    landmarks, visible = points_inside(mapper, seed=1), torch.ones(68, dtype=torch.bool)
    needed = {
        point for name in IBUG68.derived if "right_cheek" in name for point in IBUG68.derived[name]
    }
    before = mapper(landmarks, (4, 4), (224, 224)).weights
    if lost == "nan":
        landmarks[list(needed)] = torch.nan
    else:
        visible[list(needed)] = False
    weights, valid = mapper(landmarks, (4, 4), (224, 224), visible=visible)
    cheek = mapper.region_names.index("right_cheek")
    assert not valid[cheek]
    assert_close(weights[cheek], torch.full((16,), 1 / 16))
    other = mapper.region_names.index("left_cheek")
    assert torch.equal(weights[other], before[other])
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("lost", ["nan", "invisible"])
def test_a_lost_point_changes_only_regions_that_use_it(lost):
    mapper = LandmarkToPatch("ibug68")
    own, derived = 68, list(IBUG68.derived.values())
    uses = torch.tensor(
        [
            [
                any(p == q if q < own else p in derived[q - own] for q in indices)
                for indices in IBUG68.regions.values()
            ]
            for p in range(own)
        ]
    )
    # Frame i has lost point i.
    landmarks, visible = points_inside(mapper).repeat(own, 1, 1), torch.ones(own, own) > 0
    before = mapper(landmarks, (64, 64), (224, 224)).weights
    if lost == "nan":
        landmarks[range(own), range(own)] = torch.nan
    else:
        visible[range(own), range(own)] = False
    after = mapper(landmarks, (64, 64), (224, 224), visible=visible).weights
    changed = (before != after).any(-1)
    assert not (changed & ~uses).any()
    # On a fine grid, points seldom share a patch.
    assert changed[uses].float().mean() > 0.95


def test_precision_survives_autocast_and_half_modules():
    mapper = LandmarkToPatch("ibug68")
    landmarks = points_inside(mapper, 64)
    exact = mapper(landmarks, (16, 16), (224, 224))
    low = copy.deepcopy(mapper).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mapper(landmarks, (16, 16), (224, 224)).weights, exact.weights)
        assert torch.equal(low(landmarks, (16, 16), (224, 224)).weights, exact.weights)


def test_the_blur_moves_landmarks_through_derived_points():
    mapper = LandmarkToPatch("ibug68", mode="gaussian", sigma=0.7)
    assert "sigma=0.7" in repr(mapper)
    landmarks = points_inside(mapper, 2).requires_grad_()
    weights, _ = mapper(landmarks, (16, 16), (224, 224))
    cheek = mapper.region_names.index("right_cheek")
    (gradient,) = torch.autograd.grad(weights[:, cheek].square().sum(), landmarks)
    needed = {
        point for name in IBUG68.derived if "right_cheek" in name for point in IBUG68.derived[name]
    }
    assert set((gradient != 0).any(-1).any(0).nonzero().flatten().tolist()) == needed


def test_user_tables_take_any_number_of_points():
    mapper = LandmarkToPatch({"nose": (0, 1), "chin": (4,)})
    assert mapper.region_names == ("nose", "chin")
    assert mapper(torch.full((7, 2), 9.0), (2, 2), (18, 18)).weights.shape == (2, 4)


def test_schemes_are_accepted_and_pickled():
    mapper = pickle.loads(pickle.dumps(LandmarkToPatch(IBUG68, ring=1)))
    assert mapper.scheme == IBUG68
    assert "ibug68" in repr(mapper)
    assert "ring=1" in repr(mapper)


def test_compiles_without_a_graph_break():
    mapper = LandmarkToPatch("ibug68")
    landmarks = points_inside(mapper, 2)
    landmarks[0, :30] = torch.nan
    compiled = torch.compile(mapper, fullgraph=True, backend="aot_eager")
    there = compiled(landmarks, (16, 16), (224, 224))
    assert torch.equal(there.weights, mapper(landmarks, (16, 16), (224, 224)).weights)


@pytest.mark.parametrize(
    ("regions", "error", "sentence"),
    [
        ("ibug", UnknownComponentError, "did you mean 'ibug68'"),
        (68, TypeError, "`regions` must be the name of a landmark scheme, .* got int"),
        ({}, ValueError, "at least one region name"),
        ({"nose": ()}, ValueError, "region 'nose' is empty"),
        ({"nose": (1.5,)}, TypeError, "'nose' must hold integers; got 1.5"),
        ({"nose": (-2,)}, ValueError, "'nose' names point -2"),
    ],
)
def test_wrong_tables_are_refused(regions, error, sentence):
    with pytest.raises(error, match=sentence):
        LandmarkToPatch(regions)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "point"}, "`mode` must be one of"),
        ({"coords": "px"}, "`coords` must be one of 'pixel', 'normalized'; got 'px'"),
        ({"ring": -1}, "`ring` must be in"),
        ({"sigma": 0.0}, "`sigma` must be in"),
        ({"mode": "gaussian", "ring": 2}, "`ring` adds patches to a set, .* got 2"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LandmarkToPatch(**options)


@pytest.mark.parametrize(
    ("regions", "shape", "sentence"),
    [
        ("ibug68", (2, 67, 2), "must have 68 points for the regions of 'ibug68'; got 67"),
        ("mediapipe468", (478, 2), r"got 478; the irises come last: landmarks\[\.\.\., :468, :\]"),
        ({"nose": (0, 9)}, (9, 2), "must have 10 points for the regions of 'custom'; got 9"),
        ("ibug68", (68, 3), r"must have shape \(\.\.\., k, 2\)"),
    ],
)
def test_wrong_landmarks_are_refused(regions, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        LandmarkToPatch(regions)(torch.full(shape, 50.0), (4, 4), (224, 224))


def test_wrong_unit_and_masks_are_refused():
    mapper, landmarks = LandmarkToPatch("ibug68"), torch.rand(2, 68, 2)
    with pytest.raises(ValueError, match=r"which cannot be pixels; .* Pass coords='normalized'"):
        mapper(landmarks, (4, 4), (224, 224))
    with pytest.raises(TypeError, match="`visible` must be a bool tensor"):
        mapper(landmarks * 224, (4, 4), (224, 224), visible=torch.ones(2, 68))
    with pytest.raises(ValueError, match=r"`visible` must have shape \(2, 68\)"):
        mapper(landmarks * 224, (4, 4), (224, 224), visible=torch.ones(2) > 0)
    with pytest.raises(TypeError, match="must be float32 or float64"):
        mapper((landmarks * 224).half(), (4, 4), (224, 224))
