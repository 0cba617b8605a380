"""Folded attention equals attention with projected keys and values, gradients included."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.region_attention import choose_region_attention, region_attention

SIZES = st.integers(1, 6)
# By import: the function of the same name hides the package from attribute look-up.
FOLDED = importlib.import_module("mmau.functional.region_attention")


def in_chunks(numbers):
    """Let the folded attention take few frames at a time: one, if `numbers` is 1."""
    return mock.patch.object(FOLDED, "CPU_CHUNK", numbers)


def arguments(batch=2, m=3, p=9, d=8, e=12, dtype=torch.float64):
    shapes = ((batch, m, d), (batch, p, e), (d, e), (d, e), (d,))
    # Off zero, so that another definition shows.
    return [(torch.randn(s, dtype=dtype) + 0.3).requires_grad_() for s in shapes]


def plain(queries, tokens, key_weight, value_weight, value_bias, num_heads):
    """Attention head by head, from the definition."""
    heads = []
    for rows in torch.arange(len(key_weight)).chunk(num_heads):
        key, value = tokens @ key_weight[rows].T, tokens @ value_weight[rows].T + value_bias[rows]
        scores = queries[..., rows] @ key.transpose(-1, -2) / len(rows) ** 0.5
        heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, -1)


@pytest.mark.parametrize("implementation", ["folded", "sdpa", "auto"])
@pytest.mark.parametrize("return_attention", [False, True])
@given(batch=SIZES, m=SIZES, p=SIZES, e=SIZES, num_heads=SIZES, width=SIZES)
def test_equals_the_definition(implementation, return_attention, batch, m, p, e, num_heads, width):
    args = arguments(batch, m, p, num_heads * width, e)
    out = region_attention(
        *args,
        num_heads=num_heads,
        implementation=implementation,
        return_attention=return_attention,
    )
    expected = plain(*args, num_heads)
    assert_close(out.context, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((out.context * weight).sum(), args)
    wanted = torch.autograd.grad((expected * weight).sum(), args)
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w, rtol=1e-12, atol=1e-11)
    if return_attention:
        assert out.attention.shape == (batch, num_heads, m, p)
        assert_close(out.attention.sum(-1), torch.ones(batch, num_heads, m, dtype=torch.float64))
    else:
        assert out.attention is None


def test_first_and_second_derivatives_through_context_and_attention():
    args = arguments(batch=2, m=2, p=3, d=4, e=3)

    def run(*args):
        return tuple(
            region_attention(*args, num_heads=2, implementation="folded", return_attention=True)
        )

    for numbers in (1, 2**19):
        with in_chunks(numbers):
            assert torch.autograd.gradcheck(run, args)
            assert torch.autograd.gradgradcheck(run, args)
            # `gradgradcheck` overlooks a gradient that is missing altogether.
            loss = sum(out.square().sum() for out in run(*args))
            first = torch.autograd.grad(loss, args, create_graph=True)
            assert_close(first, torch.autograd.grad(loss, args), rtol=1e-12, atol=1e-12)


# Two frames at a time, so that the last part is shorter; one; all.
@pytest.mark.parametrize("numbers", [2 * 3 * 2 * 12, 1, 2**19])
@pytest.mark.parametrize(
    ("learns", "outputs"),
    [
        *itertools.product([(0, 1, 2, 3), (0, 2, 3), (1,), (2,), (0,)], [(0, 1), (0,), (1,)]),
        ((3,), (0, 1)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_the_batch_change_nothing(numbers, learns, masked, outputs):
    args = [value.detach() for value in arguments(batch=5)[:4]]
    for i in learns:
        args[i].requires_grad_()
    mask = torch.rand(5, 9) > 0.4 if masked else None
    results = []
    for implementation in ("sdpa", "folded"):
        with in_chunks(numbers):
            out = region_attention(
                *args,
                num_heads=2,
                mask=mask,
                implementation=implementation,
                return_attention=True,
            )
            loss = sum((out[i] * (1 + out[i])).sum() for i in outputs)
            wanted = [args[i] for i in learns]
            results.append((*out, *torch.autograd.grad(loss, wanted, allow_unused=True)))
    for folded, projected in zip(results[1], results[0], strict=True):
        if projected is None:
            assert folded is None
        else:
            assert_close(folded, projected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["folded", "sdpa"])
@pytest.mark.parametrize("numbers", [1, 2**19])
def test_any_layout_in_memory(implementation, numbers):
    """Transposed, strided and expanded inputs; the gradient of a sum is expanded, too."""
    queries, tokens, *weights = arguments()
    swapped = [
        x.detach().transpose(-1, -2).contiguous().requires_grad_() for x in (queries, tokens)
    ]
    wide = torch.randn(8, 24, dtype=torch.float64).requires_grad_()
    options = {"num_heads": 2, "implementation": implementation}
    with in_chunks(numbers):
        out = region_attention(
            *(x.transpose(-1, -2) for x in swapped), weights[0], wide[:, ::2], **options
        ).context
        got = torch.autograd.grad(out.sum(), [*swapped, wide])
        one = region_attention(queries, tokens[:1].expand(2, -1, -1), *weights, **options).context
        two = region_attention(queries, tokens[:1].repeat(2, 1, 1), *weights, **options).context
    expected = plain(queries, tokens, weights[0], wide[:, ::2], torch.zeros(8).double(), 2)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.sum(), [queries, tokens, wide])
    for g, w in zip(got, (*(w.transpose(1, 2) for w in wanted[:2]), wanted[2]), strict=True):
        assert_close(g, w, rtol=1e-12, atol=1e-11)
    assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_few_frames_at_a_time_without_gradients():
    args = [value.detach() for value in arguments(batch=5)]
    whole = region_attention(*args, num_heads=2, implementation="folded")
    with in_chunks(1):
        parts = region_attention(*args, num_heads=2, implementation="folded")
    assert_close(parts.context, whole.context, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [1, 2**19])
def test_computing_in_low_precision(dtype, numbers):
    exact = arguments(m=12, p=64, d=32, e=32)
    low = [value.detach().to(dtype).requires_grad_() for value in exact]
    with in_chunks(numbers):
        out = region_attention(*low, num_heads=4, implementation="folded").context
        assert out.dtype == dtype
        got = torch.autograd.grad(out.double().square().sum(), low)
    expected = plain(*exact, 4)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    # About a dozen roundings one after the other.
    tolerance = 12 * torch.finfo(dtype).eps
    assert (out - expected).norm() < tolerance * expected.norm()
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() < tolerance * w.norm()


@pytest.mark.parametrize("only", [0, 1])
def test_gradient_of_one_output_alone(only):
    args = arguments()
    results = []
    for implementation in ("folded", "sdpa"):
        out = region_attention(
            *args, num_heads=2, implementation=implementation, return_attention=True
        )
        loss = out[only].square().sum()
        results.append(torch.autograd.grad(loss, args[:3]))
    for folded, projected in zip(*results, strict=True):
        assert_close(folded, projected, rtol=1e-10, atol=1e-10)


def test_frozen_tokens_get_no_gradient():
    args = arguments()
    args[1] = args[1].detach()
    region_attention(*args, num_heads=2, implementation="folded").context.sum().backward()
    assert args[1].grad is None
    assert args[0].grad.abs().sum() > 0


# Dynamo itself creates an instance of the class when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["folded", "sdpa"])
@pytest.mark.parametrize("return_attention", [False, True])
def test_compiles_without_a_graph_break(implementation, return_attention):
    def run(*args):
        return region_attention(
            *args,
            num_heads=2,
            implementation=implementation,
            return_attention=return_attention,
        ).context

    args = arguments()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), run(*args))
    got = torch.autograd.grad(compiled(*args).square().sum(), args)
    for g, w in zip(got, torch.autograd.grad(run(*args).square().sum(), args), strict=True):
        assert_close(g, w)


@pytest.mark.parametrize("implementation", ["folded", "sdpa"])
def test_autocast_computes_low_and_stays_close(implementation):
    args = arguments(m=12, p=64, d=32, e=32, dtype=torch.float32)
    exact = region_attention(*args, num_heads=4, implementation=implementation).context
    with torch.autocast("cpu", torch.bfloat16):
        low = region_attention(*args, num_heads=4, implementation=implementation).context
    assert low.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a softmax in bfloat16 would be an order of magnitude further off.
    assert (low - exact).norm() / exact.norm() < 0.02
    for grad, argument in zip(torch.autograd.grad(low.float().sum(), args), args, strict=True):
        assert grad.dtype == argument.dtype
        assert torch.isfinite(grad).all()


def test_softmax_under_autocast_is_float32(monkeypatch):
    seen = []
    softmax = torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda *a, **k: seen.append(k["dtype"]) or softmax(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        region_attention(*arguments(dtype=torch.float32), num_heads=2, implementation="folded")
    assert seen == [torch.float32]


def test_scores_far_from_zero_stay_finite():
    args = [1e3 * argument for argument in arguments(dtype=torch.float32)]
    out = region_attention(*args, num_heads=2, implementation="folded")
    assert torch.isfinite(out.context).all()


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_leading_axes_are_free(leading):
    queries, tokens = torch.randn(*leading, 3, 8), torch.randn(*leading, 5, 6)
    weight = torch.randn(8, 6)
    out = region_attention(queries, tokens, weight, weight, num_heads=2, return_attention=True)
    assert out.context.shape == (*leading, 3, 8)
    assert out.attention.shape == (*leading, 2, 3, 5)


def test_the_choice_follows_the_operation_count():
    for m in range(1, 200, 7):
        folded = 2 * m * 1024 * 768 + 2 * m * 8 * 256 * 1024
        projected = 2 * 256 * 768 * 1024 + 2 * m * 256 * 768
        expected = "folded" if folded <= projected else "sdpa"
        assert choose_region_attention(m, 256, 768, 1024, 8) == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_heads": 3}, "`num_heads` must divide .* got 3 heads and a width of 8"),
        ({"num_heads": 0}, "`num_heads` must divide"),
        (
            {"implementation": "fold"},
            "must be one of 'auto', 'folded', 'sdpa', 'flash'; got 'fold'",
        ),
        ({"tokens": torch.zeros(3, 9, 12)}, "same leading axes; got .2, 3, 8. and .3, 9, 12."),
        ({"key_weight": torch.zeros(8, 11)}, "axis `e`"),
        ({"value_bias": torch.zeros(7)}, "axis `d`"),
    ],
)
def test_wrong_input_is_refused(change, sentence):
    names = ("queries", "tokens", "key_weight", "value_weight", "value_bias")
    given = {**dict(zip(names, arguments(), strict=True)), "num_heads": 2, **change}
    with pytest.raises(ValueError, match=sentence):
        region_attention(**given)
