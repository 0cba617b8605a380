"""Warm-up rises, cosine falls, groups keep their own peaks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmau.training import set_learning_rates, warmup_cosine_factor


@given(warmup=st.integers(0, 30), rest=st.integers(1, 60), end=st.floats(0, 1))
def test_the_shape_of_the_curve(warmup, rest, end):
    total = warmup + rest
    curve = [
        warmup_cosine_factor(s, warmup_steps=warmup, total_steps=total, final_factor=end)
        for s in range(total + 3)
    ]
    assert all(0 < f <= 1 for f in curve[:total]) or end == 0
    assert curve[0] > 0
    assert all(a < b for a, b in itertools.pairwise(curve[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(curve[warmup:]))
    assert curve[warmup] == pytest.approx(1.0)
    assert curve[total:] == pytest.approx([end] * 3)
    middle = warmup_cosine_factor(
        warmup + rest // 2, warmup_steps=warmup, total_steps=total, final_factor=end
    )
    exact = end + (1 - end) * math.cos(math.pi / 2 * (rest // 2) / rest) ** 2
    assert middle == pytest.approx(exact)


def test_the_last_steps_can_stay_at_one_rate():
    curve = [
        warmup_cosine_factor(
            s, warmup_steps=2, total_steps=10, constant_steps=3, constant_factor=0.4
        )
        for s in range(12)
    ]
    plain = [warmup_cosine_factor(s, warmup_steps=2, total_steps=10) for s in range(12)]
    assert curve[:7] == plain[:7]
    assert curve[7:] == [0.4] * 5


def test_groups_keep_their_ratio():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 2e-4}, {"params": [model.bias], "lr": 1e-5}]
    )
    rates = []
    for step in range(21):
        factor = warmup_cosine_factor(step, warmup_steps=4, total_steps=20)
        set_learning_rates(optimizer, factor)
        rates.append([group["lr"] for group in optimizer.param_groups])
    *rates, last = rates
    assert rates[0] == pytest.approx([0.5e-4, 0.25e-5])
    assert max(r[0] for r in rates) == pytest.approx(2e-4)
    assert all(a / b == pytest.approx(20.0) for a, b in rates)
    assert last[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "`total_steps` must be in"),
        ({"warmup_steps": 11}, r"`warmup_steps` must be in \[0, 10\]"),
        ({"constant_steps": 11}, r"`constant_steps` must be in \[0, 10\]"),
        ({"constant_factor": 1.5}, "`constant_factor` must be in"),
        ({"final_factor": 2.0}, "`final_factor` must be in"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine_factor(0, **{"warmup_steps": 0, "total_steps": 10, **arguments})
    with pytest.raises(ValueError, match="`step` must be in"):
        warmup_cosine_factor(-1, warmup_steps=0, total_steps=10)
