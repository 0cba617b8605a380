"""WavLM: clocks, chunks, padding, and what learns."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.encoders import AdapterOptions, WavLMEncoder
from mmau.encoders.backbone import WeightsNotFoundError, count_parameters
from mmau.encoders.speech import WAVLM_ARCHITECTURES, tiny_wavlm, wavlm

SMALL_CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32, "max_bucket_distance": 80, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
BOTTLENECKS = AdapterOptions(d_bottleneck=4, mix_layers=True)
FROZEN = AdapterOptions(freeze_backbone=True, mix_layers=True)


def only_local(encoder):
    """Switch attention and positional convolution off: a feature depends on its own window only."""
    for layer in encoder.backbone.encoder.layers:
        nn.init.zeros_(layer.attention.out_proj.weight)
    nn.init.zeros_(encoder.backbone.encoder.pos_conv_embed.conv.parametrizations.weight.original0)
    return encoder.eval()


@torch.no_grad()
def test_an_impulse_is_felt_at_its_own_time():
    encoder = only_local(tiny_wavlm())
    waveform = torch.randn(1, 8000) * 0.1
    plain = encoder(waveform)
    for sample in (0, 199, 3333, 7500):
        struck = waveform.clone()
        struck[0, sample] += 1.0
        felt = (encoder(struck).features - plain.features).abs().amax(-1)[0] > 0
        distance = (plain.times[0] * 16000 - sample).abs()
        assert torch.equal(felt, distance <= 199.5)


def test_times_are_those_of_the_published_convolutions():
    times = tiny_wavlm()(torch.zeros(2, 16000)).times
    assert times.dtype == torch.float64
    assert_close(times[1], (320 * torch.arange(49, dtype=torch.float64) + 199.5) / 16000)


@torch.no_grad()
def test_chunks_meet_without_a_seam():
    """Without attention the only reach is the positional convolution, shorter than the margin."""
    whole = only_local(tiny_wavlm(max_chunk=60.0))
    cut = copy.deepcopy(whole)
    cut._chunk, cut._margin = 150, 25
    waveform = torch.randn(2, 16000 * 11 + 123) * 0.1
    expected, found = whole(waveform), cut(waveform)
    assert found.features.shape == expected.features.shape
    assert torch.equal(found.mask, expected.mask)
    assert_close(found.features, expected.features, rtol=0, atol=2e-6)  # fp32 sums


@torch.no_grad()
def test_chunked_is_close_to_whole_with_attention():
    torch.manual_seed(3)
    whole = tiny_wavlm(max_chunk=60.0).eval()
    cut = copy.deepcopy(whole)
    cut._chunk, cut._margin = 400, 100
    waveform = torch.randn(1, 16000 * 20) * 0.1
    expected, found = whole(waveform).features, cut(waveform).features
    # Global attention has less context; four seeds left 0.2 % of the spread.
    assert (found - expected).abs().max() < 0.01 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["layer", "group"])
def test_a_short_clip_in_a_batch_is_the_clip_alone(architecture):
    """WavLM-Base normalises over time: padding it in a batch would change its features."""
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "feat_extract_norm": architecture,
        "do_stable_layer_norm": architecture == "layer",
    }  # fmt: skip
    encoder = WavLMEncoder.from_config(config, BOTTLENECKS).eval()
    short, long = torch.randn(1, 5000) * 0.1, torch.randn(1, 9000) * 0.1
    padded = torch.cat([short, torch.full((1, 4000), 0.7)], dim=1)
    batch = encoder(torch.cat([padded, long, padded]), torch.tensor([5000, 9000, 300]))
    alone = encoder(short)
    num = alone.features.shape[1]
    assert_close(batch.features[:1, :num], alone.features, rtol=0, atol=1e-6)
    assert_close(batch.features[1:2], encoder(long).features, rtol=0, atol=1e-6)
    assert batch.mask.sum(1).tolist() == [num, 27, 0]
    assert not batch.features[~batch.mask].any()


@torch.no_grad()
def test_a_waveform_shorter_than_a_window_gives_no_feature():
    features, times, mask = tiny_wavlm()(torch.zeros(2, 399))
    assert features.shape == (2, 0, 32)
    assert times.shape == mask.shape == (2, 0)


@pytest.mark.parametrize("d_bottleneck", [None, 4])
def test_every_trainable_tensor_learns_and_no_other(d_bottleneck, shake, check_gradients):
    encoder = tiny_wavlm(d_bottleneck=d_bottleneck, freeze=d_bottleneck is not None).train()
    with torch.no_grad():
        encoder.layer_mix.weight.copy_(torch.tensor([0.3, -0.2, 0.5]))
    check_gradients(shake(encoder), encoder(torch.randn(2, 6000) * 0.1).features)
    trainable = [n for n, p in encoder.named_parameters() if p.requires_grad]
    if d_bottleneck:
        assert len(trainable) == 2 * 4 + 1
        assert all(n.startswith(("adapters.", "layer_mix.")) for n in trainable)
    else:
        assert len(trainable) > 40


def test_adapters_are_the_identity_at_first(shake):
    torch.manual_seed(1)
    plain = tiny_wavlm()
    torch.manual_seed(1)
    adapted = tiny_wavlm(d_bottleneck=4, freeze=True)
    waveform = torch.randn(1, 4000) * 0.1
    assert torch.equal(plain(waveform).features, adapted(waveform).features)
    shake(adapted)
    assert not torch.allclose(plain(waveform).features, adapted(waveform).features, atol=1e-3)


def test_a_frozen_backbone_is_quiet_under_train():
    """Dropout, dropped layers and masked spans would all make it noisy."""
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "layerdrop": 0.9, "mask_time_prob": 0.9,
        "hidden_dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5,
    }  # fmt: skip
    encoder = WavLMEncoder.from_config(config, BOTTLENECKS).train()
    waveform = torch.randn(1, 8000)
    assert torch.equal(encoder(waveform).features, encoder(waveform).features)
    assert encoder.adapters.training
    assert encoder.backbone.config.layerdrop == 0
    assert not encoder.backbone.config.apply_spec_augment


def test_waveforms_are_normalised_as_the_published_models_want():
    large = WavLMEncoder.from_config({"hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7,
        "feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 4})  # fmt: skip
    assert large.normalize_waveform
    large.eval()
    waveform = torch.randn(1, 4000)
    assert_close(
        large(waveform).features, large(0.01 * waveform + 0.2).features, rtol=1e-3, atol=1e-3
    )
    assert not wavlm_on_meta("microsoft/wavlm-base").normalize_waveform


def wavlm_on_meta(name):
    with torch.device("meta"):
        return wavlm(name, pretrained=False)


def test_published_sizes():
    """24 adapters of 1024 -> 64 -> 1024 with biases, and 25 mix weights."""
    encoder = wavlm_on_meta("microsoft/wavlm-large")
    trainable, total = count_parameters(encoder)
    assert trainable == 24 * (2 * 1024 * 64 + 64 + 1024) + 25 == 3_171_865
    assert 315e6 < total - trainable < 317e6
    assert encoder.d_out == 1024
    assert encoder.normalize_waveform


def test_pretrained_weights_are_loaded_from_a_folder_and_not_saved_again(tmp_path):
    source = tiny_wavlm(freeze=True, d_bottleneck=4)
    source.backbone.save_pretrained(tmp_path)
    loaded = WavLMEncoder.from_pretrained(str(tmp_path), BOTTLENECKS)
    loaded.normalize_waveform = False
    waveform = torch.randn(1, 4000) * 0.1
    assert_close(loaded(waveform).features, source(waveform).features, rtol=0, atol=1e-6)
    names = set(loaded.saved_tensors())
    assert names == {
        "layer_mix.weight",
        *(
            f"adapters.{i}.{p}.{w}"
            for i in (0, 1)
            for p in ("down", "up")
            for w in ("weight", "bias")
        ),
    }
    assert len(source.saved_tensors()) > 40


def test_missing_weights_and_wrong_kinds_are_explained(tmp_path, monkeypatch):
    from transformers import Dinov2Config

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError, match="hf download microsoft/none-such"):
        WavLMEncoder.from_pretrained("microsoft/none-such")
    Dinov2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'dinov2'; expected wavlm"):
        WavLMEncoder.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("waveform", "lengths", "error", "message"),
    [
        (torch.zeros(16000), None, ValueError, r"`waveform` must have shape \(b, n\)"),
        (torch.zeros(1, 800, dtype=torch.int16), None, TypeError, "`waveform` must be float"),
        (torch.full((1, 800), torch.nan), None, ValueError, "NaN or infinite samples"),
        (torch.zeros(1, 800), torch.tensor([801]), ValueError, r"between 0 and the 800 samples"),
        (torch.zeros(1, 800), torch.tensor([1, 2]), ValueError, "axis `b` is 1 in `waveform`"),
    ],
)
def test_wrong_waveforms(waveform, lengths, error, message):
    with pytest.raises(error, match=message):
        tiny_wavlm()(waveform, lengths)


def test_nan_behind_the_end_of_a_clip_does_not_matter():
    waveform = torch.randn(1, 2000)
    dirty = torch.cat([waveform, torch.full((1, 500), torch.nan)], dim=1)
    encoder = tiny_wavlm().eval()
    found = encoder(dirty, torch.tensor([2000])).features
    assert_close(found[:, :6], encoder(waveform).features[:, :6])
    assert found.isfinite().all()


def test_wrong_options():
    with pytest.raises(ValueError, match="`max_chunk` must be in"):
        tiny_wavlm(max_chunk=4.0, chunk_margin=2.0)
    with pytest.raises(TypeError, match=r"no option 'hiden_size'; did you mean 'hidden_size'\?"):
        WavLMEncoder.from_config({"hiden_size": 32})
    with pytest.raises(ValueError, match="`name` must be one of"):
        wavlm("microsoft/wavlm-huge", pretrained=False)
    assert sorted(WAVLM_ARCHITECTURES)[-1] == "microsoft/wavlm-large"


@pytest.mark.parametrize("place", ["feed_forward", "attention"])
def test_lora_learns_where_it_is_asked_for(place, shake, check_gradients):
    """On the attention only through its own projections; see the test below."""
    torch.manual_seed(0)
    plain = WavLMEncoder.from_config(SMALL_CONFIG, FROZEN)
    torch.manual_seed(0)
    adapters = AdapterOptions(lora_rank=2, lora_place=place, mix_layers=True)
    encoder = WavLMEncoder.from_config(SMALL_CONFIG, adapters, attention="sdpa")
    waveform = torch.randn(2, 8000)
    assert_close(encoder.train()(waveform).features, plain(waveform).features, atol=1e-5, rtol=1e-5)
    check_gradients(shake(encoder), encoder(waveform).features)
    assert sum(p.requires_grad for p in encoder.parameters()) == 2 * 2 * 2 + 1
    copied = copy.deepcopy(encoder).eval()
    assert_close(copied(waveform).features, encoder.eval()(waveform).features)


def test_lora_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match='LoRA on the attention of WavLM needs `attention="sdpa"`'):
        WavLMEncoder.from_config(SMALL_CONFIG, AdapterOptions(lora_rank=2, lora_place="attention"))


# transformers itself mixes a boolean and a float mask.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_the_fused_attention_equals_that_of_transformers_under_a_mask():
    torch.manual_seed(0)
    eager = WavLMEncoder.from_config(SMALL_CONFIG, FROZEN)
    torch.manual_seed(0)
    fused = WavLMEncoder.from_config(SMALL_CONFIG, FROZEN, attention="sdpa")
    assert {type(m).__name__ for m in fused.modules()} > {"_SdpaAttention"}
    waveform = torch.randn(2, 16000)
    mask = torch.ones(2, 16000, dtype=torch.long)
    mask[1, 9000:] = 0
    one, other = (
        e.backbone(waveform, attention_mask=mask).last_hidden_state for e in (eager, fused)
    )
    assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert_close(one[1, :27], other[1, :27], atol=1e-5, rtol=1e-5)
