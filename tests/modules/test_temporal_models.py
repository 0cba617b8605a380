"""What every temporal model promises; a registered one is tested by being registered."""

import itertools
import math
import pickle

import pytest
import torch
from torch.testing import assert_close

from mmau.modules.baselines import TCN, TemporalTransformer
from mmau.modules.temporal import TEMPORAL_MODELS, TemporalModel, TemporalModule, mask_from_lengths

NAMES = list(TEMPORAL_MODELS)
D, A = 8, 3


def build(name, d_audio=A, **options):
    torch.manual_seed(0)
    model = TEMPORAL_MODELS.create(name, D, d_audio, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit norms would hide what they do to masked frames.
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def clip(b=2, t=12):
    return torch.randn(b, t, D, dtype=torch.float64), torch.randn(b, t, A, dtype=torch.float64)


def test_the_paper_s_three_are_there():
    assert {"agssm", "tcn", "transformer"} <= set(NAMES)
    assert all(info.summary for info in TEMPORAL_MODELS.describe())


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_attributes(name):
    model = build(name)
    assert isinstance(model, TemporalModel)
    assert (model.d_model, model.d_audio, model.causal) == (D, A, True)
    visual, audio = clip()
    out, _ = model(visual, audio)
    assert out.shape == visual.shape
    assert out.dtype == visual.dtype
    assert build(name, None)(visual)[0].shape == visual.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_model_is_causal_in_both_streams(name):
    model = build(name)
    visual, audio = clip()
    out, _ = model(visual, audio)
    for stream in (visual, audio):
        # Noise, because a norm would not see a constant.
        noise = torch.randn_like(stream[:, 7:])
        stream[:, 7:] += noise
        changed, _ = model(visual, audio)
        assert torch.equal(changed[:, :7], out[:, :7])
        assert (changed[:, 7] - out[:, 7]).abs().max() > 1e-6
        stream[:, 7:] -= noise


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_depends_on_the_past(name):
    model = build(name)
    visual, audio = clip()
    visual.requires_grad_()
    out, _ = model(visual, audio)
    (grad,) = torch.autograd.grad(out[:, -1].square().sum(), visual)
    assert (grad.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [[5], [1, 2, 11], range(1, 12)])
def test_chunks_with_a_carried_state_are_the_whole(name, cuts):
    model = build(name)
    visual, audio = clip()
    audio_mask = torch.rand(2, 12) < 0.7
    mask = torch.rand(2, 12) < 0.7
    whole, _ = model(visual, audio, audio_mask=audio_mask, mask=mask)
    state, chunks, borders = None, [], [0, *cuts, 12]
    for start, end in itertools.pairwise(borders):
        part = slice(start, end)
        out, state = model(
            visual[:, part],
            audio[:, part],
            audio_mask=audio_mask[:, part],
            mask=mask[:, part],
            state=state,
        )
        chunks.append(out)
    # Rounding of differently shaped matrix products.
    assert_close(torch.cat(chunks, 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_step_by_step_is_the_whole(name):
    model = build(name)
    visual, audio = clip()
    whole, _ = model(visual, audio)
    state = None
    for i in range(12):
        out, state = model.step(visual[:, i], audio[:, i], state)
        assert_close(out, whole[:, i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_has_no_influence(name):
    """NaN in masked frames reaches neither values nor gradients; their output is 0."""
    model = build(name)
    visual, audio = clip()
    mask = torch.rand(2, 12) < 0.6
    outs, grads = [], []
    for fill in (0.0, math.nan):
        x, a = visual.clone(), audio.clone()
        x[~mask], a[~mask] = fill, fill
        x.requires_grad_()
        out, _ = model(x, a, mask=mask)
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    assert torch.equal(*outs)
    assert not outs[0][~mask].any()
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    assert not grads[0][0][~mask].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [slice(0, 7), slice(5, 12)])
def test_padding_at_either_end_changes_nothing(name, part):
    model = build(name)
    visual, audio = clip(b=1)
    alone, _ = model(visual[:, part], audio[:, part])
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, part] = True
    padded, _ = model(visual, audio, mask=mask)
    assert_close(padded[:, part], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_without_any_frame_gives_zeros(name):
    out, _ = build(name)(*clip(), mask=torch.zeros(2, 12, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("name", NAMES)
def test_absent_audio_has_no_influence_and_given_audio_has(name):
    model = build(name)
    visual, audio = clip()
    nowhere = torch.zeros(2, 12, dtype=torch.bool)
    silent, _ = model(visual)
    assert torch.equal(silent, model(visual, audio * math.nan, audio_mask=nowhere)[0])
    frames = torch.rand(2, 12) < 0.6
    masked, _ = model(visual, audio * math.nan, audio_mask=nowhere, mask=frames)
    assert torch.equal(masked, model(visual, mask=frames)[0])
    assert (model(visual, audio)[0] - silent).abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_clips_of_a_batch_do_not_mix(name):
    model = build(name)
    visual, audio = clip()
    both, _ = model(visual, audio)
    for i in range(2):
        alone, _ = model(visual[i : i + 1], audio[i : i + 1])
        assert_close(both[i : i + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = build(name).train()
    out, _ = model(*clip())
    out.square().mul(torch.randn_like(out)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_saves_loads_and_pickles(name):
    model = build(name)
    inputs = clip()
    other = TEMPORAL_MODELS.create(name, D, A).double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for same in (other, pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = build(name, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    visual, audio = clip()
    mask = torch.rand(2, 12) < 0.7
    _, state = model(visual, audio)
    state = tuple(part.detach() for part in state)
    out, _ = compiled(visual, audio, mask=mask, state=state)
    expected, _ = model(visual, audio, mask=mask, state=state)
    assert_close(out, expected, rtol=1e-10, atol=1e-12)
    out.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_a_free_number_of_frames(name):
    frames = {1: torch.export.Dim("t", min=2, max=10_000)}
    model = build(name)
    program = torch.export.export(
        model, clip(), dynamic_shapes={"visual": frames, "audio": frames}, strict=False
    )
    longer = clip(t=30)
    assert_close(program.module()(*longer)[0], model(*longer)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_dropout_run(name):
    model = TEMPORAL_MODELS.create(name, D, A, dropout=0.1)
    visual, audio = (v.float() for v in clip())
    with torch.autocast("cpu", torch.bfloat16):
        out, state = model(visual, audio)
        model(visual, audio, state=state)
    assert out.isfinite().all()
    out.float().sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"visual": torch.ones(2, 12, D + 1)}, ValueError, "axis `d` of `visual` must be 8"),
        ({"visual": torch.ones(12, D)}, ValueError, r"`visual` must have shape \(b, t, d\)"),
        ({"visual": torch.ones(2, 0, D), "audio": None}, ValueError, "at least one frame"),
        ({"audio": torch.ones(2, 12, A + 1)}, ValueError, "axis `a` of `audio` must be 3"),
        ({"audio": torch.ones(2, 5, A)}, ValueError, "axis `t` is 12 in `visual` but 5 in `audio`"),
        ({"mask": torch.ones(2, 12)}, TypeError, "`mask` must be a bool tensor.*float32"),
        (
            {"mask": torch.ones(2, 4).bool()},
            ValueError,
            "axis `t` is 12 in `visual` but 4 in `mask`",
        ),
        ({"audio_mask": torch.ones(2, 12)}, TypeError, "`audio_mask` must be a bool tensor"),
        (
            {"audio": None, "audio_mask": torch.ones(2, 12).bool()},
            ValueError,
            "`audio_mask` must be None where `audio` is None",
        ),
        ({"state": "yesterday"}, TypeError, "`state` must be the tuple of .* tensors.*got str"),
        ({"state": (torch.zeros(2, 1, 1),) * 99}, TypeError, "`state` must be the tuple of"),
    ],
)
def test_bad_input_is_refused(name, change, error, message):
    arguments = dict(zip(("visual", "audio"), clip(), strict=True)) | change
    with pytest.raises(error, match=message):
        build(name)(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_audio_for_a_model_without_audio_is_refused(name):
    with pytest.raises(
        ValueError, match=r"`audio` must be None: this .* was built with d_audio=None"
    ):
        build(name, None)(*clip())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_batch_is_refused(name):
    model = build(name)
    visual, audio = clip()
    _, state = model(visual, audio)
    with pytest.raises(ValueError, match="axis `b` is 1 in `visual` but 2 in"):
        model(visual[:1], audio[:1], state=state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, r"`num_layers` must be in \[1, inf\)"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"d_audio": 0}, r"`d_audio` must be in \[1, inf\)"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


# ------------------------------------------------------------------ TCN
@pytest.mark.parametrize(
    ("num_layers", "kernel_size", "field"), [(6, 3, 253), (2, 2, 7), (1, 1, 1)]
)
def test_the_receptive_field_is_what_it_says(num_layers, kernel_size, field):
    model = TCN(4, num_layers=num_layers, kernel_size=kernel_size).double()
    assert model.receptive_field == field
    visual = torch.randn(1, field + 3, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(visual)[0][:, -1].square().sum(), visual)
    reached = grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [False] * 3 + [True] * field


@pytest.mark.parametrize("option", ["d_hidden", "kernel_size"])
def test_tcn_refuses_bad_sizes(option):
    with pytest.raises(ValueError, match=rf"`{option}` must be in \[1, inf\)"):
        TCN(4, **{option: 0})


# ------------------------------------------------------------------ transformer
def test_attention_is_softmax_of_scores_and_distances():
    model = TemporalTransformer(D, num_layers=1, num_heads=2).double().eval()
    visual, _ = clip(b=1, t=5)
    layer = model.layers[0]
    q, k, v = layer.to_qkv(layer.attention_norm(visual))[0].split(D, dim=-1)
    heads = []
    for h, slope in enumerate((1 / 16, 1 / 256)):
        part = slice(4 * h, 4 * h + 4)
        scores = q[:, part] @ k[:, part].T / 2
        for i in range(5):
            for j in range(5):
                scores[i, j] = scores[i, j] - slope * (i - j) if j <= i else -math.inf
        heads.append(scores.softmax(-1) @ v[:, part])
    x = visual + layer.to_out(torch.cat(heads, dim=-1))
    assert_close(model(visual)[0], model.norm(x + layer.feed_forward(x)))


def test_without_causality_the_future_counts_and_there_is_no_state():
    model = build("transformer", causal=False)
    visual, audio = clip()
    out, state = model(visual, audio)
    assert state is None
    changed = visual.clone()
    changed[:, -1] += torch.randn(D, dtype=torch.float64)
    assert (model(changed, audio)[0] - out)[:, 0].abs().max() > 0
    with pytest.raises(ValueError, match=r"`state` must be None.*causal=True to stream"):
        model(visual, audio, state=(torch.zeros(1),))
    with pytest.raises(ValueError, match="cannot go frame by frame; build it with causal=True"):
        model.step(visual[:, 0])


@pytest.mark.parametrize("causal", [True, False])
def test_the_window_bounds_the_field_and_the_state(causal):
    model = build("transformer", None, num_layers=1, window=3, causal=causal)
    visual = clip()[0].requires_grad_()
    (grad,) = torch.autograd.grad(model(visual)[0][:, 6].square().sum(), visual)
    reached = (grad.abs().amax((0, 2)) > 0).nonzero().flatten().tolist()
    assert reached == ([4, 5, 6] if causal else [4, 5, 6, 7, 8])
    if causal:
        whole, _ = model(visual)
        state = None
        for i in range(12):
            out, state = model.step(visual[:, i], state=state)
            assert_close(out, whole[:, i], rtol=1e-10, atol=1e-12)
            assert state[1].shape[2] == min(i + 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "`num_heads` must divide d_model = 8; got 3"),
        ({"num_heads": 0}, r"`num_heads` must be in \[1, inf\)"),
        ({"d_hidden": 0}, r"`d_hidden` must be in \[1, inf\)"),
        ({"window": 0}, r"`window` must be in \[1, inf\)"),
    ],
)
def test_transformer_refuses_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        TemporalTransformer(D, **options)


def test_transformer_refuses_a_state_with_another_mask():
    model = build("transformer")
    _, state = model(*clip())
    with pytest.raises(TypeError, match=r"`state\[0\]` must be a bool tensor"):
        model(*clip(), state=(state[0].float(), *state[1:]))


# ------------------------------------------------------------------ lengths
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_with_the_mask_of_its_lengths_is_its_clips(name):
    model = build(name)
    visual, audio = clip()
    mask = mask_from_lengths(torch.tensor([12, 7]))
    both, _ = model(visual, audio, mask=mask)
    short, _ = model(visual[1:, :7], audio[1:, :7])
    assert_close(both[1:, :7], short, rtol=1e-10, atol=1e-12)


def test_lengths_become_a_mask():
    assert mask_from_lengths(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
    assert tuple(mask_from_lengths(torch.tensor([], dtype=torch.long)).shape) == (0, 0)
    compiled = torch.compile(mask_from_lengths, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([1, 2]), 2), mask_from_lengths(torch.tensor([1, 2])))


@pytest.mark.parametrize(
    ("lengths", "num_frames", "error", "message"),
    [
        (torch.tensor([1.0]), None, TypeError, "`lengths` must hold integers; got dtype .*float32"),
        (torch.tensor([True]), None, TypeError, "`lengths` must hold integers; got .*bool"),
        (torch.tensor([[1]]), None, ValueError, r"`lengths` must have shape \(b\)"),
        (torch.tensor([2, 5]), 4, ValueError, r"must be in \[0, 4\].*got 2 to 5"),
        (torch.tensor([-1, 5]), None, ValueError, r"must be in \[0, 5\].*got -1 to 5"),
    ],
)
def test_bad_lengths_are_refused(lengths, num_frames, error, message):
    with pytest.raises(error, match=message):
        mask_from_lengths(lengths, num_frames)


# ------------------------------------------------------------------ third parties
def test_a_model_of_someone_else_needs_no_base_class():
    class Theirs(torch.nn.Module):
        d_model, d_audio, causal = 8, None, True

        def forward(self, visual, audio=None, *, audio_mask=None, mask=None, state=None):
            return visual, None

    assert isinstance(Theirs(), TemporalModel)
    assert not isinstance(torch.nn.Linear(1, 1), TemporalModel)
    assert issubclass(TCN, TemporalModule)
