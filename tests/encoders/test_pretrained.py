"""What a folder of published weights decides: their precision is ours, their input is theirs."""

import json

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch.testing import assert_close

from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS, AdapterOptions, HuggingFaceVisualEncoder

NARROW = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
IMAGE = {**NARROW, "patch_size": 8, "image_size": 32}
DINOV2 = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}
SOUND = {
    **NARROW, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
LARGE = {**SOUND, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8, "vocab_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
# Registered name, kind of model in transformers, its sizes, further options.
WRAPPERS = {
    "dinov2": ("dinov2", "Dinov2", DINOV2, {}),
    "registers": ("dinov2", "Dinov2WithRegisters", DINOV2, {}),
    "vit": ("vit", "ViT", IMAGE, {"lora_rank": 2}),
    "clip": ("hf_vision", "CLIPVision", IMAGE, {"model_class": "CLIPVisionModel"}),
    "siglip": ("hf_vision", "SiglipVision", IMAGE, {"model_class": "SiglipVisionModel"}),
    "dinov3": ("hf_vision", "DINOv3ViT", IMAGE, {}),
    "wavlm-base": ("wavlm", "WavLM", SOUND, {"lora_rank": 2}),
    "wavlm-large": ("wavlm", "WavLM", LARGE, {"attention": "sdpa", "normalize_layers": False}),
    "hubert": ("hf_speech", "Hubert", SOUND, {"lora_rank": 2}),
    "wav2vec2": ("hf_speech", "Wav2Vec2", LARGE, {}),
    "whisper": ("whisper", "Whisper", WHISPER, {"lora_rank": 2}),
}
SEEING = ("dinov2", "registers", "vit", "clip", "siglip", "dinov3")
HEARING = ("wavlm-base", "wavlm-large", "hubert", "wav2vec2")


def save(kind, folder, dtype=torch.float32):
    _, name, sizes, _ = WRAPPERS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def load(kind, folder, **options):
    name, _, _, usual = WRAPPERS[kind]
    registry = VISUAL_ENCODERS if name in VISUAL_ENCODERS else AUDIO_ENCODERS
    torch.manual_seed(0)
    return registry.create(name, name=folder, **usual, **options)


def example(kind):
    torch.manual_seed(1)
    return torch.rand(2, 3, 32, 32) if kind in SEEING else 0.1 * torch.randn(2, 8000) + 0.05


def seen_by_backbone(encoder, inputs):
    seen = []
    encoder.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("pixel_values", *args)), with_kwargs=True
    )
    encoder(inputs)
    return seen[0]


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_are_computed_in_float32(kind, stored, tmp_path):
    encoder = load(kind, save(kind, tmp_path / "half", stored))
    model = transformers.AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32)
    model.save_pretrained(tmp_path / "full")
    full = load(kind, str(tmp_path / "full"))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    for name, tensor in full.saved_tensors().items():
        assert torch.equal(encoder.saved_tensors()[name], tensor), name
    assert torch.equal(encoder(example(kind))[0], full(example(kind))[0])


