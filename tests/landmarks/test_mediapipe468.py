"""The mesh tables, against facts about the mesh that were not used to write them."""

import numpy as np
import pytest
import torch

from mmau.landmarks import IBUG68, MEDIAPIPE468, to_ibug68
from mmau.landmarks.mediapipe468 import IBUG68_VERTICES


def test_mirror_table_maps_well_known_vertices():
    mirror = MEDIAPIPE468.mirror
    known = {33: 263, 133: 362, 61: 291, 70: 300, 107: 336, 234: 454, 98: 327, 50: 280}
    assert {vertex: mirror[vertex] for vertex in known} == known
    assert sum(mirror[vertex] == vertex for vertex in range(468)) == 28


def test_mirror_table_maps_the_mesh_onto_itself():
    connections = pytest.importorskip("mediapipe.python.solutions.face_mesh_connections")
    for group in ("LIPS", "NOSE", "FACE_OVAL"):
        edges = {frozenset(edge) for edge in getattr(connections, f"FACEMESH_{group}", ())}
        mirrored = {frozenset(MEDIAPIPE468.mirror[vertex] for vertex in edge) for edge in edges}
        assert mirrored == edges
    for part in ("EYE", "EYEBROW"):
        right, left = (
            {frozenset(e) for e in getattr(connections, f"FACEMESH_{side}_{part}")}
            for side in ("RIGHT", "LEFT")
        )
        assert {frozenset(MEDIAPIPE468.mirror[v] for v in edge) for edge in right} == left


def test_reduction_commutes_with_flipping():
    mesh = torch.rand(4, 468, 2, dtype=torch.float64)
    there = to_ibug68(MEDIAPIPE468.flip(mesh, 1.0))
    torch.testing.assert_close(there, IBUG68.flip(to_ibug68(mesh), 1.0))


@pytest.mark.parametrize("count", [468, 478])
def test_tensor_and_array_agree(count):
    mesh = np.random.default_rng(0).random((2, count, 3))
    np.testing.assert_array_equal(to_ibug68(torch.from_numpy(mesh)).numpy(), to_ibug68(mesh))
    assert isinstance(to_ibug68(mesh), np.ndarray)


def test_points_are_the_mean_of_their_vertices():
    mesh = np.random.default_rng(0).random((468, 2))
    expected = [mesh[list(vertices)].mean(axis=0) for vertices in IBUG68_VERTICES]
    np.testing.assert_allclose(to_ibug68(mesh), expected, rtol=1e-12)
    assert all(1 <= len(vertices) <= 2 for vertices in IBUG68_VERTICES)


def test_a_nan_vertex_spoils_only_its_own_points():
    mesh = torch.zeros(468, 2)
    mesh[152] = torch.nan
    assert torch.isnan(to_ibug68(mesh)).any(-1).nonzero().flatten().tolist() == [8]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., 468, c\) or .* got \(68, 2\)"):
        to_ibug68(torch.zeros(68, 2))


def test_well_known_points_are_on_their_vertices():
    # Corners of eyes and mouth, chin, middle of the lips: the vertices that every guide names.
    known = {36: 33, 39: 133, 42: 362, 45: 263, 48: 61, 54: 291, 8: 152, 62: 13, 66: 14, 33: 2}
    assert {point: IBUG68_VERTICES[point] for point in known} == {
        point: (vertex,) for point, vertex in known.items()
    }


def test_points_of_eyes_brows_and_lips_lie_on_the_contours_of_the_mesh():
    connections = pytest.importorskip("mediapipe.python.solutions.face_mesh_connections")
    for name, points in {
        "RIGHT_EYEBROW": range(17, 22),
        "LEFT_EYEBROW": range(22, 27),
        "RIGHT_EYE": range(36, 42),
        "LEFT_EYE": range(42, 48),
        "LIPS": range(48, 68),
    }.items():
        contour = {v for edge in getattr(connections, f"FACEMESH_{name}") for v in edge}
        for point in points:
            assert set(IBUG68_VERTICES[point]) <= contour, point
