import pytest
import torch
from torch.testing import assert_close

from mmau.modules.agssm import VisionMamba


def clip(b=2, t=9, d=6, a=4):
    return torch.randn(b, t, d, dtype=torch.float64), torch.randn(b, t, a, dtype=torch.float64)


def test_it_is_its_blocks_one_after_the_other_and_a_norm():
    model = VisionMamba(6, 4, num_layers=3, d_inner=8).double()
    visual, audio = clip()
    out, states = model(visual, audio)
    x = visual
    for layer, state in zip(model.layers, states, strict=True):
        x, layer_state = layer(x, audio)
        assert torch.equal(state, layer_state)
    assert_close(out, model.norm(x))


def test_state_has_one_tensor_per_layer_whatever_the_length():
    model = VisionMamba(6, num_layers=2, d_inner=8, d_state=3)
    for t in (1, 50):
        _, state = model(torch.randn(2, t, 6))
        assert [tuple(s.shape) for s in state] == [(2, 8, 3), (2, 8, 3)]


def test_bidirectional_depends_on_the_future_and_padding_does_not_change_it():
    model = VisionMamba(6, 4, bidirectional=True, num_layers=2).double()
    visual, audio = clip()
    out, state = model(visual, audio)
    assert state is None
    assert not model.causal
    changed = visual.clone()
    changed[:, -1] += torch.randn(6, dtype=torch.float64)
    assert (model(changed, audio)[0] - out)[:, 0].abs().max() > 0
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 2:11] = True
    padded = [torch.full((2, 13, v.shape[-1]), torch.nan, dtype=v.dtype) for v in (visual, audio)]
    padded[0][:, 2:11], padded[1][:, 2:11] = visual, audio
    around, _ = model(*padded, mask=mask)
    assert_close(around[:, 2:11], out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"bidirectional": True, "share_directions": True}]
)
def test_packed_clips_are_independent(options):
    model = VisionMamba(6, 4, num_layers=2, **options).double()
    visual, audio = clip(b=1)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 4] = True
    packed, _ = model(visual, audio, reset=reset)
    alone, _ = model(visual[:, 4:], audio[:, 4:])
    assert_close(packed[:, 4:], alone, rtol=1e-12, atol=1e-13)


def test_memory_reaches_back_over_hundreds_of_frames():
    model = VisionMamba(6, num_layers=1, dt_range=(1e-3, 1e-3)).double()
    visual = torch.randn(1, 600, 6, dtype=torch.float64, requires_grad=True)
    out, _ = model(visual)
    (grad,) = torch.autograd.grad(out[:, -1].square().sum(), visual)
    assert grad[:, 0].abs().max() > 1e-3 * grad[:, -2].abs().max()


def test_it_learns_to_remember_a_cue():
    """The sign of a cue in the first frame, asked for 20 frames later."""
    torch.manual_seed(1)
    model = VisionMamba(8, num_layers=1, d_inner=16)
    head = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(120):
        visual = 0.1 * torch.randn(32, 20, 8)
        visual[:, 1:, 2] += 1
        cue = torch.randint(0, 2, (32,)).float()
        visual[:, 0, 0] = 2 * cue - 1
        logits = head(model(visual)[0][:, -1]).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, cue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((torch.zeros(2, 64, 16),), "`state` must be the tuple of 2 tensors.*got a tuple of 1"),
        (torch.zeros(2, 64, 16), "`state` must be the tuple of 2 tensors.*got Tensor"),
    ],
)
def test_a_wrong_state_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        VisionMamba(6)(torch.zeros(2, 3, 6), state=state)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`share_directions` must be False without"):
        VisionMamba(6, share_directions=True)
    with pytest.raises(ValueError, match=r"`num_layers` must be in \[1, inf\); got 0"):
        VisionMamba(6, num_layers=0)