@pytest.mark.parametrize("kind", WRAPPERS)
def test_beside_frozen_weights_in_bfloat16_all_else_is_float32(
    kind, tmp_path, shake, check_gradients
):
    inputs, folder = example(kind), save(kind, tmp_path)
    expected = load(kind, folder).train()(inputs)[0]
    encoder = load(kind, folder, dtype="bfloat16").train()
    frozen = {p.dtype for p in encoder.parameters() if not p.requires_grad}
    trained = {p.dtype for p in encoder.parameters() if p.requires_grad}
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
    mixed = []
    if kind in HEARING:
        encoder.layer_mix.register_forward_pre_hook(lambda _, args: mixed.extend(args[0]))
    features = encoder(inputs)[0]
    assert {features.dtype, *(state.dtype for state in mixed)} == {torch.float32}
    assert 0 < (features - expected).norm() / expected.norm() < 0.02
    check_gradients(shake(encoder), encoder(inputs)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(inputs)[0].dtype == load(kind, folder)(inputs)[0].dtype


def test_a_model_that_is_handed_in_gets_the_precision_too():
    model = transformers.ViTModel(transformers.ViTConfig(**IMAGE)).half()
    assert HuggingFaceVisualEncoder(model).backbone.dtype == torch.float32
    encoder = HuggingFaceVisualEncoder(model, AdapterOptions(dtype="bfloat16"))
    assert encoder.backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype='bfloat16'` is for frozen weights, those that"):
        AdapterOptions(dtype="bfloat16", freeze_backbone=False)
    with pytest.raises(ValueError, match="`dtype` must be one of 'float32', 'bfloat16'; got"):
        AdapterOptions(dtype="half")


CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
STATEMENTS = {
    "clip": CLIP,
    "symmetric": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "doubled": {**CLIP, "rescale_factor": 1 / 127.5},
    "bytes": {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4] * 3},
    "plain": {"do_normalize": False},
}


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("statement", STATEMENTS)
def test_images_are_what_the_image_processor_makes_of_them(kind, statement, tmp_path):
    folder = save(kind, tmp_path)
    processor = transformers.ViTImageProcessorPil(**STATEMENTS[statement])
    processor.save_pretrained(folder)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = processor(list(pixels.numpy()), do_resize=False, return_tensors="pt")
    seen = seen_by_backbone(load(kind, folder), pixels / 255)
    assert_close(seen, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", HEARING)
@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_waveforms_are_what_the_feature_extractor_makes_of_them(
    kind, do_normalize, nested, tmp_path
):
    folder, waveform = save(kind, tmp_path), example(kind)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    if nested:  # as transformers 5 writes it beside a tokenizer
        record = json.dumps({"feature_extractor": extractor.to_dict(), "processor_class": None})
        (tmp_path / "processor_config.json").write_text(record)
    else:
        extractor.save_pretrained(folder)
    expected = extractor(list(waveform.numpy()), sampling_rate=16_000, return_tensors="pt")
    seen = seen_by_backbone(load(kind, folder), waveform)
    assert_close(seen, expected["input_values"], rtol=0, atol=1e-6)


def test_spectrograms_are_what_the_feature_extractor_makes_of_them(tmp_path):
    folder, waveform = save("whisper", tmp_path), example("whisper")
    extractor = transformers.WhisperFeatureExtractor()
    extractor.save_pretrained(folder)
    expected = extractor(list(waveform.numpy()), sampling_rate=16_000, return_tensors="pt")
    seen = seen_by_backbone(load("whisper", folder), waveform)
    assert_close(seen, expected["input_features"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "said", "options", "message"),
    [
        ("vit", CLIP, {"mean": [0.5] * 3}, r"says \[0\.481.* contradicts `mean=\[0\.5, 0\.5, 0"),
        ("clip", {"do_normalize": False}, {"std": [0.5] * 3}, r"says \[1\.0.* `std=\[0\.5"),
        ("wavlm-large", {"do_normalize": False}, {"normalize_waveform": True},
         "says `do_normalize=False`, which contradicts `normalize_waveform=True`, which can be"),
        ("hubert", {"do_normalize": None}, {"normalize_waveform": False}, "`do_normalize=True`"),
        ("hubert", {"sampling_rate": 8000}, {}, "`sampling_rate=8000`.* 16000, which is built in"),
        ("whisper", {"n_fft": 512}, {}, "`n_fft=512`, which contradicts 400"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(kind, said, options, message, tmp_path):
    folder = save(kind, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, **said}))
    with pytest.raises(ValueError, match=message):
        load(kind, folder, **options)


def test_what_does_not_contradict_is_taken(tmp_path):
    """Rounded statistics, as older checkpoints may have them, another kind of normalisation."""
    folder = save("clip", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    rounded = load("clip", folder, mean=[0.481, 0.458, 0.408], std=CLIP["image_std"])
    assert_close(rounded._mean.flatten(), torch.tensor([0.481, 0.458, 0.408]))
    image = example("clip")
    seen = seen_by_backbone(load("clip", folder, normalize="per_image", mean=[0.5] * 3), image)
    assert_close(seen.mean((1, 2, 3)), torch.zeros(2))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        load("clip", folder)


def test_published_names_are_followed_offline_or_said_not_to_be(tmp_path, monkeypatch):
    """From the cache of the hub, as it lies on a machine without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--someone--vit"
    snapshot = folder / "snapshots" / ("0" * 40)
    save("vit", snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    with pytest.warns(UserWarning, match=r"no preprocessor_config.json of 'someone/vit' is in"):
        encoder = load("vit", "someone/vit")
    np.testing.assert_allclose(encoder._mean.flatten(), 0.5)
    (snapshot / "preprocessor_config.json").write_text(json.dumps(CLIP))
    np.testing.assert_allclose(load("vit", "someone/vit")._mean.flatten(), CLIP["image_mean"])
