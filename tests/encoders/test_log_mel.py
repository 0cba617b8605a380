"""Log-mel: the right band, the right time, and nothing from the future."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.encoders import AUDIO_ENCODERS, AudioEncoder, LogMelEncoder
from mmau.encoders.log_mel import mel_filterbank
from mmau.functional.time_alignment import interpolate_features


def tone(hertz, num_samples=8000):
    return torch.sin(2 * math.pi * hertz * torch.arange(num_samples) / 16000)[None]


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


def test_many_features_are_computed_in_pieces():
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
