"""HGA is what section 3.2 says, term by term, against `nn.MultiheadAttention`."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mmau.modules.hga import HGA


def random_weights(*shape):
    """Means over random sets of patches; every region has at least one."""
    marked = torch.rand(shape) > 0.7
    marked[..., 0] = True
    return marked.double() / marked.sum(-1, keepdim=True)


def paper(hga, mha, tokens, weights, ignored=None):
    """The equations, with a concatenation and one matrix."""
    local = weights @ tokens
    used = torch.ones(tokens.shape[:2]).double() if ignored is None else (~ignored).double()
    overall = (used / used.sum(1, keepdim=True)).unsqueeze(1) @ tokens
    overall = overall.expand_as(local)
    attended, attention = mha(
        local, tokens, tokens, key_padding_mask=ignored, average_attn_weights=False
    )
    first = torch.cat(
        (hga.hidden_attended.weight, hga.hidden_local.weight, hga.hidden_overall.weight), 1
    )
    hidden = F.linear(torch.cat((attended, local, overall), -1), first, hga.hidden_attended.bias)
    return F.linear(F.gelu(hidden), hga.to_token.weight, hga.to_token.bias), attention


@pytest.mark.parametrize("attention", ["folded", "sdpa", "auto"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_multihead_attention(attention, bias, masked):
    mha = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True).double()
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.normal_(0.1, 0.4)
    hga = HGA.from_multihead_attention(mha, d_hidden=20)
    hga.attention = attention
    tokens = (torch.randn(3, 16, 24, dtype=torch.float64) + 0.5).requires_grad_()
    weights, ignored = random_weights(3, 5, 16), None
    if masked:
        ignored = torch.rand(3, 16) > 0.6
        ignored[:, 0] = False  # `nn.MultiheadAttention` has no answer to a row without keys
        weights = weights * ~ignored[:, None]
        weights = weights / weights.sum(-1, keepdim=True)

    mask = None if ignored is None else ~ignored
    out = hga(tokens, weights, mask=mask, return_attention=True)
    expected, maps = paper(hga, mha, tokens, weights, ignored)
    assert_close(out.tokens, expected, rtol=0, atol=1e-12)
    assert_close(out.attention, maps, rtol=0, atol=1e-12)

    direction = torch.randn_like(expected)
    pairs = [(tokens, tokens), (hga.to_output.weight, mha.out_proj.weight)]
    if bias:
        pairs.append((hga.to_output.bias, mha.out_proj.bias))
    got = torch.autograd.grad(
        (out.tokens * direction).sum(),
        [a for a, _ in pairs] + [hga.to_query.weight, hga.to_key.weight, hga.to_value.weight],
    )
    *wanted, stacked = torch.autograd.grad(
        (expected * direction).sum(), [b for _, b in pairs] + [mha.in_proj_weight]
    )
    for g, w in zip(got, [*wanted, *stacked.chunk(3)], strict=True):
        assert (g - w).abs().max() <= 1e-12 * w.abs().max()


@pytest.mark.parametrize(("d_visual", "d_model"), [(12, 8), (8, 12)])
def test_implementations_agree_when_the_widths_differ(d_visual, d_model):
    hga = HGA(d_visual, d_model, 4, d_hidden=10).double()
    tokens, weights = torch.randn(2, 3, 9, d_visual).double(), random_weights(2, 3, 5, 9)
    results = []
    for attention in ("folded", "sdpa"):
        hga.attention = attention
        out = hga(tokens, weights).tokens
        results.append((out, torch.autograd.grad(out.square().sum(), list(hga.parameters()))))
    assert results[0][0].shape == (2, 3, 5, d_model)
    assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_masked_patches_have_no_influence_and_get_no_gradient():
    hga, weights = HGA(8, 8, 2).double(), random_weights(2, 5, 9)
    mask = torch.rand(2, 9) > 0.4
    mask[1] = False
    tokens = torch.randn(2, 9, 8, dtype=torch.float64)
    results = []
    for junk in (0.0, float("nan")):
        given = tokens.masked_fill(~mask[..., None], junk).requires_grad_()
        out = hga(given, weights, mask=mask, return_attention=True)
        loss = out.tokens.square().sum() + out.attention.square().sum()
        results.append((*out, *torch.autograd.grad(loss, [given, *hga.parameters()])))
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(torch.isfinite(result).all() for result in results[1])
    assert (results[1][2][~mask] == 0).all()
    assert (results[1][2][0][mask[0]] != 0).all()


def test_a_region_whose_patches_are_all_masked_is_the_overall_mean():
    hga, tokens = HGA(8, 8, 2), torch.randn(9, 8)
    mask = torch.arange(9) > 1
    weights = torch.zeros(2, 9)
    weights[0, :2], weights[1, 2:] = 0.5, 1 / 7
    out = hga(tokens, weights, mask=mask).tokens
    assert_close(out[0], out[1])
    assert_close(out[0], hga(tokens[2:], torch.full((1, 7), 1 / 7)).tokens[0])


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_leading_axes_are_free(leading, masked):
    hga, tokens = HGA(8, 8, 2), torch.randn(*leading, 6, 8, requires_grad=True)
    weights = torch.full((*leading, 5, 6), 1 / 6)
    mask = torch.ones(*leading, 6, dtype=torch.bool) if masked else None
    out = hga(tokens, weights, mask=mask, return_attention=True)
    assert out.tokens.shape == (*leading, 5, 8)
    assert out.attention.shape == (*leading, 2, 5, 6)
    assert out.attention_maps((2, 3)).shape == (*leading, 2, 5, 2, 3)
    out.tokens.sum().backward()
    assert tokens.grad.shape == tokens.shape


def test_maps_need_the_attention_and_the_right_grid():
    hga, tokens, weights = HGA(8, 8, 2), torch.randn(6, 8), random_weights(5, 6).float()
    out = hga(tokens, weights, return_attention=True)
    assert_close(out.attention_maps((2, 3))[1, 4, 1, 2], out.attention[1, 4, 5])
    with pytest.raises(ValueError, match="`attention` covers 6 patches, but a grid of 2 rows"):
        out.attention_maps((2, 4))
    with pytest.raises(ValueError, match="call `HGA` with `return_attention=True`"):
        hga(tokens, weights).attention_maps((2, 3))


def test_gradients_of_tokens_and_pooling_weights_to_the_second_order():
    hga = HGA(4, 4, 2, d_hidden=3).double()
    tokens = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1).requires_grad_()

    def run(tokens, weights):
        return tuple(hga(tokens, weights, return_attention=True))

    assert torch.autograd.gradcheck(run, (tokens, weights))
    assert torch.autograd.gradgradcheck(run, (tokens, weights))
    # Frozen patches, landmarks that learn.
    assert torch.autograd.gradcheck(lambda w: run(tokens.detach(), w), (weights,))


@given(order=st.permutations(range(6)))
def test_permuting_regions_permutes_tokens(order):
    hga, tokens, weights = HGA(8, 8, 2), torch.randn(9, 8), random_weights(6, 9)
    out = hga(tokens, weights, return_attention=True)
    permuted = hga(tokens, weights[list(order)], return_attention=True)
    assert_close(permuted.tokens, out.tokens[list(order)])
    assert_close(permuted.attention, out.attention[:, list(order)])


@given(order=st.permutations(range(9)))
def test_the_order_of_the_patches_does_not_matter(order):
    hga, tokens, weights = HGA(8, 8, 2).double(), torch.randn(9, 8).double(), random_weights(6, 9)
    out = hga(tokens[list(order)], weights[:, list(order)]).tokens
    assert_close(out, hga(tokens, weights).tokens)


def test_frames_do_not_see_each_other():
    hga, tokens, weights = HGA(8, 8, 2), torch.randn(2, 3, 9, 8), random_weights(2, 3, 5, 9)
    before = hga(tokens, weights).tokens
    tokens[1, 2] += 1
    changed = (hga(tokens, weights).tokens != before).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]


def test_every_parameter_learns():
    hga = HGA(12, 8, 2)
    hga(torch.randn(4, 9, 12), random_weights(4, 3, 9)).tokens.square().sum().backward()
    for name, parameter in hga.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name


def test_split_layer_starts_like_the_one_it_stands_for():
    torch.manual_seed(0)
    hga, one = HGA(256, 128, 8, d_hidden=256), nn.Linear(128 + 2 * 256, 256)
    for layer in (hga.hidden_attended, hga.hidden_local, hga.hidden_overall):
        # The standard deviation of 32768 uniform draws is known to about half a percent.
        assert_close(layer.weight.std(), one.weight.std(), rtol=0.03, atol=0)
        assert layer.weight.abs().max() <= 1 / (128 + 2 * 256) ** 0.5


def test_state_dict_has_separate_projections_and_round_trips():
    hga, other = HGA(12, 8, 2), HGA(12, 8, 2)
    names = set(hga.state_dict())
    assert {"to_query.weight", "to_key.weight", "to_value.weight", "to_output.weight"} <= names
    assert "to_key.bias" not in names
    other.load_state_dict(hga.state_dict())
    tokens, weights = torch.randn(9, 12), random_weights(3, 9)
    assert torch.equal(hga(tokens, weights).tokens, other(tokens, weights).tokens)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_graph_break(frozen):
    hga = HGA(12, 8, 2)
    tokens, weights = torch.randn(2, 9, 12), random_weights(2, 3, 9).float()
    leaves = [*([] if frozen else [tokens.requires_grad_()]), *hga.parameters()]
    compiled = torch.compile(hga, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens, weights).tokens, hga(tokens, weights).tokens)
    got = torch.autograd.grad(compiled(tokens, weights).tokens.square().sum(), leaves)
    wanted = torch.autograd.grad(hga(tokens, weights).tokens.square().sum(), leaves)
    assert_close(got, wanted)


def test_exports_with_any_number_of_frames():
    hga = HGA(12, 8, 2).eval()
    sizes = {"patch_tokens": {0: torch.export.Dim("frames")}, "weights": {0: torch.export.Dim.AUTO}}
    given = torch.randn(4, 9, 12), random_weights(4, 3, 9).float()
    exported = torch.export.export(hga, given, dynamic_shapes=sizes).module()
    other = torch.randn(7, 9, 12), random_weights(7, 3, 9).float()
    assert_close(exported(*other).tokens, hga(*other).tokens)


def test_autocast_gives_finite_gradients():
    hga, weights = HGA(32, 32, 4), random_weights(2, 3, 16).float()
    tokens = torch.randn(2, 16, 32, requires_grad=True)
    exact = hga(tokens, weights).tokens
    with torch.autocast("cpu", torch.bfloat16):
        low = hga(tokens, weights).tokens
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() < 0.03
    low.float().sum().backward()
    assert torch.isfinite(tokens.grad).all()


def test_repr_says_what_auto_means_and_what_it_chose():
    assert "auto: folded up to 109 regions of a large grid'" in repr(HGA(768, 768, 8))
    hga = HGA(8, 8, 2)
    for regions in (1, 90, 1):
        hga(torch.randn(9, 8), torch.full((regions, 9), 1 / 9))
    expected = "; folded for 1 regions of 9 patches; sdpa for 90 regions of 9 patches'"
    assert expected in repr(hga)
    assert repr(hga) == repr(pickle.loads(pickle.dumps(hga)))
    assert "attention='sdpa'" in repr(HGA(8, 8, 2, attention="sdpa"))


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((8, 10, 4), {}, "`num_heads` must divide `d_model`; got 4 heads and a width of 10"),
        ((8, 8, 0), {}, "`num_heads` must divide `d_model`; got 0 heads"),
        ((0, 8, 2), {}, "`d_visual` must be in .1, inf.; got 0"),
        ((8, 0, 2), {}, "`d_model` must be in .1, inf.; got 0"),
        ((8, 8, 2), {"d_hidden": 0}, "`d_hidden` must be in .1, inf.; got 0"),
        ((8, 8, 2), {"attention": "fold"}, "`attention` must be one of 'auto', .* got 'fold'"),
    ],
)
def test_wrong_options_are_refused(args, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        HGA(*args, **options)


def test_wrong_input_is_refused():
    hga, weights = HGA(8, 8, 2), torch.full((2, 3, 256), 1 / 256)
    with pytest.raises(
        ValueError, match=r"257 tokens, .* 256 patches; .* most likely the CLS token"
    ):
        hga(torch.zeros(2, 257, 8), weights)
    with pytest.raises(ValueError, match=r"261 tokens, .* the 5 in excess .* register tokens"):
        hga(torch.zeros(2, 261, 8), weights)
    with pytest.raises(ValueError, match="axis `d_visual` of `patch_tokens` must be 8"):
        hga(torch.zeros(2, 256, 9), weights)
    with pytest.raises(ValueError, match="must have the same leading axes"):
        hga(torch.zeros(3, 256, 8), weights)
    with pytest.raises(TypeError, match="`mask` must be a bool tensor"):
        hga(torch.zeros(2, 256, 8), weights, mask=torch.ones(2, 256))
    with pytest.raises(
        ValueError, match=r"`mask` must have one value for each patch, .2, 256.; got .1, 256."
    ):
        hga(torch.zeros(2, 256, 8), weights, mask=torch.ones(1, 256, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kdim": 6, "vdim": 6}, "as wide as its queries; got 6 and 6 against 8"),
        ({"add_bias_kv": True}, "must not use `add_bias_kv` or `add_zero_attn`"),
        ({"add_zero_attn": True}, "must not use `add_bias_kv` or `add_zero_attn`"),
    ],
)
def test_attention_without_a_counterpart_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        HGA.from_multihead_attention(nn.MultiheadAttention(8, 2, **options))
