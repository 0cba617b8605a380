"""Adapters start as the identity, learn, and never miss their target silently."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.encoders import AdapterOptions
from mmau.encoders.backbone import (
    BottleneckAdapter,
    LayerMix,
    count_parameters,
    freeze,
    inject_lora,
)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return x + torch.tanh(self.query(x) * self.key(x)) + self.value(x)


def stack(num_layers=12):
    return nn.Sequential(*(Layer() for _ in range(num_layers)))


ROLES = {"query": ("query", "q_proj"), "value": ("value", "v_proj")}


def test_the_bottleneck_starts_as_the_identity_and_does_not_stay_it():
    adapter, x = BottleneckAdapter(6, 2), torch.randn(3, 6)
    assert torch.equal(adapter(x), x)
    nn.init.normal_(adapter.up.weight)
    assert not torch.allclose(adapter(x), x)


def test_an_attached_adapter_corrects_the_output_and_leaves_the_names():
    layer, adapter = nn.Linear(4, 4), BottleneckAdapter(4, 2)
    names = set(layer.state_dict())
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(2, 4)
    plain = layer(x)
    adapter.attach(layer)
    assert_close(layer(x), adapter(plain))
    assert set(layer.state_dict()) == names


def test_a_copied_model_uses_its_own_adapter():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "adapter": BottleneckAdapter(4, 2)})
    model["adapter"].attach(model["layer"])
    copied = copy.deepcopy(model)
    nn.init.normal_(model["adapter"].up.weight)
    x = torch.randn(2, 4)
    assert not torch.allclose(model["layer"](x), copied["layer"](x))


def test_the_mix_starts_as_the_mean_and_one_weight_can_win():
    states = [torch.full((1, 2), float(i)) for i in range(3)]
    mix = LayerMix(3, normalize=False)
    assert_close(mix(states), torch.full((1, 2), 1.0))
    with torch.no_grad():
        mix.weight[2] = 50.0
    assert_close(mix(states), states[2])


def test_a_normalised_mix_does_not_see_the_scale_of_a_layer():
    mix, a, b = LayerMix(2), torch.randn(5, 8), torch.randn(5, 8)
    assert_close(mix([a, b]), mix([1000 * a + 3, b]), rtol=1e-4, atol=1e-4)


def test_an_empty_mix_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        LayerMix(0)([])


def test_lora_is_the_identity_at_first_and_sits_once_in_each_layer():
    model, x = stack(), torch.randn(2, 4)
    before = model(x)
    pairs = inject_lora(model, ROLES, 12, AdapterOptions(lora_rank=2, lora_alpha=4))
    assert_close(model(x), before, rtol=0, atol=0)
    assert len(pairs) == 12 * 2 * 2
    assert {"lora.0.query.down", "lora.11.value.up"} <= set(pairs)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(pairs.values())


def test_lora_in_the_last_layers_only():
    model = stack()
    pairs = inject_lora(model, ROLES, 12, AdapterOptions(lora_rank=2, lora_layers=2))
    assert {name.split(".")[1] for name in pairs} == {"10", "11"}
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"10", "11"}


def test_the_scale_of_lora_is_alpha_over_rank():
    model = stack(1)
    x = torch.randn(2, 4)
    before = model[0].query(x)
    pairs = inject_lora(model, ROLES, 1, AdapterOptions(lora_rank=2, lora_alpha=6))
    live = dict(model.named_parameters())
    down, up = live[pairs["lora.0.query.down"]], live[pairs["lora.0.query.up"]]
    nn.init.normal_(up)
    assert_close(model[0].query(x), before + 3.0 * x @ down.T @ up.T)


def test_a_projection_by_another_name_is_an_error_not_a_no_op():
    with pytest.raises(RuntimeError, match=r"one gate projection in each of 3 layers.*found 0"):
        inject_lora(stack(3), {"gate": ("gate",)}, 3, AdapterOptions(lora_rank=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "`lora_rank` must be in"),
        ({"lora_layers": 0}, r"`lora_layers` must be in \[1, inf\)"),
        ({"lora_layers": 13}, r"`lora_layers` must be in \[1, 12\]"),
        ({"lora_place": "head"}, "`lora_place` must be one of 'attention', 'feed_forward'"),
        ({"d_bottleneck": 0}, "`d_bottleneck` must be in"),
        ({"freeze_backbone": False}, "LoRA next to a trainable backbone has no effect"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        inject_lora(stack(), ROLES, 12, AdapterOptions(**{"lora_rank": 1, **options}))


def test_a_bottleneck_needs_a_width():
    with pytest.raises(ValueError, match="`d_bottleneck` must be in"):
        BottleneckAdapter(4, 0)


def test_freeze_and_count():
    model = nn.Sequential(nn.Linear(3, 2), freeze(nn.Linear(2, 1)))
    assert count_parameters(model) == (8, 11)
    assert not model[1].training
