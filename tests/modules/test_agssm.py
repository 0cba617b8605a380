import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.modules.agssm import AGSSM, AGSSMBlock, AudioGuidedSelection, reverse_reset
from mmau.scan import ScanBackend
from mmau.scan.api import resolve_scan_backend
from mmau.scan.reference import zoh
from mmau.training import parameter_groups


def clip(b=2, t=9, d=6, a=4):
    return torch.randn(b, t, d, dtype=torch.float64), torch.randn(b, t, a, dtype=torch.float64)


def paper(model, visual, audio):
    """Section 3.3, line by line, from the weights alone."""
    select = model.selection
    h = torch.zeros(len(visual), model.d_model, model.d_state, dtype=visual.dtype)
    A = -torch.exp(model.A_log)
    out = []
    for x_v, x_a in zip(visual.unbind(1), audio.unbind(1), strict=True):
        s = torch.cat([x_v, x_a], dim=-1) @ select.fuse.weight.T + select.fuse.bias
        delta = torch.log(1 + torch.exp(select.delta_bias + s @ select.to_delta.weight.T))
        B, C = s @ select.to_B.weight.T, s @ select.to_C.weight.T
        z = delta[:, :, None] * A
        A_bar = torch.exp(z)
        B_bar = (torch.exp(z) - 1) / z * delta[:, :, None] * B[:, None, :]
        gated = x_v * torch.sigmoid(x_a @ select.to_gate.weight.T)
        h = A_bar * h + B_bar * gated[:, :, None]
        out.append((h * C[:, None, :]).sum(-1))
    return torch.stack(out, 1), h


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_agssm_is_the_paper(backend):
    model = AGSSM(6, 4, d_state=3, dt_range=(0.05, 0.5), backend=backend).double()
    visual, audio = clip()
    out, state = model(visual, audio)
    expected, expected_state = paper(model, visual, audio)
    assert_close(out, expected, rtol=1e-9, atol=1e-12)
    assert_close(state, expected_state, rtol=1e-9, atol=1e-12)


def test_the_initialisation_is_the_documented_one():
    model = AGSSM(2000, 4, d_state=5, dt_range=(1e-3, 1e-1), skip=True)
    assert_close(-torch.exp(model.A_log), -torch.arange(1.0, 6.0).expand(2000, 5))
    step = torch.nn.functional.softplus(model.selection.delta_bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 1e-1 * 1.001
    # Log-uniform over two decades: a quarter of the channels in each half decade.
    counts = torch.histc(step.log10(), bins=4, min=-3, max=-1)
    assert ((counts - 500).abs() < 100).all()
    assert torch.equal(model.D, torch.ones(2000))
    assert AGSSM(4).D is None


def assigned(model):
    """The same weights as other objects, as a loader without copies puts them in."""
    with torch.device("meta"):
        other = AGSSM(6, 4, skip=True, bidirectional=True)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return other


def filled(model):
    """Built without memory, then given some."""
    with torch.device("meta"):
        other = AGSSM(6, 4, skip=True, bidirectional=True)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "remake",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double(),
        assigned,
        filled,
    ],
)
def test_time_constants_are_exempt_from_weight_decay_whatever_object_holds_them(remake):
    model = remake(AGSSM(6, 4, skip=True, bidirectional=True))
    expected = {"A_log", "D", "selection.delta_bias"}
    expected |= {f"reversed_scan.{name}" for name in expected}
    groups = {g["name"]: g["params"] for g in parameter_groups(model, adapters_in=())}
    exempt = {id(parameter) for parameter in groups["new, no decay"]}
    names = {n for n, p in model.named_parameters() if id(p) in exempt and not n.endswith(".bias")}
    assert names == expected


# ------------------------------------------------------------------ audio
def test_without_audio_it_is_a_plain_selective_model():
    model = AGSSM(6, d_state=3).double()
    visual, _ = clip()
    out, _ = model(visual)
    assert model.selection(visual).gate is None
    model.backend = resolve_scan_backend("reference")
    assert_close(model(visual)[0], out)


def test_where_audio_is_absent_the_gate_is_one_and_nothing_is_added():
    select = AudioGuidedSelection(6, 4).double()
    visual, audio = clip()
    audio_mask = torch.rand(2, 9) < 0.5
    audio[~audio_mask] = math.nan
    got = select(visual, audio, audio_mask=audio_mask)
    assert (got.gate[~audio_mask] == 1).all()
    s = visual @ select.fuse.weight[:, :6].T + select.fuse.bias
    assert_close(got.B[~audio_mask], (s @ select.to_B.weight.T)[~audio_mask])
    unmasked = select(visual, audio.nan_to_num())
    for name in ("delta", "B", "C", "gate"):
        assert_close(getattr(got, name)[audio_mask], getattr(unmasked, name)[audio_mask])


