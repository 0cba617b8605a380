"""A missing library is named with its command; a broken one shows itself."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from mmau._optional import hide_broken_torchaudio, require, require_torchaudio
from mmau.encoders.log_mel import resample_waveform
from mmau.registry import MissingDependencyError


def test_a_missing_library_comes_with_its_extra():
    with pytest.raises(MissingDependencyError, match=r'^reading video needs .* "mmau\[video\]"'):
        require("nothing_of_this_name", purpose="reading video", extra="video")


def test_a_library_that_is_broken_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import another_missing_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_module") as caught:
        require("broken_inside", purpose="x", extra="video")
    assert not isinstance(caught.value, MissingDependencyError)


def test_a_missing_part_of_an_installed_library_shows_itself():
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.no_such_part") as caught:
        require("matplotlib.no_such_part", purpose="x", extra="plot")
    assert not isinstance(caught.value, MissingDependencyError)


# ---------------------------------------------------------------------- torchaudio
def test_an_absent_torchaudio_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(
        MissingDependencyError,
        match=r"^resampling in memory needs torchaudio, but torchaudio is not installed: "
        r'pip install "mmau\[audio\]"$',
    ):
        resample_waveform(torch.ones(5), 8000, 16000)


SCRIPT = """
import mmau, mmau.encoders, mmau.media, mmau.data.prepare, mmau.models, torch
from mmau.encoders import AUDIO_ENCODERS
from mmau._optional import torchaudio_error
from mmau.encoders.log_mel import resample_waveform
assert str(torchaudio_error()) == "libcudart.so.13: cannot open shared object file"
assert AUDIO_ENCODERS.create("log_mel")(torch.zeros(1, 4000)).features.shape == (1, 11, 64)
for use in (
    lambda: AUDIO_ENCODERS.create("log_mel", backend="torchaudio"),
    lambda: resample_waveform(torch.ones(5), 8000, 16000),
):
    try:
        use()
    except ImportError as error:
        print(type(error).__name__, error)
from mmau.encoders import VISUAL_ENCODERS
from mmau.encoders.speech import whisper
from mmau.encoders.vision import vit
for names in (AUDIO_ENCODERS, VISUAL_ENCODERS):
    for name in names:
        if name.startswith("tiny"):
            names.create(name)
with torch.device("meta"):
    whisper("openai/whisper-tiny", pretrained=False), vit(pretrained=False)
import sys
assert "torchaudio" not in sys.modules
print("done")
"""


def test_a_torchaudio_that_raises_oserror_breaks_only_its_own_features(tmp_path):
    """Its Linux wheel is a CUDA build: beside a torch for CPU its import ends in an OSError."""
    pytest.importorskip("transformers")
    package = tmp_path / "torchaudio"
    package.mkdir()
    (package / "__init__.py").write_text(
        'raise OSError("libcudart.so.13: cannot open shared object file")'
    )
    about = tmp_path / "torchaudio-2.11.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *refusals, done = result.stdout.splitlines()
    assert done == "done"
    assert len(refusals) == 2
    for text in refusals:
        assert text.startswith("MissingDependencyError ")
        assert "needs torchaudio, but torchaudio is installed but does not load beside" in text
        assert "(libcudart.so.13: cannot open shared object file)" in text


def test_a_torchaudio_that_loads_is_not_hidden(monkeypatch):
    class Fake:
        pass

    monkeypatch.setitem(sys.modules, "torchaudio", Fake())
    with hide_broken_torchaudio():
        assert isinstance(sys.modules["torchaudio"], Fake)
    assert isinstance(require_torchaudio("a test"), Fake)


def test_a_broken_part_of_torchaudio_is_said(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'torchaudio._extension'", name="torchaudio._ext")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        MissingDependencyError,
        match=r"is installed but does not load beside torch .*'torchaudio\._extension'\)",
    ):
        require_torchaudio("a test")
