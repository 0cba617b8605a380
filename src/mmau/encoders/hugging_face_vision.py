"""Any vision transformer of the transformers library as a visual encoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_shapes
from mmau.encoders._adapted_backbone import AdaptedBackbone
from mmau.encoders._weights import load_backbone, load_config, model_class_named
from mmau.encoders.adapters import inject_lora
from mmau.encoders.protocols import PretrainedSource, VisualFeatures

__all__ = ["HuggingFaceVisualEncoder", "hf_vision"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ROLES = {"query": ("query", "q_proj"), "value": ("value", "v_proj")}
# Keeps the normalisation of an empty (constant) crop finite and its noise small.
_PER_IMAGE_EPS = 0.05
# Softmax cancels a key bias, and no token is masked here.
_WITHOUT_EFFECT = ("key.bias", "k_proj.bias", "mask_token")


class HuggingFaceVisualEncoder(AdaptedBackbone):
    """Turn face crops into the patch tokens of any vision transformer of transformers.

    It serves ViT, DINOv2, DINOv3, CLIP, SigLIP and whatever else takes `pixel_values` and returns
    `last_hidden_state` with the patches last, in reading order; what comes before them (class and
    register tokens) is dropped. A frozen backbone stays in evaluation mode and keeps no gradients,
    also under `.train()`; only the LoRA pairs learn, and at initialisation they change nothing.
    Crops may have any size that is a multiple of the patch size, if the model interpolates its
    position embeddings.

    Args:
        backbone: Model of transformers; changed in place.
        lora_rank: Rank of the LoRA update of each query and value projection; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_layers: Adapt only that many layers, counted from the output; all if `None`.
        freeze_backbone: Whether the pretrained weights are left as they are; needed with LoRA.
        normalize: `"pretrained"`, the statistics that the weights were trained with, or
            `"per_image"`, zero mean and unit deviation over each crop.
        mean: Mean of red, green and blue for `"pretrained"`; those of ImageNet by default.
        std: Deviation of red, green and blue for `"pretrained"`.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - images: `(b, 3, h, w)`, float in [0, 1]
        - output: `VisualFeatures`, `(b, p, d_out)` and the grid

    Raises:
        ValueError: If LoRA is asked for next to a trainable backbone.

    Examples:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> clip = CLIPVisionModel(CLIPVisionConfig(
        ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...     patch_size=8, image_size=64,
        ... ))
        >>> encoder = HuggingFaceVisualEncoder(clip, lora_rank=4)
        >>> features = encoder(torch.rand(2, 3, 64, 64))
        >>> features.patch_tokens.shape, features.grid_size
        (torch.Size([2, 64, 32]), (8, 8))
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        freeze_backbone: bool = True,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        source: PretrainedSource | None = None,
    ) -> None:
        check_choice("normalize", normalize, ("pretrained", "per_image"))
        super().__init__(
            backbone,
            freeze_backbone=freeze_backbone,
            lora_rank=lora_rank,
            source=source,
            without_effect=_WITHOUT_EFFECT,
        )
        config: Any = backbone.config
        self.d_out = int(config.hidden_size)
        self.patch_size = int(config.patch_size)
        self.normalize = normalize
        # Where there is such a switch, it is off by default, and other sizes are refused.
        accepted = inspect.signature(backbone.forward).parameters
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        )
        if lora_rank is not None:
            self._lora_names = inject_lora(
                backbone,
                _ROLES,
                int(config.num_hidden_layers),
                rank=lora_rank,
                alpha=lora_alpha,
                last_layers=lora_layers,
            )
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)

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
        output = self.backbone(pixel_values=self._normalized(images), **self._options)
        tokens: Tensor = output.last_hidden_state
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
        return (
            f"{self.described()}, d_out={self.d_out}, patch_size={self.patch_size}, "
            f"normalize={self.normalize!r}"
        )


def hf_vision(
    name: str,
    *,
    model_class: str = "AutoModel",
    lora_rank: int | None = 8,
    lora_alpha: float = 16.0,
    lora_layers: int | None = None,
    freeze_backbone: bool = True,
    normalize: Literal["pretrained", "per_image"] = "pretrained",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> HuggingFaceVisualEncoder:
    """Load the published weights of any vision transformer.

    Args:
        name: Name on the hub such as `"facebook/dinov3-vitl16-pretrain-lvd1689m"`, or a folder.
        model_class: Class of transformers; `"CLIPVisionModel"` takes the vision half of a CLIP.
        lora_rank: Rank of the LoRA update of queries and values; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_layers: Adapt only the last so many layers.
        freeze_backbone: Whether the pretrained weights are left as they are.
        normalize: How crops are normalised.
        mean: Mean of red, green and blue that the weights were trained with.
        std: Deviation of red, green and blue.
        attention: Attention implementation of transformers.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        WeightsNotFoundError: If the weights are not here and cannot be fetched.
        ValueError: If transformers has no such class, or the weights do not fill it.
    """
    kind = model_class_named(model_class)
    config = load_config(name, revision=revision)
    # A checkpoint of several towers keeps the sizes of each in a config of its own.
    config = getattr(config, "vision_config", config) if model_class != "AutoModel" else config
    config._attn_implementation = attention
    backbone = load_backbone(kind, name, config, revision=revision, optional=("mask_token",))
    return HuggingFaceVisualEncoder(
        backbone,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_layers=lora_layers,
        freeze_backbone=freeze_backbone,
        normalize=normalize,
        mean=mean,
        std=std,
        source=PretrainedSource(name, revision),
    )