def test_no_audio_is_the_same_as_audio_absent_everywhere():
    model = AGSSM(6, 4).double()
    visual, audio = clip()
    nowhere = torch.zeros(2, 9, dtype=torch.bool)
    out, state = model(visual)
    masked_out, masked_state = model(visual, audio * math.nan, audio_mask=nowhere)
    assert torch.equal(out, masked_out)
    assert torch.equal(state, masked_state)
    without = model.selection(visual)
    assert (without.gate == 1).all()


def test_audio_reaches_every_selected_quantity():
    model = AGSSM(6, 4).double()
    visual, audio = clip()
    audio.requires_grad_()
    selection = model.selection(visual, audio)
    for part in selection:
        (grad,) = torch.autograd.grad(part.sum(), audio, retain_graph=True)
        assert grad.abs().min() > 0


def test_every_parameter_gets_a_gradient():
    model = AGSSM(6, 4, skip=True, bidirectional=True).double()
    out, _ = model(*clip())
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# ------------------------------------------------------------------ time
@given(t=st.integers(1, 12), seed=st.integers(0, 5))
def test_step_agrees_with_the_whole_clip(t, seed):
    torch.manual_seed(seed)
    model = AGSSM(6, 4).double()
    visual, audio = clip(t=t)
    audio_mask = torch.rand(2, t) < 0.7
    whole, final = model(visual, audio, audio_mask=audio_mask)
    state, steps = None, []
    for i in range(t):
        out, state = model.step(visual[:, i], audio[:, i], state, audio_mask=audio_mask[:, i])
        steps.append(out)
    # The scan is bitwise; the projections differ by the rounding of one product and of many.
    assert_close(torch.stack(steps, 1), whole, rtol=1e-12, atol=1e-14)
    assert_close(state, final, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_the_selection_stepping_is_bitwise_the_scan(backend, dtype, monkeypatch):
    """Widths of the paper. With projections that act frame by frame nothing is left to differ."""
    model = AGSSM(64, 8, backend=backend).to(dtype)
    visual, audio = (v.to(dtype) for v in clip(1, 40, 64, 8))
    selection = model.selection(visual, audio)
    frame = iter(range(40))

    def select(visual, *_, **__):
        if visual.shape[1] == 40:
            return selection
        i = next(frame)
        return type(selection)(*(part[:, i : i + 1] for part in selection))

    monkeypatch.setattr(model.selection, "forward", select)
    whole, final = model(visual, audio)
    state = None
    for i in range(40):
        out, state = model.step(visual[:, i], audio[:, i], state)
        assert torch.equal(out, whole[:, i])
    assert torch.equal(state, final)


def test_gradients_flow_through_the_carried_state():
    model = AGSSM(6, 4).double()
    visual, audio = clip()
    whole, _ = model(visual, audio)
    expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    first, state = model(visual[:, :4], audio[:, :4])
    second, _ = model(visual[:, 4:], audio[:, 4:], state=state)
    chunks = torch.autograd.grad(
        first.square().sum() + second.square().sum(), list(model.parameters())
    )
    for one, other in zip(chunks, expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_masked_frame_does_not_exist(bidirectional):
    model = AGSSM(6, 4, bidirectional=bidirectional).double()
    visual, audio = clip()
    frames = [0, 2, 3, 7]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, frames] = True
    alone, state = model(visual[:, frames], audio[:, frames])
    masked, masked_state = model(visual, audio, mask=mask)
    assert_close(masked[:, frames], alone, rtol=1e-12, atol=1e-14)
    assert_close(masked_state, state)
    assert not masked[~mask].any()


def test_bidirectional_is_one_scan_each_way_with_own_parameters():
    model = AGSSM(6, 4, bidirectional=True).double()
    visual, audio = clip()
    out, state = model(visual, audio)
    assert state is None
    back, _ = model.reversed_scan(visual.flip(1), audio.flip(1))
    model.reversed_scan = None
    forth, _ = model(visual, audio)
    assert torch.equal(out, forth + back.flip(1))
    assert not torch.equal(forth, back)


def test_shared_directions_are_the_same_scan_of_the_flipped_clip():
    """To the bit, with masked frames and resets; half of the parameters."""
    model = AGSSM(6, 4, bidirectional=True, share_directions=True, skip=True).double()
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"A_log", "D", "selection"}
    visual, audio = clip()
    audio_mask, mask = torch.rand(2, 9) < 0.7, torch.rand(2, 9) < 0.7
    visual[~mask] = math.nan
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    out, state = model(visual, audio, audio_mask=audio_mask, mask=mask, reset=reset)
    assert state is None
    one_way = AGSSM(6, 4, skip=True).double()
    one_way.load_state_dict(model.state_dict())
    forth, _ = one_way(visual, audio, audio_mask=audio_mask, mask=mask, reset=reset)
    back, _ = one_way(
        visual.flip(1),
        audio.flip(1),
        audio_mask=audio_mask.flip(1),
        mask=mask.flip(1),
        reset=reverse_reset(reset),
    )
    # The projections of a frame may differ in the last bit with the row that it stands in.
    assert_close(out, forth + back.flip(1), rtol=1e-12, atol=1e-14)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("share", [False, True])
