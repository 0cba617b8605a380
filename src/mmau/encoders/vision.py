"""Vision transformers of the transformers library as visual encoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_shapes
from mmau._optional import hide_broken_torchaudio
from mmau.encoders.backbone import (
    AdaptedBackbone,
    AdapterOptions,
    Family,
    as_exact_as,
    contradiction,
    encoder_factory,
)
from mmau.encoders.protocols import PretrainedSource, VisualFeatures

with hide_broken_torchaudio():
    from transformers import Dinov2Config, Dinov2WithRegistersConfig, ViTConfig

# Keeps the normalisation of an empty (constant) crop finite and its noise small.
_PER_IMAGE_EPS = 0.05

_VISION = Family(
    lora_places={"attention": {"query": ("query", "q_proj"), "value": ("value", "v_proj")}},
    preprocessing="image_processor",
    # Softmax cancels a key bias, and no token is masked here.
    without_effect=("key.bias", "k_proj.bias", "mask_token"),
    may_lack=("mask_token",),
)


class HuggingFaceVisualEncoder(AdaptedBackbone):
    """Turn face crops into the patch tokens of any vision transformer of transformers.

    It serves ViT, DINOv2, DINOv3, CLIP, SigLIP and whatever else takes `pixel_values` and returns
    `last_hidden_state` with the patches last, in reading order; what comes before them (class and
    register tokens) is dropped. A frozen backbone stays in evaluation mode and keeps no gradients,
    also under `.train()`; only the LoRA pairs learn, and at initialisation they change nothing.
    Crops may have any size that is a multiple of the patch size, if the model interpolates its
    position embeddings.

    Args:
        backbone: Model of transformers; changed in place. `from_pretrained` loads one.
        adapters: What learns; by default nothing is added and the backbone is frozen.
        normalize: `"pretrained"`, the statistics that the weights were trained with, or
            `"per_image"`, zero mean and unit deviation over each crop.
        mean: Mean of red, green and blue in [0, 1] for `"pretrained"`; by default what
            `from_pretrained` finds beside the weights, or that of the family, or of ImageNet.
        std: Deviation of red, green and blue for `"pretrained"`, by default likewise.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - images: `(b, 3, h, w)`, float in [0, 1]
        - output: `VisualFeatures`, `(b, p, d_out)` and the grid

    Examples:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> clip = CLIPVisionModel(CLIPVisionConfig(
        ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...     patch_size=8, image_size=64,
        ... ))
        >>> encoder = HuggingFaceVisualEncoder(clip, AdapterOptions(lora_rank=4))
        >>> features = encoder(torch.rand(2, 3, 64, 64))
        >>> features.patch_tokens.shape, features.grid_size
        (torch.Size([2, 64, 32]), (8, 8))
    """

    family = _VISION
    mean_and_std: ClassVar[tuple[Sequence[float], Sequence[float]]] = (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    """Statistics of the images that the weights were trained with; these are ImageNet's."""

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        adapters: AdapterOptions | None = None,
        *,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        source: PretrainedSource | None = None,
    ) -> None:
        check_choice("normalize", normalize, ("pretrained", "per_image"))
        super().__init__(backbone, adapters, source)
        config: Any = backbone.config
        self.patch_size = int(config.patch_size)
        self.normalize = normalize
        # Where there is such a switch, it is off by default, and other sizes are refused.
        accepted = inspect.signature(backbone.forward).parameters
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        )
        mean, std = mean or self.mean_and_std[0], std or self.mean_and_std[1]
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def _follow(
        cls, said: Mapping[str, Any], name: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        followed = dict(options)
        if options.get("normalize", "pretrained") != "pretrained":
            return followed
        # The file speaks of pixels from 0 to 255; those of `images` are 255 times smaller.
        scale = 255 * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1)
        mean, std = cls.mean_and_std
        statistics = {"mean": said.get("image_mean", mean), "std": said.get("image_std", std)}
        if not said.get("do_normalize", True):
            statistics = {"mean": 0.0, "std": 1.0}
        for option, value in statistics.items():
            stated = (torch.tensor(value, dtype=torch.float64) / scale).expand(3)
            given = options.get(option)
            if given is None:
                followed[option] = stated.tolist()
            # Rounded statistics are the same statistics.
            elif not torch.allclose(stated, stated.new_tensor(given), rtol=0, atol=1e-3):
                taken = f"`{option}={given}`, which can be left out"
                raise contradiction(name, f"{stated.tolist()} for pixels in [0, 1]", taken)
        return followed

    def forward(self, images: Tensor) -> VisualFeatures:
        """Encode a batch of crops."""
        check_shapes(images=(images, "b 3 h w"))
        if not images.is_floating_point():
            raise TypeError(
                f"`images` must be float in [0, 1]; got {images.dtype}; divide uint8 by 255."
            )
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"height and width of `images` must be multiples of the patch size "
                f"{self.patch_size}; got {height} x {width}."
            )
        pixels = self._for_backbone(self._normalized(images))
        output = self.backbone(pixel_values=pixels, **self._options)
        tokens = as_exact_as(images, output.last_hidden_state)
        grid = (height // self.patch_size, width // self.patch_size)
        # Counted from the end: how many class and register tokens there are is the model's affair.
        prefix = tokens.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(
                f"{type(self.backbone).__name__} returned {tokens.shape[1]} tokens for a grid of "
                f"{grid[0]} x {grid[1]} patches: it does not keep one token per patch."
            )
        return VisualFeatures(tokens[:, prefix:], grid)

    def _normalized(self, images: Tensor) -> Tensor:
        if self.normalize == "pretrained":
            return (images - self._mean) / self._std
        mean = images.mean((1, 2, 3), keepdim=True)
        deviation = images.std((1, 2, 3), keepdim=True)
        return (images - mean) / (deviation + _PER_IMAGE_EPS)

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        sizes = f"patch_size={self.patch_size}, normalize={self.normalize!r}"
        return f"{super().extra_repr()}, {sizes}"


_DINOV2_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}
DINOV2_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"facebook/dinov2-{registers}{size}": {
        **sizes,
        "image_size": 518,
        "patch_size": 14,
        **({"num_register_tokens": 4} if registers else {}),
    }
    for registers in ("", "with-registers-")
    for size, sizes in _DINOV2_SIZES.items()
}
"""Name on the hub to the sizes of the published models, for building one with random weights."""


