"""Log-mel: the right band, the right time, and nothing from the future."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau._optional import torchaudio_error
from mmau.encoders import AUDIO_ENCODERS, AudioEncoder, LogMelEncoder, log_mel
from mmau.encoders.log_mel import mel_filterbank, resample_waveform
from mmau.functional.time_alignment import interpolate_features

needs_torchaudio = pytest.mark.skipif(
    torchaudio_error() is not None, reason=f"torchaudio: {torchaudio_error()}"
)


def tone(hertz, num_samples=8000):
    return torch.sin(2 * math.pi * hertz * torch.arange(num_samples) / 16000)[None]


def sound(hertz, rate):
    """Return one second, made in float64."""
    times = torch.arange(rate, dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * times).float()


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 4000.0])
def test_a_tone_is_loudest_in_its_band(hertz):
    encoder = LogMelEncoder(num_mels=32, low=0.0, high=8000.0)
    band = int(encoder(tone(hertz)).features.mean(1).argmax())
    mel = 2595 * math.log10(1 + hertz / 700)
    step = 2595 * math.log10(1 + 8000 / 700) / 33
    assert abs(band - (mel / step - 1)) <= 0.75


def test_an_impulse_peaks_at_its_own_time():
    encoder = LogMelEncoder()
    waveform = torch.zeros(1, 16000)
    waveform[0, 5000] = 1.0
    features, times, _ = encoder(waveform)
    assert abs(times[0, features.sum(-1)[0].argmax()] - 5000 / 16000) <= 0.01 + 1e-4


@given(cut=st.integers(0, 6400), rate=st.sampled_from([15.0, 23.976, 50.0, 60.0]))
def test_a_causal_feature_on_a_frame_knows_nothing_later(cut, rate):
    """Through the interpolation, which looks at the next feature."""
    encoder = LogMelEncoder(num_mels=8, causal=True)
    waveform = torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    changed = waveform.clone()
    changed[:, cut:] = 0.9
    frames = torch.arange(0, 0.39, 1 / rate, dtype=torch.float64)[None]
    before = frames * 16000 < cut

    def aligned(x):
        encoded = encoder(x)
        return interpolate_features(
            encoded.features, encoded.times, frames, feature_mask=encoded.mask
        )

    (a, valid), (b, _) = aligned(waveform), aligned(changed)
    assert torch.equal(a[before], b[before])
    assert valid.all()
    if cut < 4000:
        assert not torch.equal(a, b)


def test_silence_is_zero_and_louder_is_more():
    encoder = LogMelEncoder()
    assert not encoder(torch.zeros(1, 4000)).features.any()
    quiet, loud = encoder(0.1 * tone(500.0)).features, encoder(tone(500.0)).features
    assert (loud >= quiet).all()
    assert 3 < loud.max() < 6


@pytest.mark.parametrize("causal", [False, True])
def test_a_short_clip_in_a_batch_is_the_clip_alone(causal):
    encoder = LogMelEncoder(causal=causal)
    waveform = torch.randn(2, 5000)
    batch = encoder(waveform, torch.tensor([5000, 3000]))
    alone = encoder(waveform[1:, :3000])
    num = alone.features.shape[1]
    assert batch.mask.sum(1).tolist() == [batch.features.shape[1], num]
    assert_close(batch.features[1:, :num], alone.features)


def test_many_features_are_computed_in_chunks():
    encoder = LogMelEncoder(num_mels=4, hop=0.001, window=0.004, low=0.0, high=8000.0)
    waveform = torch.randn(1, 16 * 5000)
    features = encoder(waveform).features
    assert features.shape[1] == 4997
    part = encoder(waveform[:, 16 * 4090 :]).features
    assert_close(features[:, 4090:], part)


def test_a_waveform_shorter_than_a_window_gives_no_feature():
    assert LogMelEncoder()(torch.zeros(1, 100)).features.shape == (1, 0, 64)


def test_filters_cover_the_range_and_have_peaks_below_one():
    filters = mel_filterbank(24, 321, 16000, 60.0, 7600.0)
    assert filters.shape == (321, 24)
    assert 0.5 < filters.max() <= 1
    first, last = filters.argmax(0)[[0, -1]].tolist()
    inside = filters[first + 1 : last].sum(1)
    assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mels": 0}, "`num_mels` must be in"),
        ({"num_mels": 500}, "`num_mels` is too large for a window of 0.04 s"),
        ({"high": 9000.0}, "`high` must be in"),
        ({"low": 8000.0}, "`low` must be in"),
        ({"hop": 0.1}, "`window` must be in"),
        ({"floor": 0.0}, "`floor` must be in"),
        ({"hop": 0.0}, "`hop` must be in"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LogMelEncoder(**options)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite samples"):
        LogMelEncoder()(torch.full((1, 4000), torch.inf))


@pytest.mark.parametrize("name", sorted({"log_mel", "tiny_wavlm"}))
def test_registered_audio_encoders_share_one_shape(name):
    encoder = AUDIO_ENCODERS.create(name)
    assert isinstance(encoder, AudioEncoder)
    features, times, mask = encoder(torch.randn(2, 8000) * 0.1, torch.tensor([8000, 4000]))
    assert features.shape == (*mask.shape, encoder.d_out)
    assert times.dtype == torch.float64
    assert (times.diff(dim=1) > 0).all()
    assert mask.dtype == torch.bool


# ---------------------------------------------------------------------- through torchaudio
@needs_torchaudio
def test_resampling_keeps_the_pitch_and_what_cannot_be_kept_leaves_no_alias():
    kept = resample_waveform(sound(440, 44100), 44100, 16000)
    assert kept.shape == (16000,)
    assert_close(kept[400:-400], sound(440, 16000)[400:-400], atol=1e-3, rtol=0)
    beyond = sound(9000, 44100)
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
    waveform = torch.randn(1, 20000)
    whole = LogMelEncoder(backend="torchaudio")(waveform).features
    monkeypatch.setattr(log_mel, "_FEATURES_AT_ONCE", 7)
    for backend in ("torch", "torchaudio"):
        assert_close(LogMelEncoder(backend=backend)(waveform).features, whole, atol=2e-5, rtol=0)


@needs_torchaudio
def test_the_filters_are_those_of_torchaudio():
    ours = mel_filterbank(32, 321, 16000, 60.0, 7600.0)
    theirs = LogMelEncoder(num_mels=32, backend="torchaudio")._filters
    assert_close(theirs, ours, atol=2e-5, rtol=0)


def test_the_backend_is_chosen_by_name_and_shows():
    assert "backend='torch'" in repr(LogMelEncoder())
    with pytest.raises(ValueError, match="`backend` must be one of 'torch', 'torchaudio'"):
        LogMelEncoder(backend="torchaudi")


def test_resampling_to_the_same_rate_needs_no_library(monkeypatch):
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
def test_wrong_options_of_resampling(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        resample_waveform(*arguments, **options)
