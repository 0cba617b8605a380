"""The faces: the template, the movements, and what they do to the pixels."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmau.action_units import AU_NAMES
from mmau.synthetic import SyntheticConfig, load_photograph, render_clip, render_face
from mmau.synthetic.photographs import PHOTOGRAPHS, find_mesh
from mmau.synthetic.warp import (
    BUMPS,
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    FaceWarp,
    Placement,
    au_displacements,
    build_template,
    identity_displacement,
    load_faces,
)

# Where an AU may move pixels: vertices, and how far around them in outer-eye distances.
BROWS = ((336, 334, 300, 107, 105, 70, 9), 0.33)
EYES = ((263, 362, 386, 374, 280, 33, 133, 159, 145, 50), 0.25)
MOUTH = ((61, 291, 13, 14, 17, 425, 205, 2), 0.33)
JAW = ((61, 291, 14, 17, 152, 148, 377), 0.4)
REGION = {
    **dict.fromkeys(("AU1", "AU2", "AU4"), BROWS),
    **dict.fromkeys(("AU6", "AU7"), EYES),
    **dict.fromkeys(("AU10", "AU12", "AU15", "AU23", "AU24", "AU25"), MOUTH),
    "AU26": JAW,
}


@pytest.fixture(scope="module")
def faces():
    return load_faces()


@pytest.fixture(scope="module")
def template(faces):
    return faces[0].template


@pytest.fixture(scope="module", params=list(PHOTOGRAPHS))
def stills(request, faces):
    """Neutral, every AU at 0.5, every AU at 1."""
    values = np.concatenate([np.zeros((1, 12)), 0.5 * np.eye(12), np.eye(12)])
    return render_face(values, photograph=request.param, faces=faces)


def within(mesh, region, size):
    vertices, reach = region
    y, x = np.mgrid[:size, :size] + 0.5
    radius = reach * np.linalg.norm(mesh[263] - mesh[33])
    points = mesh[list(vertices)]
    away = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    return away.min(-1) < radius


def change(images, index):
    return np.abs(images[index].astype(float) - images[0]).sum(-1)


def test_the_template_is_symmetric_shut_and_in_its_units(template):
    points, mirror = template.vertices, template.mirror
    np.testing.assert_array_equal(mirror[mirror], np.arange(468))
    assert mirror[33] == 263
    assert mirror[61] == 291
    assert mirror[1] == 1
    np.testing.assert_allclose(points[mirror], points * (-1, 1), atol=1e-9)
    assert points[263, 0] - points[33, 0] == pytest.approx(8.9, abs=1e-6)
    np.testing.assert_allclose(points[list(INNER_UPPER_LIP)], points[list(INNER_LOWER_LIP)])
    assert points[10, 1] > points[168, 1] > points[1, 1] > points[13, 1] > points[152, 1]


def test_the_mouth_line_divides_the_lips(template):
    assert template.upper[0]
    assert not template.lower[0]
    assert template.lower[17]
    assert not template.upper[17]
    assert template.upper[61]
    assert template.lower[61]
    assert (template.upper | template.lower).all()


def test_closing_shuts_the_smile_and_leaves_the_eyes_alone(faces):
    for face in faces:
        shut = Placement.of(face.mesh).to_template(face.mesh) + face.closing
        gap = shut[13, 1] - shut[14, 1]
        assert abs(gap) < (1e-6 if face.name == "astronaut" else 0.25)
        assert not face.closing[[33, 133, 159, 263, 105, 10]].any()


def test_placement_goes_there_and_back():
    mesh = np.random.default_rng(0).uniform(0, 100, (468, 2))
    placed = Placement.of(mesh)
    back = placed.to_template(mesh) @ placed.matrix.T + placed.offset
    np.testing.assert_allclose(back, mesh, atol=1e-9)
    assert placed.unit == pytest.approx(np.linalg.norm(mesh[263] - mesh[33]) / 8.9)


def test_movements_are_symmetric_and_go_the_way_of_their_names(template):
    moves = dict(zip(AU_NAMES, au_displacements(template), strict=True))
    assert set(BUMPS) == set(AU_NAMES)
    for move in moves.values():
        np.testing.assert_allclose(move[template.mirror], move * (-1, 1), atol=1e-6)
    assert moves["AU1"][336, 1] > 0.6
    assert moves["AU2"][300, 1] > 0.6
    assert moves["AU4"][336, 1] < -0.5
    assert moves["AU7"][386, 1] < 0 < moves["AU7"][374, 1]
    assert moves["AU12"][291, 1] > 0.5
    assert moves["AU12"][291, 0] > 0.3
    assert moves["AU15"][291, 1] < -0.5
    assert moves["AU23"][291, 0] < -0.3
    assert moves["AU24"][17, 1] > 0 > moves["AU24"][0, 1]
    assert moves["AU26"][152, 1] < -1


@pytest.mark.parametrize(
    ("name", "parts"), [("AU25", True), ("AU26", True), ("AU12", False), ("AU10", False)]
)
def test_lips_part_where_the_label_says_so(template, name, parts):
    move = au_displacements(template)[AU_NAMES.index(name)]
    gap = move[13, 1] - move[14, 1]
    assert gap > 0.4 if parts else abs(gap) < 0.3


def test_identities_are_smooth_symmetric_and_differ(template):
    one, two = (identity_displacement(template, np.random.default_rng(s)) for s in (0, 1))
    np.testing.assert_allclose(one[template.mirror], one * (-1, 1), atol=1e-9)
    assert np.abs(one - two).max() > 0.1
    assert np.abs(one).max() < 3


@pytest.mark.parametrize("name", AU_NAMES)
def test_an_action_unit_changes_its_own_region_most(stills, name):
    images, mesh = stills
    full = change(images, 13 + AU_NAMES.index(name))
    shares = {
        id(region): full[within(mesh[0], region, len(full))].sum() / full.sum()
        for region in (BROWS, EYES, MOUTH, JAW)
    }
    own = shares[id(REGION[name])]
    assert own > 0.6
    rivals = {id(BROWS), id(EYES), id(MOUTH), id(JAW)} - {id(REGION[name])}
    if REGION[name] in (MOUTH, JAW):  # they overlap by design
        rivals -= {id(MOUTH), id(JAW)}
    assert own > max(shares[rival] for rival in rivals)


@pytest.mark.parametrize("name", AU_NAMES)
def test_twice_the_intensity_changes_more(stills, name):
    images, _ = stills
    half = change(images, 1 + AU_NAMES.index(name)).sum()
    full = change(images, 13 + AU_NAMES.index(name)).sum()
    assert 0 < half < full


def test_intensity_zero_is_the_neutral_face_whatever_else_is_in_the_batch(faces):
    mixed = np.zeros((40, 12))
    mixed[::2] = np.random.default_rng(0).uniform(0, 1, (20, 12))
    alone, _ = render_face(np.zeros((1, 12)), size=96, faces=faces)
    batch, _ = render_face(mixed, size=96, faces=faces)
    difference = np.abs(batch[1::2].astype(int) - alone.astype(int))
    assert difference.max() <= 1  # another batch may take another path of the matrix product


def test_the_mesh_is_where_the_image_shows_it(faces):
    """MediaPipe finds the rendered face within a few per cent of the eye distance of our mesh."""
    smile = np.zeros((1, 12))
    smile[0, [AU_NAMES.index(n) for n in ("AU12", "AU25", "AU26")]] = 0.7
    for name in PHOTOGRAPHS:
        images, mesh = render_face(smile, photograph=name, size=256, faces=faces)
        found = find_mesh(images[0])
        stable = [33, 133, 362, 263, 168, 1, 13, 14, 61, 291, 152]
        error = np.linalg.norm(found[stable] - mesh[0, stable], axis=1)
        assert np.median(error) < 0.06 * np.linalg.norm(mesh[0, 263] - mesh[0, 33])


@pytest.mark.parametrize(
    ("name", "vertex"),
    [("AU1", 336), ("AU2", 334), ("AU4", 336), ("AU6", 280), ("AU12", 425), ("AU26", 152)],
)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_image_moves_as_far_as_the_mesh(faces, name, vertex, strength):
    """A dot painted on a vertex of the photograph is rendered at the place of that vertex."""
    face = faces[0]
    height, width = face.image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    away = np.hypot(x - face.mesh[vertex, 0], y - face.mesh[vertex, 1])
    dot = (255 * np.exp(-((away / 5) ** 2))).astype(np.uint8)
    painted = replace(face, image=np.repeat(dot[..., None], 3, 2))
    values = np.zeros((2, 12))
    values[1, AU_NAMES.index(name)] = strength
    images, mesh = render_face(values, photograph=face.name, size=192, faces=[painted])
    y, x = np.mgrid[:192, :192] + 0.5
    for image, points in zip(images[..., 0].astype(float), mesh, strict=True):
        # The painted inside of the mouth is bright as well: look around the vertex only.
        image = image * (np.hypot(x - points[vertex, 0], y - points[vertex, 1]) < 11)
        centre = np.array([(x * image).sum(), (y * image).sum()]) / image.sum()
        assert np.linalg.norm(centre - points[vertex]) < 1.5
    assert np.linalg.norm(mesh[1, vertex] - mesh[0, vertex]) > 1.2


def test_a_mirrored_view_mirrors_pixels_and_swaps_the_mesh(faces):
    warp = FaceWarp(faces[0], 96)
    values = torch.zeros(1, 12)
    view = torch.zeros(1, 2, 3)
    view[:, 0, 0] = view[:, 1, 1] = 96 / warp.canvas_size
    flipped = view.clone()
    flipped[:, 0, 0] *= -1
    plain, mirrored = warp.render(values, view), warp.render(values, flipped)
    assert (plain.int() - mirrored.flip(2).int()).abs().max() <= 1
    expected = warp.vertices(values, view)[:, torch.from_numpy(warp.template.mirror)]
    expected = torch.stack([96 - expected[..., 0], expected[..., 1]], -1)
    torch.testing.assert_close(warp.vertices(values, flipped), expected)


def test_a_clip_is_the_same_again_and_other_seeds_differ(faces):
    config = SyntheticConfig(num_frames=24, size=64)
    one, again, other = (render_clip(s, config, faces=faces) for s in (5, 5, 6))
    for field in ("frames", "labels", "hidden", "waveform", "intensities", "mesh"):
        np.testing.assert_array_equal(getattr(one, field), getattr(again, field))
    assert (one.frames != other.frames).any()


def test_a_clip_hides_the_face_exactly_where_it_says(faces):
    config = SyntheticConfig(
        num_frames=40, hidden=(0.3, 0.5), visible=(0.3, 0.5), exposure=0, motion=0
    )
    clip = render_clip(1, config, faces=faces)
    assert 0 < clip.hidden.sum() < 40
    assert np.isnan(clip.mesh).all((1, 2)).tolist() == clip.hidden.tolist()
    found = [find_mesh(frame) is not None for frame in clip.frames[::3]]
    assert found == (~clip.hidden[::3]).tolist()
    assert len(clip.waveform) == round(40 / 15 * 44_100)


def test_a_wholly_hidden_clip_renders(faces):
    config = SyntheticConfig(num_frames=8, size=64, hidden=(60, 60), visible=(0.01, 0.01))
    clip = render_clip(0, config, faces=faces)
    assert clip.hidden.all()


def test_photographs_are_read_only_and_credited():
    for name, info in PHOTOGRAPHS.items():
        image = load_photograph(name)
        assert image.dtype == np.uint8
        assert not image.flags.writeable
        assert "Public domain" in info.licence
        assert info.credit


def test_no_face_gives_no_mesh():
    assert find_mesh(np.full((96, 96, 3), 120, dtype=np.uint8)) is None


def test_bad_input_is_refused(faces):
    with pytest.raises(ValueError, match="`name` must be one of 'grace_hopper', 'astronaut'"):
        load_photograph("lena")
    with pytest.raises(ValueError, match=re.escape("even number of pixels, at least 32; got 97.")):
        FaceWarp(faces[0], 97)
    with pytest.raises(ValueError, match="`face_height` must be in"):
        FaceWarp(faces[0], 96, face_height=0)
    with pytest.raises(ValueError, match=re.escape("`intensities` must have shape (t, 12)")):
        render_face(np.zeros((3, 8)), faces=faces)
    with pytest.raises(ValueError, match="`photograph` must be one of"):
        render_face(np.zeros((1, 12)), photograph="lena")
    skewed = np.random.default_rng(0).uniform(0, 100, (468, 2))
    with pytest.raises(RuntimeError, match="too skewed to make"):
        build_template([skewed], mouth_closed=[True])
