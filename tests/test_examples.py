"""Every example of the gallery runs quickly, without a warning, and draws a titled figure."""

import ast
import importlib.util
import runpy
import time
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("plot_*.py"))
# What an example needs beyond `pip install mmau` and matplotlib.
NEEDS = {
    "plot_hga_attention": "mediapipe",
    "plot_hga_occlusion": "mediapipe",
    "plot_landmarks_to_patches": "mediapipe",
    "plot_lora_budget": "peft",
    "plot_own_encoder": "peft",
}
# The examples that the documentation promises; more are welcome.
PROMISED = {
    "plot_asymmetric_loss",
    "plot_backends_agree",
    "plot_cost_of_length",
    "plot_delta_gate",
    "plot_hga_attention",
    "plot_hga_occlusion",
    "plot_landmarks_to_patches",
    "plot_lora_budget",
    "plot_memory",
    "plot_missing_audio",
    "plot_own_encoder",
    "plot_rare_aus",
    "plot_streaming",
    "plot_two_clocks",
    "plot_which_f1",
}


@pytest.fixture(autouse=True)
def _no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def _names_forgotten(monkeypatch):
    # What an example registers is not there for the tests that run after it in this process.
    for registry in (VISUAL_ENCODERS, AUDIO_ENCODERS):
        monkeypatch.setattr(registry, "_own", dict(registry._own))


def test_every_promised_example_is_there():
    assert not PROMISED - {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script, capfd):
    needed = NEEDS.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{script.name} needs {needed}")
    start = time.process_time()
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):  # as in the gallery
        runpy.run_path(str(script), run_name="__main__")
    assert time.process_time() - start < 10, "an example takes seconds"
    figures = [plt.figure(number) for number in plt.get_fignums()]
    assert 1 <= len(figures) <= 2, "one question, one picture, and a second at most"
    # The title becomes the text that stands for the picture when it cannot be seen.
    assert all(figure.get_suptitle() for figure in figures), "a figure has no suptitle"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_short_and_asks_one_question(script):
    source = script.read_text(encoding="utf-8")
    assert 30 <= len(source.splitlines()) <= 120
    docstring = ast.get_docstring(ast.parse(source)) or "\n"
    title, underline = docstring.splitlines()[:2]
    assert title.endswith("?")
    assert underline == "=" * len(title)
    # The lead becomes a tooltip, which knows no Markdown.
    assert not set("`[]*$") & set(docstring), "markup belongs below the lead"
    # The gallery takes the picture at the end of each block: what comes later is not in it.
    for block in source.split("# %%\n"):
        assert block.count("plt.subplots(") == block.count("plt.show()")
