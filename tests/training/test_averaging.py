"""The mean of the weights, of the named parts and of no other."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.training import SubmoduleAverage


@pytest.fixture
def model():
    return nn.ModuleDict(
        {"encoder": nn.Linear(2, 2), "temporal": nn.Linear(2, 2), "head": nn.Linear(2, 1)}
    )


def walk(model, average, steps=4):
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update()
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return seen


def mean_of(seen, name):
    return torch.stack([weights[name] for weights in seen]).mean(0)


def test_the_mean_takes_the_place_of_the_named_parts_only(model):
    average = SubmoduleAverage(model, ["temporal", "head"])
    seen = walk(model, average)
    last = seen[-1]
    assert average.num_updates == 4
    with average.swapped_in():
        for name, parameter in model.named_parameters():
            expected = last[name] if name.startswith("encoder") else mean_of(seen, name)
            assert_close(parameter.detach(), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), last[name])
    average.apply()
    assert_close(model["head"].weight.detach(), mean_of(seen, "head.weight"))
    assert torch.equal(model["encoder"].weight.detach(), last["encoder.weight"])


def test_weights_come_back_when_the_block_fails(model):
    average = SubmoduleAverage(model, ["head"])
    seen = walk(model, average)
    with pytest.raises(KeyError), average.swapped_in():
        raise KeyError
    assert torch.equal(model["head"].weight.detach(), seen[-1]["head.weight"])


def test_averaging_goes_on_after_a_restart(model):
    whole = SubmoduleAverage(model, ["head"])
    walk(model, whole, 2)
    resumed = SubmoduleAverage(model, ["head"])
    resumed.load_state_dict(whole.state_dict())
    with torch.no_grad():
        model["head"].weight += 1
    whole.update()
    resumed.update()
    assert resumed.num_updates == 3
    with whole.swapped_in():
        expected = model["head"].weight.detach().clone()
    with resumed.swapped_in():
        assert torch.equal(model["head"].weight.detach(), expected)


def test_errors(model):
    with pytest.raises(
        ValueError, match=r"cannot average 'hga': ModuleDict has no such sub-module"
    ):
        SubmoduleAverage(model, ["hga"])
    with pytest.raises(ValueError, match="`names` lists 'head' twice"):
        SubmoduleAverage(model, ["head", "head"])
    nested = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1))})
    with pytest.raises(ValueError, match="it overlaps 'a'"):
        SubmoduleAverage(nested, ["a", "a.0"])
    average = SubmoduleAverage(model, ["head"])
    with pytest.raises(RuntimeError, match="there is no mean yet"):
        average.apply()
    with pytest.raises(RuntimeError, match="there is no mean yet"), average.swapped_in():
        pass
    with pytest.raises(ValueError, match="the saved average is of temporal; expected head"):
        average.load_state_dict(SubmoduleAverage(model, ["temporal"]).state_dict())
