"""Wrappers of any vision or speech transformer: what learns, what stays, where each token is."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from mmau.encoders import (
    AUDIO_ENCODERS,
    VISUAL_ENCODERS,
    AdapterOptions,
    HuggingFaceSpeechEncoder,
    HuggingFaceVisualEncoder,
    ViTEncoder,
)
from mmau.encoders.backbone import WeightsNotFoundError, count_parameters
from mmau.encoders.vision import vit

NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGE = {**NARROW, "patch_size": 8, "image_size": 32}
SOUND = {
    **NARROW,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout"), 0.0),
}
VISION = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE), add_pooling_layer=False),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**IMAGE, num_register_tokens=4)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)),
}
SPEECH = {
    "hubert": lambda: transformers.HubertModel(transformers.HubertConfig(**SOUND)),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SOUND)),
}


@pytest.mark.parametrize("kind", VISION)
def test_tokens_are_the_patches_in_reading_order(kind):
    """Class and register tokens are dropped; without attention a token is its patch only."""
    backbone = VISION[kind]()
    for name, parameter in backbone.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight")) and "head" not in name:
            nn.init.zeros_(parameter)
    encoder = HuggingFaceVisualEncoder(backbone).eval()
    images = torch.rand(1, 3, 24, 48)
    plain = encoder(images)
    assert plain.grid_size == (3, 6)
    assert plain.patch_tokens.shape == (1, 18, 32)
    changed = images.clone()
    changed[..., 8:16, 16:24] = 0
    moved = (encoder(changed).patch_tokens - plain.patch_tokens).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [8]


@pytest.mark.parametrize("kind", VISION)
def test_lora_learns_and_the_frozen_model_does_not(kind, shake, check_gradients):
    backbone = VISION[kind]()
    frozen = HuggingFaceVisualEncoder(copy.deepcopy(backbone))
    encoder = HuggingFaceVisualEncoder(backbone, AdapterOptions(lora_rank=2)).train()
    images = torch.rand(2, 3, 32, 32)
    assert_close(encoder(images).patch_tokens, frozen(images).patch_tokens)
    assert count_parameters(encoder)[0] == 2 * 2 * 2 * 2 * 32
    check_gradients(shake(encoder), encoder(images).patch_tokens)


@pytest.mark.parametrize("kind", SPEECH)
@pytest.mark.parametrize("place", ["feed_forward", "attention"])
def test_speech_adapters_lora_and_mix_learn(kind, place, shake, check_gradients):
    backbone = SPEECH[kind]()
    plain = HuggingFaceSpeechEncoder(copy.deepcopy(backbone), AdapterOptions(mix_layers=True))
    adapters = AdapterOptions(d_bottleneck=4, lora_rank=2, lora_place=place, mix_layers=True)
    encoder = HuggingFaceSpeechEncoder(backbone, adapters)
    waveform = torch.randn(2, 4000)
    assert_close(encoder.train()(waveform).features, plain(waveform).features)
    check_gradients(shake(encoder), encoder(waveform).features)
    names = set(encoder.saved_tensors())
    assert any(name.startswith(f"lora.1.{'output' if place == 'feed_forward' else 'value'}")
               for name in names)  # fmt: skip
    assert len(names) == 2 * 4 + 2 * 2 * 2 + 1 + len(plain.backbone.state_dict())


def test_without_the_mix_the_last_layer_comes_out():
    backbone = SPEECH["hubert"]()
    encoder = HuggingFaceSpeechEncoder(backbone, AdapterOptions())
    waveform = torch.randn(1, 4000)
    with torch.no_grad():
        assert_close(encoder(waveform).features, backbone(waveform).last_hidden_state)
    assert count_parameters(encoder)[0] == 0


def test_published_weights_load_by_name_of_the_class(tmp_path):
    """From folders as `save_pretrained` writes them; the hub has the same files."""
    saved = VISION["clip"]()
    saved.save_pretrained(tmp_path / "clip")
    encoder = VISUAL_ENCODERS.create(
        "hf_vision", name=str(tmp_path / "clip"), model_class="CLIPVisionModel", lora_rank=None
    )
    images = torch.rand(1, 3, 32, 32)
    assert_close(encoder(images).patch_tokens, HuggingFaceVisualEncoder(saved)(images).patch_tokens)
    assert not encoder.saved_tensors()
    speech = SPEECH["hubert"]()
    speech.save_pretrained(tmp_path / "hubert")
    encoder = AUDIO_ENCODERS.create("hf_speech", name=str(tmp_path / "hubert"), d_bottleneck=None)
    waveform = torch.randn(1, 4000)
    assert_close(
        encoder(waveform).features,
        HuggingFaceSpeechEncoder(speech, AdapterOptions(mix_layers=True))(waveform).features,
    )
    assert set(encoder.saved_tensors()) == {"layer_mix.weight"}


def test_vit_loads_without_its_pooler_and_keeps_its_own_normalisation(tmp_path):
    saved = transformers.ViTModel(transformers.ViTConfig(**IMAGE))
    saved.save_pretrained(tmp_path)
    encoder = vit(str(tmp_path))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = saved.eval()(pixel_values=2 * images - 1).last_hidden_state[:, 1:]
    assert_close(encoder(images).patch_tokens, expected)
    assert not any("pooler" in name for name in encoder.state_dict())


def test_a_trainable_vit_learns_everywhere(check_gradients):
    encoder = ViTEncoder.from_config(IMAGE, normalize="per_image").train()
    check_gradients(encoder, encoder(torch.rand(2, 3, 32, 32)).patch_tokens)


def test_the_published_vit_has_the_published_size():
    with torch.device("meta"):
        encoder = vit(pretrained=False)
    assert encoder.d_out == 768
    assert count_parameters(encoder) == (0, 85_798_656)


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match="no model class 'CLIPVisonModel'; did you mean 'CLIPVis"):
        VISUAL_ENCODERS.create("hf_vision", name="x", model_class="CLIPVisonModel")
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        VISUAL_ENCODERS.create("hf_vision", name=str(tmp_path / "nowhere"))
    for registry, name in ((VISUAL_ENCODERS, "hf_vision"), (AUDIO_ENCODERS, "hf_speech")):
        with pytest.raises(ValueError, match="LoRA next to a trainable backbone"):
            registry.create(name, name="x", lora_rank=2, freeze_backbone=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wavlm"}))
    with pytest.raises(ValueError, match=r"is a WavLM, .* use the audio encoder 'wavlm'"):
        AUDIO_ENCODERS.create("hf_speech", name=str(tmp_path))
    with pytest.raises(TypeError, match=r"pass it, HuggingFaceVisualEncoder\(model\)"):
        HuggingFaceVisualEncoder.from_config(IMAGE)
    with pytest.raises(ValueError, match=r"must be multiples of the patch size 8; got 30 x 32"):
        HuggingFaceVisualEncoder(VISION["vit"]())(torch.rand(1, 3, 30, 32))


class Pooled(nn.Module):
    """Halves its grid, as hierarchical models do."""

    config = transformers.ViTConfig(**IMAGE)

    def forward(self, pixel_values):
        return transformers.modeling_outputs.BaseModelOutput(torch.zeros(1, 4, 32))


def test_a_model_that_merges_patches_is_refused():
    with pytest.raises(ValueError, match=r"Pooled returned 4 tokens for a grid of 4 x 4 patches"):
        HuggingFaceVisualEncoder(Pooled())(torch.rand(1, 3, 32, 32))
