"""A config is data: it survives JSON, and a mistake in it is named."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.encoders.backbone import count_parameters
from mmau.models import Component, DetectorConfig, build_detector
from mmau.registry import UnknownComponentError

configs = st.builds(
    DetectorConfig,
    visual=st.builds(Component, st.sampled_from(["tiny", "dinov2"]), st.just({"lora_rank": None})),
    audio=st.none() | st.builds(Component, st.just("wavlm")),
    alignment=st.sampled_from(["hga", "global_pool"]),
    merge=st.sampled_from(["flatten", "mean", "attention"]),
    d_model=st.integers(1, 999),
    dropout=st.floats(0, 0.9),
    frames_per_chunk=st.none() | st.integers(1, 99),
    au_names=st.sampled_from([("AU1",), ("AU1", "AU2")]),
)


@given(config=configs)
def test_a_config_survives_json(config):
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_modl": 8}, r"unknown key 'd_modl' in the detector config; did you mean 'd_model'\?"),
        ({"d_model": "8"}, "'d_model' of the detector config must be of type int; got '8'"),
        ({"d_model": True}, "'d_model' of the detector config must be of type int; got True"),
        ({"dropout": "0.1"}, "'dropout' of the detector config must be a number; got '0.1'"),
        ({"dropout": True}, "'dropout' of the detector config must be a number; got True"),
        ({"checkpoint_frames": 1}, "'checkpoint_frames' .* must be of type bool; got 1"),
        ({"merge": "max"}, "'merge' .* must be 'flatten' or 'mean' or 'attention'; got 'max'"),
        ({"au_names": "AU1"}, "'au_names' of the detector config must be a list of strings"),
        ({"audio": {"nam": "wavlm"}}, "unknown key 'nam' in 'audio' .*did you mean 'name'"),
        ({"audio": "wavlm"}, "'audio' of the detector config must be an object; got 'wavlm'"),
        ({"visual": {"name": "tiny", "options": []}}, "'options' of 'visual' .* an object; got"),
        ({"visual": None}, "'visual' of the detector config must be an object; got None"),
        ({"au_names": []}, "`au_names` must be distinct and not empty"),
        ({"au_names": ["AU1", "AU1"]}, "`au_names` must be distinct and not empty"),
        ({"crop_size": 0}, "`crop_size` must be in"),
    ],
)
def test_a_mistake_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig.from_dict(values)


def test_choices_are_checked_when_built_in_python():
    with pytest.raises(ValueError, match="`alignment` must be one of 'hga', 'global_pool'"):
        DetectorConfig(alignment="pool")
    with pytest.raises(ValueError, match="`fusion` must be one of"):
        DetectorConfig(fusion="nearest")


def test_unknown_names_and_options_are_named():
    tiny = DetectorConfig(visual=Component("tiny"), audio=None, crop_size=64)
    with pytest.raises(UnknownComponentError, match=r"no visual encoder named 'tny'; did you mean"):
        build_detector(dataclasses.replace(tiny, visual=Component("tny")))
    with pytest.raises(UnknownComponentError, match=r"no temporal model named 'lstm'"):
        build_detector(dataclasses.replace(tiny, temporal=Component("lstm")))
    with pytest.raises(TypeError, match=r"takes no option 'hidden'"):
        build_detector(dataclasses.replace(tiny, visual=Component("tiny", {"hidden": 3})))
    with pytest.raises(ValueError, match="`crop_size` must be a multiple of the patch size 8"):
        build_detector(dataclasses.replace(tiny, crop_size=60))


LORA = ("lora_rank", "lora_alpha", "lora_layers", "normalize", "attention", "revision")
SPEECH = ("d_bottleneck", "lora_rank", "lora_alpha", "lora_place", "mix_layers", "attention",
          "normalize_layers", "max_chunk", "chunk_margin", "revision")  # fmt: skip
STORED = {
    "dinov2": ("name", "pretrained", *LORA),
    "vit": ("name", "pretrained", "freeze_backbone", *LORA),
    "hf_vision": ("name", "model_class", "freeze_backbone", "mean", "std", *LORA),
    "wavlm": ("name", "pretrained", *SPEECH),
    "hf_speech": ("name", "model_class", "normalize_waveform", *SPEECH),
    "whisper": ("name", "pretrained", "lora_rank", "lora_alpha", "chunk_margin", "attention",
                "revision"),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_options_of_stored_configs_stay_accepted(name):
    """Checkpoints say by these words how their encoders were built."""
    registry = VISUAL_ENCODERS if name in VISUAL_ENCODERS else AUDIO_ENCODERS
    registry.check_options(name, STORED[name])
    with pytest.raises(TypeError, match=rf"{name!r} takes no option 'hue'\. It takes: name, "):
        registry.check_options(name, ["hue"])


def test_the_paper_is_the_default():
    """ViT-L with LoRA, WavLM-Large with adapters, HGA of width 768: about 18 M learn, of 638 M."""
    config = DetectorConfig(
        visual=Component("dinov2", {"pretrained": False}),
        audio=Component("wavlm", {"pretrained": False}),
    )
    with torch.device("meta"):
        detector = build_detector(config)
    assert detector.config is config
    assert (config.num_heads, config.d_region, config.crop_size) == (8, 768, 224)
    assert count_parameters(detector.visual_encoder)[0] == 786_432
    assert count_parameters(detector.audio_encoder)[0] == 3_171_865
    trainable, total = count_parameters(detector)
    assert 15e6 < trainable < 22e6
    assert 630e6 < total < 645e6