class DINOv2Encoder(HuggingFaceVisualEncoder):
    """Turn face crops into DINOv2 patch tokens.

    Use `from_pretrained` or `from_config`; behaviour is that of `HuggingFaceVisualEncoder`. The
    paper gives no rank for LoRA; pretrained weights get 8 unless `adapters` say otherwise. A config
    with `num_register_tokens` above 0 selects the model with registers.

    References:
        Section 3.1 and 4.1 of the paper. Oquab et al., *DINOv2*, 2023.

    Examples:
        >>> import torch
        >>> encoder = tiny_dinov2()
        >>> features = encoder(torch.rand(2, 3, 64, 64))
        >>> features.patch_tokens.shape, features.grid_size
        (torch.Size([2, 64, 48]), (8, 8))
    """

    family = replace(
        _VISION,
        usual=AdapterOptions(lora_rank=8),
        configs=(Dinov2Config, Dinov2WithRegistersConfig),
        config_defaults={"use_mask_token": False},
        architectures=DINOV2_ARCHITECTURES,
    )

    @classmethod
    def _config_class(cls, config: Mapping[str, Any]) -> Any:
        return Dinov2WithRegistersConfig if config.get("num_register_tokens") else Dinov2Config


VIT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224": {},
    "google/vit-base-patch16-224-in21k": {},
    "google/vit-large-patch16-224": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
"""Name on the hub to the sizes of the published models, for building one with random weights."""


class ViTEncoder(HuggingFaceVisualEncoder):
    """Turn face crops into the patch tokens of a ViT trained for classification.

    Use `from_pretrained` or `from_config`; behaviour is that of `HuggingFaceVisualEncoder`. The
    row "baseline" of the paper's ablation has a ViT-Base; the paper does not say whether it is
    fine-tuned, and `from_pretrained` freezes it unless `adapters` say otherwise.

    References:
        Table 1 of the paper. Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021.

    Examples:
        >>> import torch
        >>> encoder = ViTEncoder.from_config({
        ...     "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        ...     "patch_size": 16, "image_size": 224,
        ... })
        >>> encoder(torch.rand(1, 3, 224, 224)).grid_size
        (14, 14)
    """

    family = replace(
        _VISION,
        usual=AdapterOptions(freeze_backbone=True),
        configs=(ViTConfig,),
        model_options={"add_pooling_layer": False},
        architectures=VIT_ARCHITECTURES,
    )
    # These weights were trained on images brought to [-1, 1].
    mean_and_std = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


dinov2 = encoder_factory(DINOv2Encoder, "facebook/dinov2-large")
vit = encoder_factory(ViTEncoder, "google/vit-base-patch16-224")
hf_vision = encoder_factory(HuggingFaceVisualEncoder, lora_rank=8)


def tiny_dinov2(
    *,
    hidden_size: int = 48,
    num_layers: int = 2,
    num_heads: int = 2,
    patch_size: int = 8,
    image_size: int = 64,
    mlp_ratio: int = 2,
    num_register_tokens: int = 0,
    normalize: Literal["pretrained", "per_image"] = "per_image",
    lora_rank: int | None = None,
) -> DINOv2Encoder:
    """Build a DINOv2 small enough to train from scratch on a CPU."""
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "patch_size": patch_size,
        "image_size": image_size,
        "mlp_ratio": mlp_ratio,
        "num_register_tokens": num_register_tokens,
    }
    adapters = AdapterOptions(lora_rank=lora_rank)
    return DINOv2Encoder.from_config(config, adapters, normalize=normalize)
