"""Landmark schemes: the tables are consistent, and user tables are refused."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from mmau.action_units import AU_NAMES
from mmau.landmarks import (
    ACTION_UNIT_REGIONS,
    IBUG68,
    LANDMARK_SCHEMES,
    MEDIAPIPE468,
    LandmarkScheme,
)
from mmau.registry import UnknownComponentError

SCHEMES = [LANDMARK_SCHEMES.get(name) for name in LANDMARK_SCHEMES]
TWO = {"right": (0,), "left": (1,)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
class TestEveryScheme:
    def test_flipping_twice_changes_nothing(self, scheme):
        points = 200 * torch.rand(3, scheme.num_points, 2, dtype=torch.float64)
        assert_close(scheme.flip(scheme.flip(points, 200), 200), points)

    def test_derived_points_flip_with_the_face(self, scheme):
        points = torch.rand(scheme.num_points, 2, dtype=torch.float64)
        matrix = scheme.derived_matrix().double()
        there = matrix @ scheme.flip(points, 1.0)
        here = matrix @ points
        mirrored = torch.stack((1 - here[:, 0], here[:, 1]), -1)
        # Each mirrored derived point is found again among those of the mirrored face.
        assert len(matrix) == 0 or (torch.cdist(there, mirrored).min(1).values < 1e-6).all()

    def test_derived_points_move_turn_and_scale_with_the_face(self, scheme):
        points, matrix = torch.rand(scheme.num_points, 2), scheme.derived_matrix()
        turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]]) * 3
        assert_close(
            matrix @ (points @ turn + 7), (matrix @ points) @ turn + 7, rtol=1e-4, atol=1e-4
        )

    def test_every_region_is_in_the_table_once(self, scheme):
        table = scheme.region_table()
        assert table.shape[0] == scheme.num_regions == 13
        for row, points in zip(table.tolist(), scheme.regions.values(), strict=True):
            assert tuple(index for index in row if index >= 0) == points

    def test_regions_left_and_right_are_apart_and_mirror_each_other(self, scheme):
        names, image = scheme.region_names, scheme.region_permutation
        for index, name in enumerate(names):
            other = names[image[index]]
            assert (other == name) == (not name.startswith(("left", "right")))
            if other != name:
                assert not set(scheme.regions[name]) & set(scheme.regions[other])

    def test_every_action_unit_has_mirror_symmetric_regions(self, scheme):
        assert tuple(ACTION_UNIT_REGIONS) == AU_NAMES
        for regions in ACTION_UNIT_REGIONS.values():
            assert set(regions) <= set(scheme.regions)
            assert {scheme.region_mirror.get(name, name) for name in regions} == set(regions)

    def test_a_subset_has_the_regions_in_the_order_asked_for(self, scheme):
        part = scheme.subset(["left_eye", "chin", "right_eye"])
        assert part.region_names == ("left_eye", "chin", "right_eye")
        assert part.region_permutation == (2, 1, 0)
        assert part.regions["chin"] == scheme.regions["chin"]
        assert scheme.subset(["left_eye"]).mirror is None
        assert scheme.subset(scheme.region_names) == scheme

    def test_survives_pickling_and_copying(self, scheme):
        assert pickle.loads(pickle.dumps(scheme)) == scheme == copy.deepcopy(scheme)


def test_both_schemes_share_names_and_order():
    assert IBUG68.region_names == MEDIAPIPE468.region_names
    assert set(LANDMARK_SCHEMES) >= {"ibug68", "mediapipe468"}


def test_unknown_scheme_names_the_nearest():
    with pytest.raises(UnknownComponentError, match="did you mean 'ibug68'"):
        LANDMARK_SCHEMES.get("ibug86")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"num_points": 0}, ValueError, "`num_points` must be at least 1; got 0"),
        ({"regions": {}}, ValueError, "must map at least one region name"),
        ({"regions": [1, 2]}, ValueError, "must map at least one region name"),
        ({"regions": {"nose": 3}}, TypeError, "region 'nose' must be a sequence .* got 3"),
        ({"regions": {"nose": "12"}}, TypeError, "region 'nose' must be a sequence"),
        ({"regions": {"nose": (0.5,)}}, TypeError, "region 'nose' must hold integers; got 0.5"),
        ({"regions": {"nose": (True,)}}, TypeError, "must hold integers; got True"),
        (
            {"regions": {"nose": (5,)}},
            ValueError,
            "'nose' names point 5, but points run from 0 to 1",
        ),
        ({"regions": {"nose": (-1,)}}, ValueError, "'nose' names point -1"),
        ({"regions": {"nose": ()}}, ValueError, "region 'nose' is empty"),
        ({"regions": {"nose": (1, 1)}}, ValueError, "region 'nose' names point 1 twice"),
        ({"derived": {"cheek": {0: 0.5}}}, ValueError, "'cheek' must sum to 1; got 0.5"),
        ({"derived": {"cheek": {7: 1.0}}}, ValueError, "'cheek' names point 7"),
        ({"region_mirror": {"right": "left"}}, ValueError, "`region_mirror` needs `mirror`"),
        ({"mirror": (0, 0)}, ValueError, "`mirror` must be a permutation of 0 to 1"),
        ({"mirror": (1, 0)}, ValueError, "'right' mirrors onto points .1., but region 'right'"),
        (
            {"mirror": (1, 0), "region_mirror": {"right": "lef"}},
            ValueError,
            "`region_mirror` names no region of 'mine': 'lef'; did you mean 'left'",
        ),
        (
            {"num_points": 3, "mirror": (1, 2, 0)},
            ValueError,
            "`mirror` must undo itself, but point 0 goes to 1 and 1 goes to 2",
        ),
        (
            {
                "mirror": (1, 0),
                "region_mirror": {"right": "left", "left": "right"},
                "derived": {"cheek": {0: 1.0}},
            },
            ValueError,
            "derived point 'cheek' has no mirror image",
        ),
    ],
)
def test_wrong_tables_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        LandmarkScheme(**{"name": "mine", "num_points": 2, "regions": TWO, **options})


def test_flip_refuses_the_wrong_number_of_points():
    with pytest.raises(ValueError, match="axis `k` of `landmarks` must be 68"):
        IBUG68.flip(torch.zeros(67, 2), 224)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="`names` names no region of 'ibug68': 'left_ey'; did you"):
        IBUG68.subset(["left_ey"])
    with pytest.raises(ValueError, match="`names` has region 'chin' twice"):
        IBUG68.subset(["chin", "nose", "chin"])
    with pytest.raises(ValueError, match="must map at least one region name"):
        IBUG68.subset([])
