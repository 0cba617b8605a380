"""Every trainable parameter is in one group, with the right rate and decay."""

import pytest
import torch
from torch import nn

from mmau.models import Component, DetectorConfig, build_detector
from mmau.training import parameter_groups


@pytest.fixture(scope="module")
def detector():
    return build_detector(
        DetectorConfig(
            visual=Component("tiny", {"num_layers": 1, "lora_rank": 2}),
            audio=Component("tiny_wavlm", {"freeze": True, "d_bottleneck": 4, "num_layers": 1}),
            d_region=16,
            num_heads=4,
            d_model=16,
            d_audio=8,
            crop_size=64,
        )
    )


def test_each_trainable_parameter_is_in_one_group(detector):
    groups = parameter_groups(detector)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in detector.parameters() if p.requires_grad}
    torch.optim.AdamW(groups)


def test_rates_and_decay_follow_the_paper(detector):
    rows = {g["name"]: (g["lr"], g["weight_decay"]) for g in parameter_groups(detector)}
    assert rows == {
        "new": (2e-4, 1e-4),
        "new, no decay": (2e-4, 0.0),
        "adapters": (1e-5, 1e-4),
        "adapters, no decay": (1e-5, 0.0),
    }


def group_of(groups, parameter):
    (name,) = [g["name"] for g in groups if any(p is parameter for p in g["params"])]
    return name


def test_where_parameters_go(detector):
    groups = parameter_groups(detector)
    ssm = detector.temporal.layers[0].ssm
    kept = [ssm.A_log, ssm.selection.delta_bias]
    assert ssm.A_log.ndim == 2  # only its name tells it from a matrix
    assert {group_of(groups, p) for p in kept} == {"new, no decay"}
    head = detector.head.weight
    head._no_weight_decay = True  # as other Mamba libraries mark theirs
    assert group_of(parameter_groups(detector), head) == "new, no decay"
    del head._no_weight_decay
    assert group_of(groups, detector.head.weight) == "new"
    assert group_of(groups, detector.head.bias) == "new, no decay"
    assert group_of(groups, detector.region_norm.weight) == "new, no decay"
    assert group_of(groups, detector.no_face) == "new, no decay"
    assert group_of(groups, detector.audio_encoder.adapters[0].up.weight) == "adapters"
    lora = [p for p in detector.visual_encoder.parameters() if p.requires_grad]
    assert {group_of(groups, p) for p in lora} == {"adapters"}


def test_encoders_trained_from_scratch_learn_as_new(detector):
    names = {group["name"] for group in parameter_groups(detector, adapters_in=())}
    assert names == {"new", "new, no decay"}


def test_a_detector_without_sound_has_the_same_groups():
    silent = DetectorConfig(visual=Component("tiny"), audio=None, d_model=16, crop_size=64)
    assert len(parameter_groups(build_detector(silent))) == 4


def test_errors():
    with pytest.raises(ValueError, match=r"names 'audio_encoder', which Linear does not have"):
        parameter_groups(nn.Linear(2, 2), adapters_in=["audio_encoder"])
    with pytest.raises(ValueError, match="has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), adapters_in=())
    for option in ("lr", "lr_adapters", "weight_decay"):
        with pytest.raises(ValueError, match=f"`{option}` must be in"):
            parameter_groups(nn.Linear(2, 2), adapters_in=(), **{option: -1.0})
