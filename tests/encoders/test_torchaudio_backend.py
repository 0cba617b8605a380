"""torchaudio where it loads; and where it does not, nothing but its own features is gone."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from mmau.encoders import LogMelEncoder, torchaudio_backend
from mmau.encoders.log_mel import mel_filterbank
from mmau.encoders.torchaudio_backend import (
    require_torchaudio,
    resample_waveform,
    torchaudio_filterbank,
    torchaudio_status,
)
from mmau.registry import MissingDependencyError

needs_torchaudio = pytest.mark.skipif(
    not torchaudio_status().loads, reason=torchaudio_status().reason
)


def tone(hertz, rate, seconds=1.0):
    times = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * times).float()


# ---------------------------------------------------------------------- where it loads
@needs_torchaudio
def test_a_tone_keeps_its_pitch_and_what_cannot_be_kept_leaves_no_alias():
    kept = resample_waveform(tone(440, 44100), 44100, 16000)
    assert kept.shape == (16000,)
    assert_close(kept[400:-400], tone(440, 16000)[400:-400], atol=1e-3, rtol=0)
    beyond = tone(9000, 44100)
    assert resample_waveform(beyond, 44100, 16000)[200:-200].abs().max() < 1e-3
    soft = resample_waveform(beyond, 44100, 16000, lowpass_filter_width=6)
    assert soft[200:-200].abs().max() > 0.1  # the default of torchaudio, which is not ours


@needs_torchaudio
def test_a_click_stays_where_it_was():
    clicks = torch.zeros(2, 3, 44100)
    clicks[..., 22050] = 1.0
    moved = resample_waveform(clicks, 44100, 16000)
    assert moved.shape == (2, 3, 16000)
    assert (moved.argmax(dim=-1) == 8000).all()


@needs_torchaudio
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_samples", [640, 641, 5000])
def test_log_mel_is_the_same_through_torchaudio(causal, num_samples):
    waveform = torch.randn(2, num_samples) * 0.1
    ours = LogMelEncoder(causal=causal)(waveform, torch.tensor([num_samples, 600]))
    theirs = LogMelEncoder(causal=causal, backend="torchaudio")(
        waveform, torch.tensor([num_samples, 600])
    )
    assert_close(theirs.features, ours.features, atol=2e-5, rtol=0)  # float32 sums of 321 bins
    assert torch.equal(theirs.times, ours.times)
    assert torch.equal(theirs.mask, ours.mask)


@needs_torchaudio
def test_a_long_waveform_has_no_seam(monkeypatch):
    from mmau.encoders import log_mel

    waveform = torch.randn(1, 20000)
    whole = LogMelEncoder(backend="torchaudio")(waveform).features
    monkeypatch.setattr(log_mel, "_FEATURES_AT_ONCE", 7)
    for backend in ("torch", "torchaudio"):
        assert_close(LogMelEncoder(backend=backend)(waveform).features, whole, atol=2e-5, rtol=0)


@needs_torchaudio
def test_the_filters_are_those_of_torchaudio():
    ours = mel_filterbank(32, 321, 16000, 60.0, 7600.0)
    theirs = torchaudio_filterbank(32, 321, 16000, 60.0, 7600.0)
    assert_close(theirs, ours, atol=2e-5, rtol=0)


# ---------------------------------------------------------------------- choices
def test_the_backend_is_chosen_by_name_and_shows():
    assert "backend='torch'" in repr(LogMelEncoder())
    with pytest.raises(ValueError, match="`backend` must be one of 'torch', 'torchaudio'"):
        LogMelEncoder(backend="torchaudi")


def test_equal_rates_need_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    waveform = torch.ones(5)
    assert resample_waveform(waveform, 16000, 16000) is waveform


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(9), 0, 16000), {}, "`source_rate` must be in"),
        ((torch.ones(9), 16000, 0), {}, "`target_rate` must be in"),
        ((torch.ones(9), 1, 2), {"lowpass_filter_width": 0}, "`lowpass_filter_width` must be in"),
        ((torch.ones(9, dtype=torch.int16), 1, 2), {}, r"`waveform` must be floats .* torch.int16"),
    ],
)
def test_wrong_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        resample_waveform(*arguments, **options)


# ---------------------------------------------------------------------- where it does not load
def test_an_absent_torchaudio_is_named_with_the_command(monkeypatch):
    def absent(name):
        raise torchaudio_backend.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setattr(torchaudio_backend.importlib.metadata, "version", absent)
    with pytest.raises(
        MissingDependencyError,
        match=r"^resampling in memory needs torchaudio, but torchaudio is not installed: "
        r'pip install "mmau\[audio\]"$',
    ):
        resample_waveform(torch.ones(5), 8000, 16000)


SCRIPT = """
import mmau, mmau.encoders, mmau.media, mmau.data.prepare, mmau.models, torch
from mmau.encoders import AUDIO_ENCODERS
from mmau.encoders.torchaudio_backend import *
status = torchaudio_status()
assert not status.loads and "(libcudart.so.13: cannot open shared object file)" in status.reason
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
    with torchaudio_backend.hide_broken_torchaudio():
        assert isinstance(sys.modules["torchaudio"], Fake)
    assert isinstance(require_torchaudio("a test"), Fake)


def test_a_broken_part_of_torchaudio_is_said(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'torchaudio._extension'", name="torchaudio._ext")

    monkeypatch.setattr(torchaudio_backend.importlib, "import_module", broken)
    reason = torchaudio_status().reason
    assert "is installed but does not load beside torch" in reason
    assert "(No module named 'torchaudio._extension')" in reason
