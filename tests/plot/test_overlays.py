"""Overlays: data coordinates are pixels, and what is drawn is what was given."""

import numpy as np
import pytest
import torch

from mmau.landmarks import IBUG68
from mmau.registry import MissingDependencyError

plt = pytest.importorskip("matplotlib.pyplot")

from mmau.plot import draw_attention, draw_landmarks, draw_regions  # noqa: E402

IMAGE = np.zeros((40, 60, 3), np.uint8)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    "image", [IMAGE, torch.rand(3, 40, 60), 255 * torch.rand(40, 60, 3), IMAGE.transpose(2, 0, 1)]
)
def test_pictures_in_any_layout_span_their_pixels(image):
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


def test_regions_cover_their_patches():
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0]])
    ax = draw_regions(IMAGE, weights, (2, 3), ("brow", "eye"))
    boxes = sorted(patch.get_bbox().bounds for patch in ax.patches)
    assert boxes == [(0, 0, 20, 20), (20, 0, 10, 20), (30, 0, 10, 20)]


def test_attention_is_laid_over_the_whole_picture():
    ax = draw_attention(IMAGE, torch.eye(2), ax=plt.figure().add_subplot())
    assert list(ax.images[1].get_extent()) == [0, 60, 40, 0]
    assert np.asarray(ax.images[1].get_alpha()).argmax() == 0
    draw_attention(IMAGE, torch.zeros(2, 2))


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
