"""DINOv2: what learns, what stays, which token is which patch."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.encoders import VISUAL_ENCODERS, AdapterOptions, DINOv2Encoder, VisualEncoder
from mmau.encoders.backbone import WeightsNotFoundError, count_parameters
from mmau.encoders.vision import DINOV2_ARCHITECTURES, dinov2, tiny_dinov2

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 32}


def only_local(encoder):
    """Switch attention off, so that a token depends on its own patch only."""
    for layer in encoder.backbone.encoder.layer:
        nn.init.zeros_(layer.attention.o_proj.weight)
    return encoder


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_each_token_is_one_patch_in_reading_order(registers, size):
    """A class or register token left in would shift every token, and shows here."""
    encoder = only_local(
        tiny_dinov2(**SMALL, num_register_tokens=registers, normalize="pretrained")
    ).eval()
    images = torch.rand(1, 3, *size)
    plain = encoder(images)
    rows, columns = plain.grid_size
    assert (rows, columns) == (size[0] // 8, size[1] // 8)
    assert plain.patch_tokens.shape == (1, rows * columns, 32)
    for row, column in [(0, 0), (1, 2), (rows - 1, columns - 1)]:
        changed = images.clone()
        changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
        moved = (encoder(changed).patch_tokens - plain.patch_tokens).abs().amax(-1)[0] > 0
        assert moved.nonzero().flatten().tolist() == [row * columns + column]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_every_trainable_tensor_learns_and_no_other(registers, lora_rank, shake, check_gradients):
    encoder = tiny_dinov2(**SMALL, num_register_tokens=registers, lora_rank=lora_rank).train()
    check_gradients(shake(encoder), encoder(torch.rand(2, 3, 32, 32)).patch_tokens)
    trainable = {n for n, p in encoder.named_parameters() if p.requires_grad}
    if lora_rank:
        assert trainable
        assert all(".lora_" in name for name in trainable)
        assert {name.split(".")[5] for name in trainable} <= {"q_proj", "v_proj", "query", "value"}
    else:
        assert len(trainable) > 30


def test_a_step_moves_lora_and_nothing_else():
    encoder = tiny_dinov2(**SMALL, lora_rank=2)
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    encoder(torch.rand(1, 3, 32, 32)).patch_tokens.square().sum().backward()
    optimizer.step()
    moved = {n for n, t in encoder.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all(".lora_" in name for name in moved)


def test_lora_at_zero_is_the_frozen_model(shake):
    torch.manual_seed(1)
    plain = tiny_dinov2(**SMALL)
    torch.manual_seed(1)
    adapted = tiny_dinov2(**SMALL, lora_rank=4)
    images = torch.rand(2, 3, 32, 32)
    assert_close(
        adapted(images).patch_tokens, plain(images).patch_tokens, rtol=0, atol=1e-6
    )  # the same sums, in another order
    shake(adapted)
    assert not torch.allclose(adapted(images).patch_tokens, plain(images).patch_tokens, atol=1e-3)


def test_a_frozen_backbone_is_quiet_under_train():
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
        "image_size": 32, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
        "drop_path_rate": 0.5,
    }  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    frozen = DINOv2Encoder.from_config(config, AdapterOptions(lora_rank=2)).train()
    assert torch.equal(frozen(images).patch_tokens, frozen(images).patch_tokens)
    assert frozen.training
    trained = DINOv2Encoder.from_config(config).train()
    assert not torch.equal(trained(images).patch_tokens, trained(images).patch_tokens)
    assert not trained.eval().backbone.training


def test_per_image_normalisation_ignores_brightness_and_survives_a_blank_crop():
    encoder = tiny_dinov2(**SMALL).eval()
    images = torch.rand(2, 3, 32, 32) * 0.5
    assert_close(
        encoder(images).patch_tokens, encoder(images + 0.3).patch_tokens, rtol=1e-3, atol=1e-4
    )
    assert encoder(torch.zeros(1, 3, 32, 32)).patch_tokens.isfinite().all()


def test_imagenet_normalisation_has_the_published_statistics():
    encoder = tiny_dinov2(**SMALL, normalize="pretrained")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert_close(encoder._normalized(mean), torch.zeros(1, 3, 32, 32))
    ones = encoder._normalized(mean + torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
    assert_close(ones, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("registers", ["", "with-registers-"])
def test_published_sizes(registers):
    """ViT-L with LoRA of rank 8 on query and value: 24 layers x 2 x 2 x 8 x 1024."""
    with torch.device("meta"):
        encoder = dinov2(f"facebook/dinov2-{registers}large", pretrained=False)
    trainable, total = count_parameters(encoder)
    assert trainable == 786_432
    # The plain one is built without its mask token; the other always has it, and four registers.
    assert total == 304_368_640 + 786_432 + (4 * 1024 if registers else -1024)
    assert (encoder.d_out, encoder.patch_size) == (1024, 14)


@pytest.mark.parametrize("name", sorted(DINOV2_ARCHITECTURES))
def test_every_published_architecture_builds(name):
    with torch.device("meta"):
        encoder = dinov2(name, pretrained=False, lora_layers=6)
    assert count_parameters(encoder)[0] == 6 * 2 * 2 * 8 * encoder.d_out


def test_pretrained_weights_are_loaded_from_a_folder_and_not_saved_again(tmp_path):
    source = tiny_dinov2(**SMALL)
    source.backbone.save_pretrained(tmp_path / "weights")
    loaded = DINOv2Encoder.from_pretrained(
        str(tmp_path / "weights"), AdapterOptions(lora_rank=2), normalize="per_image"
    )
    images = torch.rand(1, 3, 32, 32)
    assert_close(loaded(images).patch_tokens, source(images).patch_tokens, rtol=0, atol=1e-6)
    assert loaded.source.name == str(tmp_path / "weights")
    assert all(name.startswith("lora.") for name in loaded.saved_tensors())
    assert len(loaded.saved_tensors()) == 2 * 2 * 2


def test_random_weights_are_saved_whole_and_without_the_traces_of_lora():
    names = set(tiny_dinov2(**SMALL, lora_rank=2).saved_tensors())
    plain = set(tiny_dinov2(**SMALL).saved_tensors())
    assert plain == {name for name in names if not name.startswith("lora.")}
    assert not any("base_layer" in name for name in names)


def test_saved_tensors_are_the_live_ones_also_of_a_copy(shake):
    encoder = copy.deepcopy(tiny_dinov2(**SMALL, lora_rank=2))
    shake(encoder)
    assert any((p != 0).all() for n, p in encoder.named_parameters() if "lora_B" in n)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    folder = tmp_path / "weights"
    source = tiny_dinov2(**SMALL)
    state = source.backbone.state_dict()
    state.pop("layernorm.weight")
    source.backbone.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"do not fill the model: 1 tensors .* layernorm.weight"):
        DINOv2Encoder.from_pretrained(str(folder))


def test_missing_weights_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError, match=r"weights of 'facebook/none-such' are not in"):
        DINOv2Encoder.from_pretrained("facebook/none-such")
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        DINOv2Encoder.from_pretrained(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFoundError, match="holds no usable weights"):
        DINOv2Encoder.from_pretrained(str(tmp_path / "empty"))


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'vit'; expected dinov2 or dinov2_with_registers"):
        DINOv2Encoder.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 32, 32), ValueError, r"`images` must have shape \(b, 3, h, w\)"),
        (torch.rand(1, 1, 32, 32), ValueError, r"`images` must have shape \(b, 3, h, w\)"),
        (torch.rand(1, 3, 30, 32), ValueError, "multiples of the patch size 8; got 30 x 32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        tiny_dinov2(**SMALL)(images)


def test_wrong_options():
    with pytest.raises(ValueError, match="`normalize` must be one of"):
        tiny_dinov2(**SMALL, normalize="none")
    with pytest.raises(TypeError, match=r"no option 'hiden_size'; did you mean 'hidden_size'\?"):
        DINOv2Encoder.from_config({"hiden_size": 32})
    with pytest.raises(ValueError, match="LoRA next to a trainable backbone"):
        dinov2("facebook/dinov2-small", pretrained=False, freeze_backbone=False)
    with pytest.raises(ValueError, match=r"no use for `mix_layers=True`; it takes lora_rank, "):
        DINOv2Encoder(tiny_dinov2(**SMALL).backbone, AdapterOptions(mix_layers=True))
    with pytest.raises(ValueError, match="`lora_place` must be one of 'attention'; got 'feed_for"):
        DINOv2Encoder.from_config({}, AdapterOptions(lora_rank=2, lora_place="feed_forward"))
    with pytest.raises(ValueError, match="`name` must be one of"):
        dinov2("facebook/dinov2-huge", pretrained=False)


def test_it_is_a_visual_encoder_and_registered():
    encoder = VISUAL_ENCODERS.create("tiny", hidden_size=32)
    assert isinstance(encoder, VisualEncoder)
    assert "d_out=32" in repr(encoder)
    with pytest.raises(TypeError, match=r"takes no option 'lora'; did you mean 'lora_rank'\?"):
        VISUAL_ENCODERS.create("dinov2", lora=8)
