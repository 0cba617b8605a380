"""The timeline draws what it is given: curves, decisions, labels, gaps, sound and images."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mmau.inference import AUTable
from mmau.plot import draw_timeline, save_timeline


@pytest.fixture
def table():
    times = np.arange(40) / 10
    prob = np.stack([np.sin(times) ** 2, np.cos(times) ** 2], axis=1)
    valid = np.ones(40, dtype=bool)
    valid[10:15] = valid[30:] = False
    return AUTable(
        au_names=("AU1", "AU2"),
        timestamps=times,
        valid=valid,
        confidence=valid.astype(float),
        probability=prob,
        active=prob >= 0.5,
    )


def test_everything_is_drawn(table):
    figure = draw_timeline(
        table,
        labels=(table.probability > 0.7).astype(np.int8),
        waveform=np.zeros(64000, dtype=np.float32),
        images=np.zeros((40, 8, 8, 3), dtype=np.uint8),
        title="clip",
    )
    strip, sound, first, second = figure.axes
    assert strip.images
    assert sound.get_ylabel() == "sound"
    assert [axes.get_ylabel() for axes in (first, second)] == ["AU1", "AU2"]
    np.testing.assert_allclose(first.lines[0].get_ydata(), table.probability[:, 0])
    # Two spans without a face, in every row but the images.
    shaded = [p for p in second.patches if p.get_facecolor()[:3] == (0.88, 0.88, 0.88)]
    assert [(round(p.get_x(), 2), round(p.get_width(), 2)) for p in shaded] == [
        (1.0, 0.5),
        (3.0, 1.0),
    ]
    plt.close(figure)


def test_file_is_written_and_the_figure_closed(table, tmp_path):
    path = save_timeline(table, tmp_path / "out.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_one_frame_is_enough(table):
    one = AUTable(("AU1", "AU2"), *(getattr(table, n)[:1] for n in
                  ("timestamps", "valid", "confidence", "probability", "active")))  # fmt: skip
    plt.close(draw_timeline(one))
