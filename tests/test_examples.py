"""Every example of the gallery runs quickly, without a warning, and draws one titled figure."""

import ast
import importlib.util
import runpy
import time
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("plot_*.py"))
# What an example needs beyond `pip install mmau` and matplotlib.
NEEDS = {"plot_landmarks_to_patches": "mediapipe", "plot_hga_attention": "mediapipe"}


@pytest.fixture(autouse=True)
def _no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


def test_there_are_examples():
    assert len(SCRIPTS) >= 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script, capfd):
    needed = NEEDS.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{script.name} needs {needed}")
    start = time.process_time()
    runpy.run_path(str(script), run_name="__main__")
    assert time.process_time() - start < 10, "an example takes seconds"
    figures = [plt.figure(number) for number in plt.get_fignums()]
    assert len(figures) == 1, "one question, one figure"
    # The title becomes the text that stands for the picture when it cannot be seen.
    assert figures[0].get_suptitle(), "the figure has no suptitle"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_short_and_asks_one_question(script):
    source = script.read_text(encoding="utf-8")
    assert 30 <= len(source.splitlines()) <= 80
    title, underline = (ast.get_docstring(ast.parse(source)) or "\n").splitlines()[:2]
    assert title.endswith("?")
    assert underline == "=" * len(title)
