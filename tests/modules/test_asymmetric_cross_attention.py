"""Cross-attention to audio: time decides, masks hide, no audio is a finite constant."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.modules.cross_attention import AsymmetricCrossAttention


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
    expected = plain(attend, *inputs, mask)
    for attend.implementation in ("dense", "local", "auto"):
        assert_close(attend(*inputs, mask), expected, rtol=1e-12, atol=1e-12)


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


def test_audio_outside_the_window_has_no_influence():
    attend, (visual, audio, visual_time, audio_time) = build(window=0.25), clip()
    before = attend(visual, audio, visual_time, audio_time)
    late = audio.clone()
    late[:, -1] += 5.0  # at 1.4 s, 0.4 s after the last frame
    assert torch.equal(attend(visual, late, visual_time, audio_time), before)
    late[:, 0] += 5.0  # at -0.2 s, in the window of the first frame only
    changed = (attend(visual, late, visual_time, audio_time) != before).any(-1)
    assert changed.tolist() == [[True, False, False, False, False]] * 2


@pytest.mark.parametrize("implementation", ["dense", "local"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_audio_reaches_neither_result_nor_gradient(poison, implementation):
    attend = build(implementation=implementation)
    visual, audio, visual_time, audio_time = clip()
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


@pytest.mark.parametrize("implementation", ["dense", "local"])
def test_no_audio_is_a_finite_constant_however_it_is_said(implementation):
    attend = build(implementation=implementation)
    visual, audio, visual_time, audio_time = clip()
    silence = [
        attend(visual, None, visual_time, None),
        attend(visual, audio[:, :0], visual_time, audio_time[:, :0]),
        attend(visual, audio, visual_time, audio_time, torch.zeros(2, 12, dtype=torch.bool)),
        attend(visual, audio, visual_time, audio_time + 100),
    ]
    for out in silence:
        assert_close(out, silence[0][:1, :1].expand_as(out))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("frame_rate", [25.0, 29.97])
def test_blocks_equal_all_pairs_on_ragged_clips_with_every_gradient(frame_rate):
    attend = build(window=0.4)
    visual, audio, _, _ = clip(3, 200, 390)
    visual_time = torch.arange(200, dtype=torch.float64).expand(3, 200) / frame_rate
    visual_time = visual_time + 0.01 * torch.rand(3, 200, dtype=torch.float64)
    # A different start, a different end, and a clip without audio.
    audio_time = torch.tensor([[-1.0], [0.3], [0.0]], dtype=torch.float64)
    audio_time = audio_time + torch.arange(390, dtype=torch.float64) / 50
    mask = torch.arange(390) < torch.tensor([[390], [150], [0]])
    results = []
    for attend.implementation in ("dense", "local"):
        given = [tensor.clone().requires_grad_() for tensor in (visual, audio)]
        out = attend(*given, visual_time, audio_time, mask)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        leaves = [*given, *attend.parameters()]
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for local, dense in zip(results[1], results[0], strict=True):
        assert_close(local, dense, rtol=1e-9, atol=1e-10)


def test_without_visual_features_every_frame_has_the_same_query():
    attend, (_, audio, visual_time, audio_time) = build(window=0.3), clip()
    out = attend(None, audio, visual_time, audio_time)
    assert out.shape == (2, 5, 8)
    constant = torch.zeros(2, 5, 8, dtype=torch.float64)
    assert_close(out, attend(constant, audio, visual_time, audio_time))
    # Two frames of one time hear the same, whatever they are.
    assert_close(*attend(None, audio[:1], visual_time[:1, [1, 1]], audio_time[:1])[0])
    silence = attend(None, None, visual_time, None)
    assert_close(silence, silence[:1, :1].expand_as(silence))


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("implementation", ["dense", "local"])
def test_the_resampler_carries_50_hertz_onto_irregular_frames(num_heads, implementation):
    resample = AsymmetricCrossAttention.resampler(6, num_heads, rate=50.0).double()
    resample.implementation = implementation
    audio_time = (0.0125 + torch.arange(500, dtype=torch.float64) / 50).view(1, -1)
    frames = (0.2 + 9.5 * torch.rand(1, 240, dtype=torch.float64)).sort(1).values
    rates = torch.linspace(0.2, 3.0, 6, dtype=torch.float64)  # hertz

    def signal(seconds):
        return torch.sin(2 * math.pi * rates * seconds.unsqueeze(-1))

    out = resample(None, signal(audio_time), frames, audio_time)
    nearest = audio_time[0, (frames.unsqueeze(-1) - audio_time.unsqueeze(1)).abs().argmin(-1)]
    error = (out - signal(frames)).abs().amax(1)
    of_nearest = (signal(nearest) - signal(frames)).abs().amax(1)
    # The fastest component turns by 22 degrees from one feature to the next.
    assert (error < of_nearest / 4).all()
    # Steadily growing: read at the right time to a twentieth of 20 milliseconds, 1.07 at worst.
    ramp = resample(None, audio_time.unsqueeze(-1).expand(-1, -1, 6), frames, audio_time)
    assert ((ramp - frames.unsqueeze(-1)).abs() < 1.1e-3).all()


def test_the_resampler_hands_nothing_on_where_there_is_no_audio_and_learns():
    resample = AsymmetricCrossAttention.resampler(4)
    audio, audio_time = torch.randn(1, 50, 4), torch.arange(50.0).view(1, -1) / 50
    frames = torch.tensor([[0.5, 7.0]])
    out = resample(None, audio, frames, audio_time)
    assert (out[0, 0] != 0).all()
    assert not out[0, 1].any()
    out[0, 0].square().sum().backward()
    for name in ("to_query.bias", "to_key.weight", "to_value.weight", "to_output.weight"):
        assert resample.get_parameter(name).grad.abs().max() > 0, name


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
    chosen = AsymmetricCrossAttention(16, 8, 2, slopes=(5.0, 0.0))
    assert chosen.slopes.flatten().tolist() == [5.0, 0.0]
    assert "window=1 s, implementation='auto'" in repr(chosen)


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
        ((8, 6, 2), {"slopes": (1.0,)}, "must be 2 finite numbers .* got .1.0."),
        ((8, 6, 2), {"slopes": (1.0, -1.0)}, "`slopes` must be 2 finite numbers of at least 0"),
        ((8, 6, 2), {"implementation": "fast"}, "`implementation` must be one of 'auto', 'dense'"),
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
    with pytest.raises(ValueError, match=r"hands features on as they are, .* got 8 and 6"):
        attend.reset_to_resampler()
    with pytest.raises(ValueError, match=r"`rate` must be in .0, inf.; got 0"):
        AsymmetricCrossAttention.resampler(8, rate=0)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_attending_by_blocks_is_attending_at_once(block):
    attention = AsymmetricCrossAttention(8, 6, 2, window=0.3).eval()
    visual, features = torch.randn(2, 40, 8), torch.randn(2, 70, 6)
    frames = torch.arange(40, dtype=torch.float64).expand(2, -1) / 15 + torch.tensor(
        [[0.0], [0.05]]
    )
    times = torch.arange(70, dtype=torch.float64).expand(2, -1) / 50
    mask = torch.rand(2, 70) < 0.8
    mask[1] = False
    frames[:, 20] = torch.nan  # padding
    arguments = (visual, features, frames, times, mask)
    whole, has_audio = attention.attend_by_blocks(*arguments)
    blocks, _ = attention.attend_by_blocks(*arguments, block=block)
    assert_close(blocks, whole, rtol=0, atol=1e-6)
    distance = (frames[:, :, None] - times[:, None]).abs().masked_fill(~mask[:, None], torch.inf)
    assert torch.equal(has_audio, (distance <= 0.3).any(-1))
    assert not has_audio[1].any()
    assert_close(whole[1], whole[1, :1].expand(40, -1))  # the null key alone
