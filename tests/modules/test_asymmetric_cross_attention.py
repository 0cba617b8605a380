"""Audio retrieval: time decides, masks hide, silence is a finite constant."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.modules.asymmetric_cross_attention import AsymmetricCrossAttention


def build(**options):
    attend = AsymmetricCrossAttention(8, 6, 2, **options).double()
    with torch.no_grad():
        for parameter in attend.parameters():
            parameter.normal_(0.1, 0.5)
    return attend


def clip(batch=2, t=5, s=12):
    visual = torch.randn(batch, t, 8, dtype=torch.float64)
    audio = torch.randn(batch, s, 6, dtype=torch.float64)
    visual_time = torch.linspace(0, 1, t, dtype=torch.float64).expand(batch, t)
    audio_time = torch.linspace(-0.2, 1.4, s, dtype=torch.float64).expand(batch, s)
    return visual, audio, visual_time, audio_time


def plain(attend, visual, audio, visual_time, audio_time, mask):
    """One frame and one head at a time."""
    out = torch.zeros_like(visual)
    for b in range(len(visual)):
        for t in range(visual.shape[1]):
            context = []
            for h in range(attend.num_heads):
                rows = slice(4 * h, 4 * h + 4)
                query = attend.to_query(visual[b, t])[rows]
                scores, values = [query @ attend.null_key[h, 0] / 2], [attend.null_value[h, 0]]
                for s in range(audio.shape[1]):
                    gap = abs(visual_time[b, t] - audio_time[b, s])
                    if gap <= attend.window and mask[b, s]:
                        slope = 4 * 2 ** (-8 * h / attend.num_heads)
                        scores.append(query @ attend.to_key(audio[b, s])[rows] / 2 - slope * gap)
                        values.append(attend.to_value(audio[b, s])[rows])
                share = torch.stack(scores).softmax(0)
                context.append(share @ torch.stack(values))
            out[b, t] = attend.to_output(torch.cat(context))
    return out


@pytest.mark.parametrize("window", [0.05, 0.3, 10.0])
def test_equals_the_loop(window):
    attend, inputs = build(window=window), clip()
    mask = torch.rand(2, 12) > 0.3
    # The bias is float32.
    expected = plain(attend, *inputs, mask)
    assert_close(attend(*inputs, mask), expected, rtol=1e-6, atol=1e-6)


@given(shift=st.floats(-1e5, 1e5))
def test_only_time_differences_matter(shift):
    attend, (visual, audio, visual_time, audio_time) = build(window=0.33), clip()
    moved = attend(visual, audio, visual_time + shift, audio_time + shift)
    assert_close(moved, attend(visual, audio, visual_time, audio_time), rtol=1e-6, atol=1e-6)


@given(order=st.permutations(range(12)))
def test_the_order_of_the_audio_does_not_matter(order):
    attend, (visual, audio, visual_time, audio_time) = build(), clip()
    index = list(order)
    assert_close(
        attend(visual, audio[:, index], visual_time, audio_time[:, index]),
        attend(visual, audio, visual_time, audio_time),
    )


def test_sound_outside_the_window_is_not_heard():
    attend, (visual, audio, visual_time, audio_time) = build(window=0.25), clip()
    before = attend(visual, audio, visual_time, audio_time)
    late = audio.clone()
    late[:, -1] += 5.0  # at 1.4 s, 0.4 s after the last frame
    assert torch.equal(attend(visual, late, visual_time, audio_time), before)
    late[:, 0] += 5.0  # at -0.2 s, heard by the first frame only
    changed = (attend(visual, late, visual_time, audio_time) != before).any(-1)
    assert changed.tolist() == [[True, False, False, False, False]] * 2


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_audio_reaches_neither_result_nor_gradient(poison):
    attend, (visual, audio, visual_time, audio_time) = build(), clip()
    mask = torch.rand(2, 12) > 0.4
    mask[1] = False
    results = []
    for filling in (0.0, poison):
        given = torch.where(mask[..., None], audio, filling).requires_grad_()
        times = torch.where(mask, audio_time, filling)
        out = attend(visual, given, visual_time, times, mask)
        grads = torch.autograd.grad(out.square().sum(), [given, *attend.parameters()])
        assert not grads[0][~mask].any()
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_no_audio_is_a_finite_constant_however_it_is_said():
    attend, (visual, audio, visual_time, audio_time) = build(), clip()
    silence = [
        attend(visual, None, visual_time, None),
        attend(visual, audio[:, :0], visual_time, audio_time[:, :0]),
        attend(visual, audio, visual_time, audio_time, torch.zeros(2, 12, dtype=torch.bool)),
        attend(visual, audio, visual_time, audio_time + 100),
    ]
    for out in silence:
        assert_close(out, silence[0][:1, :1].expand_as(out))
        assert torch.isfinite(out).all()


def test_every_parameter_learns():
    attend = build()
    attend(*clip()).square().sum().backward()
    for name, parameter in attend.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


def test_slopes_are_fixed_and_leave_the_state_dict_alone():
    attend = AsymmetricCrossAttention(16, 8)
    assert_close(attend.slopes.flatten(), 4.0 * 0.5 ** torch.arange(8))
    assert "slopes" not in attend.state_dict()
    assert not any(parameter.shape == attend.slopes.shape for parameter in attend.parameters())


def test_autocast_and_compile():
    attend = build().float()
    inputs = [value.float() for value in clip()]
    exact = attend(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = attend(*inputs)
    assert (low - exact).norm() / exact.norm() < 0.03
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), exact)


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((8, 6, 3), {}, "`num_heads` must divide `d_model`; got 3 heads and a width of 8"),
        ((8, 6, 2), {"window": 0.0}, "`window` must be in .0, inf.; got 0.0"),
        ((0, 6, 2), {}, "`d_model` must be in"),
        ((8, 0, 2), {}, "`d_audio` must be in"),
    ],
)
def test_wrong_options_are_refused(args, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AsymmetricCrossAttention(*args, **options)


def test_wrong_input_is_refused():
    attend, (visual, audio, visual_time, audio_time) = build(), clip()
    with pytest.raises(ValueError, match="go together; `audio_time` is missing"):
        attend(visual, audio, visual_time, None)
    with pytest.raises(ValueError, match="go together; `audio` is missing"):
        attend(visual, None, visual_time, audio_time)
    with pytest.raises(TypeError, match="`audio_mask` must be a bool tensor"):
        attend(visual, audio, visual_time, audio_time, torch.ones(2, 12))
    with pytest.raises(TypeError, match="`audio_time` must be float32 or float64 seconds"):
        attend(visual, audio, visual_time, audio_time.half())
    with pytest.raises(ValueError, match="axis `s` is 12 in `audio` but 11"):
        attend(visual, audio, visual_time, audio_time[:, 1:])
    with pytest.raises(ValueError, match="axis `a` of `audio` must be 6"):
        attend(visual, audio[..., 1:], visual_time, audio_time)
