"""Key masks: a token that is left out might as well not be there, whatever it holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.region_attention import region_attention

IMPLEMENTATIONS = ("folded", "sdpa")


def arguments(batch=3, m=4, p=9, d=8, e=6):
    shapes = ((batch, m, d), (batch, p, e), (d, e), (d, e), (d,))
    return [(torch.randn(s, dtype=torch.float64) + 0.3).requires_grad_() for s in shapes]


def run(args, implementation, mask=None, return_attention=True):
    return region_attention(
        *args,
        num_heads=2,
        mask=mask,
        implementation=implementation,
        return_attention=return_attention,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("return_attention", [False, True])
@given(kept=st.sets(st.integers(0, 8), min_size=1))
def test_masking_equals_removing(implementation, return_attention, kept):
    args, kept = arguments(batch=1), sorted(kept)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, kept] = True
    out = run(args, implementation, mask, return_attention)
    fewer = run([args[0], args[1][:, kept], *args[2:]], implementation)
    assert_close(out.context, fewer.context, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(out.context)
    got = torch.autograd.grad((out.context * direction).sum(), args)
    wanted = torch.autograd.grad((fewer.context * direction).sum(), args)
    assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    if return_attention:
        assert_close(out.attention[..., kept], fewer.attention, rtol=1e-12, atol=1e-12)
        assert (out.attention.masked_fill(mask[:, None, None], 0) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("return_attention", [False, True])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_junk_under_the_mask_reaches_neither_values_nor_gradients(
    implementation, return_attention, junk
):
    mask = torch.rand(3, 9) > 0.4
    mask[1] = False  # a frame that has no usable token at all
    results = []
    args = arguments()
    for filling in (0.0, junk):
        tokens = args[1].detach().masked_fill(~mask[..., None], filling).requires_grad_()
        leaves = [args[0], tokens, *args[2:]]
        out = run(leaves, implementation, mask, return_attention)
        loss = out.context.square().sum()
        if return_attention:
            loss = loss + out.attention.square().sum()
        results.append((out.context, *torch.autograd.grad(loss, leaves)))
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(torch.isfinite(result).all() for result in results[1])
    assert (results[1][2][~mask] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("return_attention", [False, True])
def test_a_frame_without_tokens_gets_the_value_bias(implementation, return_attention):
    args = arguments()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    out = run(args, implementation, mask, return_attention)
    assert_close(out.context[1], args[4].expand(4, 8))
    assert_close(out.context[0], run(args, implementation).context[0])
    if return_attention:
        assert (out.attention[1] == 0).all()
    gradients = torch.autograd.grad(out.context[1].sum(), args[:4])
    assert all((gradient == 0).all() for gradient in gradients)


def test_first_and_second_derivatives_with_a_mask():
    mask = torch.tensor([[True, False, True], [False, False, False]])

    def folded(*args):
        return tuple(run(args, "folded", mask))

    args = arguments(batch=2, m=2, p=3, d=4, e=3)
    assert torch.autograd.gradcheck(folded, args)
    assert torch.autograd.gradgradcheck(folded, args)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_with_a_mask(implementation):
    args, mask = arguments(), torch.rand(3, 9) > 0.4

    def masked(mask, *args):
        return run(args, implementation, mask, return_attention=False).context

    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    assert_close(compiled(mask, *args), masked(mask, *args))
    got = torch.autograd.grad(compiled(mask, *args).square().sum(), args)
    assert_close(got, torch.autograd.grad(masked(mask, *args).square().sum(), args))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_with_a_mask(implementation):
    args = [argument.float().detach().requires_grad_() for argument in arguments()]
    mask = torch.rand(3, 9) > 0.4
    mask[1] = False
    with torch.autocast("cpu", torch.bfloat16):
        low = run(args, implementation, mask)
    exact = run(args, implementation, mask)
    assert (low.context - exact.context).norm() / exact.context.norm() < 0.02
    low.context.float().sum().backward()
    assert all(torch.isfinite(argument.grad).all() for argument in args)


@pytest.mark.parametrize(
    ("mask", "error", "sentence"),
    [
        (torch.ones(3, 9), TypeError, "`mask` must be a bool tensor, True where .* torch.float32"),
        (torch.ones(3, 8, dtype=torch.bool), ValueError, "axis `p` is 9 in `tokens` but 8 in"),
        (
            torch.ones(2, 9, dtype=torch.bool),
            ValueError,
            r"`mask` must have one value for each of the tokens, .3, 9.; got .2, 9.",
        ),
    ],
)
def test_wrong_masks_are_refused(mask, error, sentence):
    with pytest.raises(error, match=sentence):
        run(arguments(), "auto", mask)