def test_packed_clips_are_independent_in_both_directions(share):
    model = AGSSM(6, 4, bidirectional=True, share_directions=share).double()
    visual, audio = clip(b=1)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, [0, 4]] = True
    packed, _ = model(visual, audio, reset=reset)
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = model(visual[:, part], audio[:, part])
        assert_close(packed[:, part], alone, rtol=1e-12, atol=1e-14)
    assert reverse_reset(None) is None
    first = torch.tensor([[True, False, False, True]])
    assert reverse_reset(first).tolist() == [[False, True, False, False]]


# ------------------------------------------------------------------ contract
def test_runs_in_fp32_under_autocast():
    model = AGSSM(6, 4)
    visual, audio = (v.float() for v in clip())
    plain, _ = model(visual, audio)
    seen = []

    def spy(*args, **options):
        seen.extend(args)
        return resolve_scan_backend("chunked").run(*args, **options)

    model.backend = ScanBackend(name="spy", run=spy)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = model(visual, audio)
    assert all(tensor.dtype == torch.float32 for tensor in seen)
    assert state.dtype == torch.float32
    # The bias of the step is not rounded to bfloat16 either, which keeps 3 digits.
    select = model.selection
    with torch.no_grad():
        select.to_delta.weight.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            delta = select(visual, audio).delta
    assert_close(delta, torch.nn.functional.softplus(select.delta_bias).expand_as(delta))
    # What bfloat16 projections cost; the scan itself adds nothing.
    assert_close(out.float(), plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_compiles_as_one_graph_for_every_length():
    torch._dynamo.reset()
    model = AGSSM(6, 4).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 12, 7):
        visual, audio = clip(t=t)
        mask = torch.rand(2, t) < 0.7
        out, state = compiled(visual, audio, mask=mask)
        expected, expected_state = model(visual, audio, mask=mask)
        assert_close(out, expected)
        assert_close(state, expected_state)
    out.sum().backward()


@pytest.mark.slow
def test_compiles_with_the_default_compiler():
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    model = AGSSM(6, 4)
    visual, audio = (v.float() for v in clip())
    # A graph cached by an older version of the operator would be no test of this one.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        out, _ = torch.compile(model, fullgraph=True)(visual, audio)
    assert_close(out, model(visual, audio)[0])
    out.sum().backward()


def test_the_resolved_backend_shows():
    assert "backend='chunked'" in repr(AGSSM(4))
    assert "backend='reference'" in repr(AGSSM(4, backend="reference"))
    assert "dt_range=(0.001, 0.1)" in repr(AGSSM(4))


@pytest.mark.parametrize(
    ("options", "kernels"), [({}, 1), ({"bidirectional": True}, 2), ({"skip": True}, 0)]
)
def test_a_backend_with_a_fused_kernel_gets_it_called(options, kernels):
    """With what it needs to leave masked frames and absent audio out by itself."""
    calls = []
    plain = resolve_scan_backend("reference")

    def run_gated(x, delta_logits, delta_bias, A, B, C, *, gate_logits, **rest):
        calls.append(1)
        delta = torch.nn.functional.softplus(delta_logits + delta_bias)
        return plain.run(x * torch.sigmoid(gate_logits), delta, A, B, C, **rest)

    fused = dataclasses.replace(plain, name="fused", run_gated=run_gated)
    model = AGSSM(6, 4, d_state=3, backend=fused, **options).double()
    composed = AGSSM(6, 4, d_state=3, backend=plain, **options).double()
    composed.load_state_dict(model.state_dict())
    visual, audio = clip()
    audio_mask, mask, reset = torch.rand(3, 2, 9) < torch.tensor([0.6, 0.8, 0.2]).view(3, 1, 1)
    visual[~mask], audio[~audio_mask] = math.nan, math.nan
    given = {"audio_mask": audio_mask, "mask": mask, "reset": reset}
    out, state = model(visual, audio, **given)
    expected, expected_state = composed(visual, audio, **given)
    assert len(calls) == kernels
    assert torch.equal(out, expected)
    assert state is expected_state is None or torch.equal(state, expected_state)


