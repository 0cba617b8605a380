"""Whisper's encoder: its own spectrogram, 30 seconds at a time, features with times."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from mmau.encoders import AdapterOptions, WhisperEncoder
from mmau.encoders.backbone import count_parameters
from mmau.encoders.speech import WHISPER_ARCHITECTURES, whisper

SMALL = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


@pytest.fixture(scope="module")
def frozen():
    return WhisperEncoder.from_config(SMALL, AdapterOptions(freeze_backbone=True))


def test_the_spectrogram_is_that_of_transformers(frozen):
    waveform = torch.randn(2, 480_000) * torch.linspace(0, 1, 480_000)
    extractor = transformers.WhisperFeatureExtractor()
    expected = extractor(list(waveform.numpy()), sampling_rate=16000, return_tensors="np")
    ours = frozen.log_mel(waveform).numpy()
    assert ours.shape == (2, 80, 3000)
    np.testing.assert_allclose(ours, expected["input_features"], atol=2e-4)


def test_features_are_those_of_transformers_cut_to_the_sound(frozen):
    waveform = torch.randn(1, 16_000 * 3)
    features, times, mask = frozen(waveform)
    padded = torch.nn.functional.pad(waveform, (0, 480_000 - 48_000))
    with torch.no_grad():
        expected = frozen.backbone(frozen.log_mel(padded)).last_hidden_state[:, :150]
    assert_close(features, expected)
    assert_close(times[0], torch.arange(150, dtype=torch.float64) * 0.02)
    assert mask.all()


def test_an_impulse_is_in_the_spectrogram_at_the_time_of_its_feature(frozen):
    waveform = torch.zeros(1, 48_000)
    waveform[0, 320 * 70] = 1.0
    columns = frozen.log_mel(waveform)[0].sum(0)
    loud = columns.topk(2).indices.sort().values
    assert loud.float().mean().item() / 2 == pytest.approx(70, abs=0.6)


def test_each_clip_of_a_padded_batch_is_as_alone(frozen):
    waveform = torch.randn(2, 16_000)
    waveform[1, 5000:] = float("nan")
    features, _, mask = frozen(waveform, torch.tensor([16_000, 5000]))
    alone = frozen(waveform[1:, :5000])
    assert mask.sum(1).tolist() == [50, 15]
    assert_close(features[1, :15], alone.features[0])
    assert not features[1, 15:].any()
    assert frozen(torch.zeros(1, 100)).features.shape == (1, 0, 32)


def test_long_sound_runs_in_chunks_that_overlap(frozen):
    """Every feature comes once, from a segment in which it has its margin."""
    chunks = []

    class Counting(nn.Module):
        config = frozen.backbone.config

        def forward(self, spectrogram):
            chunks.append(spectrogram)
            steps = torch.arange(1500.0).view(1, -1, 1) + 10_000 * len(chunks)
            return transformers.modeling_outputs.BaseModelOutput(steps.expand(1, -1, 32))

    encoder = WhisperEncoder(Counting())
    features = encoder(torch.randn(1, 16_000 * 70)).features[0, :, 0]
    assert features.shape == (3500,)
    assert len(chunks) == 3
    places = features % 10_000
    assert places[0] == 0  # the first second has no more context to be had
    starts = (places.diff() != 1).nonzero().flatten() + 1
    assert starts.tolist() == [1400, 2700]
    assert (places[starts] >= 100).all()
    assert (places[starts - 1] < 1400).all()


@pytest.mark.parametrize("rank", [None, 2])
def test_what_should_learn_learns(rank, shake, check_gradients):
    encoder = WhisperEncoder.from_config(SMALL, AdapterOptions(lora_rank=rank)).train()
    check_gradients(shake(encoder), encoder(torch.randn(1, 8000)).features)
    assert count_parameters(encoder)[0] > (0 if rank else 20_000)
    assert encoder.backbone.training is (rank is None)


def test_layers_are_never_dropped():
    """Neither of a model that is handed in, nor in training."""
    small = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8}
    config = transformers.WhisperConfig(**SMALL, **small, vocab_size=8, pad_token_id=0)
    model = transformers.WhisperModel(config)
    model.encoder.layerdrop = 0.9
    adapters = AdapterOptions(freeze_backbone=False)
    assert WhisperEncoder(model.encoder, adapters).train().backbone.layerdrop == 0
    built = WhisperEncoder.from_config({**SMALL, "encoder_layerdrop": 0.9}).train()
    assert built.backbone.layerdrop == 0


def test_the_spectrogram_of_half_precision_is_computed_in_float32(frozen):
    waveform = torch.randn(1, 16_000).bfloat16()
    half = copy.deepcopy(frozen).bfloat16().log_mel(waveform)
    assert half.dtype == torch.bfloat16
    # Its buffers were rounded to 8 bits, and so is what comes out.
    assert_close(half.float(), frozen.log_mel(waveform.float()), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("openai/whisper-base", 20_590_592), ("openai/whisper-tiny", 8_208_384)],
)
def test_published_sizes(name, parameters):
    assert name in WHISPER_ARCHITECTURES
    with torch.device("meta"):
        encoder = whisper(name, pretrained=False)
    assert count_parameters(encoder) == (0, parameters)


def test_published_weights_load_and_are_not_saved_again(tmp_path):
    small = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8}
    config = transformers.WhisperConfig(**SMALL, **small, vocab_size=8, pad_token_id=0)
    model = transformers.WhisperModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = whisper(str(tmp_path))
    waveform = torch.randn(1, 480_000)
    with torch.no_grad():
        expected = model.encoder(encoder.log_mel(waveform)).last_hidden_state
    assert_close(encoder(waveform).features, expected)
    assert not encoder.saved_tensors()


def test_bad_input_is_refused(frozen):
    with pytest.raises(ValueError, match="NaN or infinite"):
        frozen(torch.full((1, 800), float("nan")))
    with pytest.raises(TypeError, match="takes no option 'd_modell'; did you mean 'd_model'"):
        WhisperEncoder.from_config({"d_modell": 3})
    with pytest.raises(ValueError, match="LoRA next to a trainable backbone"):
        whisper("openai/whisper-tiny", pretrained=False, lora_rank=2, freeze_backbone=False)
    with pytest.raises(ValueError, match="`name` must be one of"):
        whisper("openai/whisper", pretrained=False)
