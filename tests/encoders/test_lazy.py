"""The encoders package is light, and says which extra is missing."""

import builtins
import subprocess
import sys

import pytest

import mmau.encoders
from mmau.registry import MissingDependencyError


def test_no_heavy_library_before_an_encoder_is_asked_for():
    code = (
        "import sys, mmau.encoders; light = {'transformers', 'peft'} & set(sys.modules);"
        "mmau.encoders.DINOv2Encoder; print(len(light), 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["0", "True"]


def test_a_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "mmau.encoders.speech", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "mmau\[encoders\]"'):
        mmau.encoders.WavLMEncoder  # noqa: B018
    with pytest.raises(MissingDependencyError, match=r'pip install "mmau\[encoders\]"'):
        mmau.encoders.AUDIO_ENCODERS.get("wavlm")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DINOv3Encoder'"):
        mmau.encoders.DINOv3Encoder  # noqa: B018