def test_discretisations_differ_as_they_should():
    """With steps of about 1 Euler lets in several times too much."""
    exact, first_order = (
        AGSSM(4, dt_range=(1.0, 1.0), discretization=name).double() for name in ("zoh", "euler")
    )
    first_order.load_state_dict(exact.state_dict())
    visual, _ = clip(d=4)
    assert not torch.allclose(exact(visual)[0], first_order(visual)[0], rtol=0.1)
    A_bar, _ = zoh(torch.ones(4), -torch.exp(exact.A_log), torch.ones(16))
    assert A_bar.max() < 1


# ------------------------------------------------------------------ the block
def test_block_is_the_documented_formula():
    block = AGSSMBlock(6, 4, d_inner=10).double()
    visual, audio = clip()
    u, z = block.to_inner(block.norm(visual)).split(10, dim=-1)
    y, _ = block.ssm(u * torch.sigmoid(u), audio)
    expected = visual + block.to_out(y * z * torch.sigmoid(z))
    assert_close(block(visual, audio)[0], expected)


@pytest.mark.parametrize("share", [False, True])
def test_packed_clips_are_independent_through_the_block(share):
    block = AGSSMBlock(6, 4, bidirectional=True, share_directions=share).double()
    assert block.ssm.share_directions is share
    visual, audio = clip(b=1)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 4] = True
    packed, _ = block(visual, audio, reset=reset)
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = block(visual[:, part], audio[:, part])
        assert_close(packed[:, part], alone, rtol=1e-12, atol=1e-14)


def test_block_dropout_acts_on_what_is_added_and_only_in_training():
    block = AGSSMBlock(6, dropout=0.5).double()
    visual, _ = clip(t=200)
    added = block.train()(visual)[0] - visual
    assert 0.4 < (added == 0).double().mean() < 0.6
    assert torch.equal(block.eval()(visual)[0], block(visual)[0])


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AGSSM(0), ValueError, r"`d_model` must be in \[1, inf\); got 0"),
        (lambda: AGSSM(4, 0), ValueError, r"`d_audio` must be in \[1, inf\); got 0"),
        (lambda: AGSSM(4, d_state=0), ValueError, r"`d_state` must be in \[1, inf\); got 0"),
        (lambda: AGSSM(4, dt_range=(0.1, 0.01)), ValueError, "`dt_range` must be 0 < low <= high"),
        (
            lambda: AGSSM(4, discretization="zho"),
            ValueError,
            "`discretization` must be one of 'euler'",
        ),
        (lambda: AGSSM(4, backend="tritn"), LookupError, "no scan backend named 'tritn'; did"),
        (
            lambda: AGSSM(4, share_directions=True),
            ValueError,
            "`share_directions` must be False without `bidirectional`",
        ),
        (lambda: AGSSMBlock(4, d_inner=0), ValueError, r"`d_inner` must be in \[1, inf\)"),
        (lambda: AGSSMBlock(4, dropout=1.0), ValueError, r"`dropout` must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"state": torch.zeros(2, 6, 5)}, ValueError, "axis `n` of `state` must be 16"),
        (
            {"state": torch.zeros(3, 6, 16)},
            ValueError,
            "axis `b` is 2 in `visual` but 3 in `state`",
        ),
        ({"state": (torch.zeros(2, 6, 16),)}, TypeError, r"`state` must be one tensor \(b, d, n\)"),
        ({"reset": torch.zeros(2, 9)}, TypeError, "`reset` must be a bool tensor"),
        (
            {"reset": torch.zeros(2, 8).bool()},
            ValueError,
            "axis `t` is 9 in `visual` but 8 in `reset`",
        ),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AGSSM(6, 4).double()(*clip(), **arguments)


def test_a_bidirectional_model_has_no_state_and_no_step():
    model = AGSSM(6, bidirectional=True).double()
    with pytest.raises(ValueError, match=r"`state` must be None.*bidirectional=False to stream"):
        model(clip()[0], state=torch.zeros(2, 6, 16))
    with pytest.raises(ValueError, match=r"cannot go frame by frame.*bidirectional=False"):
        model.step(clip()[0][:, 0])


def test_selection_refuses_what_does_not_fit():
    select = AudioGuidedSelection(6, 4)
    with pytest.raises(ValueError, match="axis `a` of `audio` must be 4"):
        select(torch.ones(1, 2, 6), torch.ones(1, 2, 5))
    with pytest.raises(TypeError, match="`audio_mask` must be a bool tensor"):
        select(torch.ones(1, 2, 6), torch.ones(1, 2, 4), audio_mask=torch.ones(1, 2))
