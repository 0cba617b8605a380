"""Overlays: data coordinates are pixels, and what is drawn is what was given."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmau.landmarks import IBUG68
from mmau.registry import MissingDependencyError

plt = pytest.importorskip("matplotlib.pyplot")
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.colors import rgb_to_hsv  # noqa: E402

from mmau.plot import draw_attention, draw_landmarks, draw_regions  # noqa: E402

IMAGE = np.zeros((40, 60, 3), np.uint8)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    "image", [IMAGE, torch.rand(3, 40, 60), 255 * torch.rand(40, 60, 3), IMAGE.transpose(2, 0, 1)]
)
def test_images_in_any_layout_span_their_pixels(image):
    ax = draw_landmarks(image, [[3.0, 4.0]])
    assert ax.get_xlim() == (0, 60)
    assert ax.get_ylim() == (40, 0)
    shown = ax.images[0].get_array()
    assert shown.shape == (40, 60, 3)
    assert 0 <= shown.min() <= shown.max() <= 1


def test_landmarks_are_drawn_where_they_are():
    points = torch.tensor([[3.0, 4.0], [torch.nan, 5.0], [50.0, 30.0]])
    ax = draw_landmarks(IMAGE, points, numbers=True)
    assert [text.get_text() for text in ax.texts] == ["0", "2"]
    np.testing.assert_allclose(ax.collections[0].get_offsets()[0], (3, 4))


def test_a_scheme_adds_its_derived_points():
    ax = draw_landmarks(IMAGE, 40 * torch.rand(68, 2), scheme=IBUG68)
    drawn = sum(len(collection.get_offsets()) for collection in ax.collections)
    assert drawn == 68 + sum(len(points) for points in IBUG68.regions.values())


def boxes(ax):
    return sorted(patch.get_bbox().bounds for patch in ax.patches)


def outline(ax, place):
    """The segments of an outline, in any order and direction."""
    lines = [c for c in ax.collections if isinstance(c, LineCollection)][-2:]
    return {frozenset(map(tuple, line.tolist())) for line in lines[place].get_segments()}


def test_regions_cover_their_patches():
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0]])
    ax = draw_regions(IMAGE, weights, (2, 3), ("brow", "eye"))
    assert boxes(ax) == [(0, 0, 20, 20), (20, 0, 10, 20), (30, 0, 10, 20)]
    corners = [(0, 0), (20, 0), (40, 0), (40, 20), (20, 20), (0, 20), (0, 0)]
    assert outline(ax, 0) == {frozenset(edge) for edge in pairwise(corners)}
    corners = [(20, 0), (40, 0), (40, 20), (20, 20), (20, 0)]
    assert outline(ax, 1) == {frozenset(edge) for edge in pairwise(corners)}
    shown = ax.images[0].get_array()
    np.testing.assert_array_equal(shown[..., 0], shown[..., 2])


def test_weak_patches_fade_and_regions_without_landmarks_are_named_only():
    weights = torch.tensor([[0.6, 0.35, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]])
    ax = draw_regions(IMAGE, weights, (2, 2), ("left_eye", "nose"))
    assert boxes(ax) == [(0, 0, 30, 20), (30, 0, 30, 20)]
    first, second = sorted(ax.patches, key=lambda patch: patch.get_x())
    np.testing.assert_allclose(second.get_alpha() / first.get_alpha(), 0.35 / 0.6, rtol=1e-6)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["left eye", "nose (not visible)"]


def test_names_stand_where_they_are_asked_for():
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    inside = draw_regions(IMAGE, weights, (2, 2), ("left_brow", "chin"), labels="inside")
    assert [(t.get_text(), t.get_position()) for t in inside.texts] == [
        ("left\nbrow", (15, 10)),
        ("chin", (30, 30)),
    ]
    assert inside.get_legend() is None
    without = draw_regions(IMAGE, weights, (2, 2), ("left_brow", "chin"), labels="none")
    assert not without.texts
    assert without.get_legend() is None


def test_left_and_right_share_a_hue_and_differ_in_lightness():
    weights = torch.eye(4)
    ax = draw_regions(IMAGE, weights, (2, 2), ("right_eye", "left_eye", "nose", "chin"))
    colours = rgb_to_hsv([handle.get_facecolor()[:3] for handle in ax.get_legend().get_patches()])
    np.testing.assert_allclose(colours[0, 0], colours[1, 0], atol=1e-6)
    assert colours[1, 2] > colours[0, 2]
    assert len(set(colours[1:, 0].round(3))) == 3


def test_attention_is_laid_over_the_whole_image():
    ax = draw_attention(IMAGE, torch.eye(2), ax=plt.figure().add_subplot())
    assert list(ax.images[1].get_extent()) == [0, 60, 40, 0]
    assert np.asarray(ax.images[1].get_alpha()).argmax() == 0
    draw_attention(IMAGE, torch.zeros(2, 2))


def test_attention_is_in_multiples_of_an_even_look():
    attention = torch.tensor([[0.7, 0.1], [0.1, 0.1]])
    query = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    ax = draw_attention(IMAGE, attention, query=query, colorbar=True)
    np.testing.assert_allclose(ax.images[1].get_array(), [[2.8, 0.4], [0.4, 0.4]], rtol=1e-6)
    assert ax.images[1].get_clim() == (0.0, pytest.approx(2.8))
    assert [axis.get_ylabel() for axis in ax.figure.axes[1:]] == ["times uniform attention"]
    corners = [(30, 0), (60, 0), (60, 20), (30, 20), (30, 0)]
    assert outline(ax, 0) == {frozenset(edge) for edge in pairwise(corners)}


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (
            lambda: draw_landmarks(IMAGE[..., 0], [[1.0, 1.0]]),
            r"`image` must have shape .* \(40, 60\)",
        ),
        (
            lambda: draw_landmarks(IMAGE, [1.0, 2.0]),
            r"`landmarks` must have shape \(k, 2\); got \(2,\)",
        ),
        (
            lambda: draw_landmarks(IMAGE, np.ones((5, 2)), scheme=IBUG68),
            "the 68 points of 'ibug68'",
        ),
        (
            lambda: draw_regions(IMAGE, torch.ones(2, 4), (2, 2), ("nose",)),
            r"shape \(1, 4\), 1 names",
        ),
        (
            lambda: draw_regions(IMAGE, torch.ones(1, 4), (2, 2), ("nose",), labels="out"),
            "`labels` must be one of 'legend', 'inside', 'none'; got 'out'",
        ),
        (lambda: draw_attention(IMAGE, -torch.eye(2)), "at least 0; its values run from -1 to -?0"),
        (
            lambda: draw_attention(IMAGE, torch.full((2, 2), torch.nan)),
            "`attention_map` must be finite",
        ),
        (
            lambda: draw_attention(IMAGE, torch.eye(2), query=torch.ones(4)),
            r"`query` must have the shape \(2, 2\) of `attention_map`; got \(4,\)",
        ),
        (lambda: draw_attention(IMAGE, torch.ones(4)), r"must have shape \(h, w\).* got \(4,\)"),
    ],
)
def test_wrong_input_is_refused(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    def absent(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name="matplotlib")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingDependencyError, match=r'pip install "mmau\[plot\]"'):
        draw_landmarks(IMAGE, [[1.0, 1.0]])
