"""Any vision transformer of the transformers library as a visual encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_shapes
from mmau.encoders.backbone import (
    AdaptedBackbone,
    check_config_keys,
    inject_lora,
    load_backbone,
    load_config,
    model_class_named,
)
from mmau.encoders.protocols import PretrainedSource, VisualFeatures
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

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
    """Load the published weights of any vision transformer."""
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


with hide_broken_torchaudio():
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )


_SIZES: dict[str, dict[str, Any]] = {
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
    for size, sizes in _SIZES.items()
}
"""Name on the hub to the sizes of the published models, for building one with random weights."""


class DINOv2Encoder(HuggingFaceVisualEncoder):
    """Turn face crops into DINOv2 patch tokens.

    Use `from_pretrained` or `from_config`; options and behaviour are those of
    `HuggingFaceVisualEncoder`. The paper gives no rank for LoRA; `from_pretrained` takes 8.

    References:
        Section 3.1 and 4.1 of the paper. Oquab et al., *DINOv2*, 2023.

    Examples:
        >>> import torch
        >>> encoder = tiny_dinov2()
        >>> features = encoder(torch.rand(2, 3, 64, 64))
        >>> features.patch_tokens.shape, features.grid_size
        (torch.Size([2, 64, 48]), (8, 8))
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        lora_rank: int | None = 8,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        revision: str | None = None,
    ) -> DINOv2Encoder:
        """Load published weights and freeze them, beside new LoRA pairs.

        Args:
            name: Name on the hub such as `"facebook/dinov2-large"`, or a local folder.
            lora_rank: Rank of the LoRA update; `None` for a wholly frozen encoder.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_layers: Adapt only the last so many layers.
            normalize: How crops are normalised.
            attention: Attention implementation of transformers.
            revision: Branch, tag or commit.

        Returns:
            The encoder.

        Raises:
            WeightsNotFoundError: If the weights are not here and cannot be fetched.
            ValueError: If the weights are of another kind of model.
        """
        config = load_config(
            name, revision=revision, model_types=("dinov2", "dinov2_with_registers")
        )
        config._attn_implementation = attention
        registers = config.model_type == "dinov2_with_registers"
        backbone = load_backbone(
            Dinov2WithRegistersModel if registers else Dinov2Model,
            name,
            config,
            revision=revision,
            optional=("mask_token",),
        )
        return cls(
            backbone,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            normalize=normalize,
            source=PretrainedSource(name, revision),
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    ) -> DINOv2Encoder:
        """Build an encoder with random weights.

        Args:
            config: Fields of `Dinov2Config`, such as `hidden_size`; `num_register_tokens` above 0
                selects the model with registers. `DINOV2_ARCHITECTURES` has the published ones.
            lora_rank: `None`: everything is trainable. A rank: the random backbone is frozen.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_layers: Adapt only the last so many layers.
            normalize: How crops are normalised.
            attention: Attention implementation of transformers.

        Returns:
            The encoder.

        Raises:
            TypeError: If `config` has a key that is no field.
        """
        fields = dict(config)
        registers = int(fields.pop("num_register_tokens", 0))
        check_config_keys(fields, Dinov2Config)
        backbone: nn.Module
        if registers:
            fields.pop("use_mask_token", None)
            backbone = Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(
                    **fields, num_register_tokens=registers, attn_implementation=attention
                )
            )
        else:
            fields.setdefault("use_mask_token", False)
            backbone = Dinov2Model(Dinov2Config(**fields, attn_implementation=attention))
        return cls(
            backbone,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            freeze_backbone=lora_rank is not None,
            normalize=normalize,
        )


def dinov2(
    name: str = "facebook/dinov2-large",
    *,
    pretrained: bool = True,
    lora_rank: int | None = 8,
    lora_alpha: float = 16.0,
    lora_layers: int | None = None,
    normalize: Literal["pretrained", "per_image"] = "pretrained",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> DINOv2Encoder:
    """Build a published DINOv2, frozen, with LoRA on query and value."""
    if pretrained:
        return DINOv2Encoder.from_pretrained(
            name,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            normalize=normalize,
            attention=attention,
            revision=revision,
        )
    check_choice("name", name, DINOV2_ARCHITECTURES)
    return DINOv2Encoder.from_config(
        DINOV2_ARCHITECTURES[name],
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_layers=lora_layers,
        normalize=normalize,
        attention=attention,
    )


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
    """Build the same class small enough to train from scratch on a CPU."""
    return DINOv2Encoder.from_config(
        {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "patch_size": patch_size,
            "image_size": image_size,
            "mlp_ratio": mlp_ratio,
            "num_register_tokens": num_register_tokens,
        },
        lora_rank=lora_rank,
        normalize=normalize,
    )


with hide_broken_torchaudio():
    from transformers import ViTConfig, ViTModel


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

# These weights were trained on images brought to [-1, 1].
_HALF = (0.5, 0.5, 0.5)


class ViTEncoder(HuggingFaceVisualEncoder):
    """Turn face crops into the patch tokens of a ViT trained for classification.

    Use `from_pretrained` or `from_config`; options and behaviour are those of
    `HuggingFaceVisualEncoder`. The row "baseline" of the paper's ablation has a ViT-Base; the paper
    does not say whether it is fine-tuned, and `from_pretrained` freezes it.

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

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        freeze_backbone: bool = True,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        revision: str | None = None,
    ) -> ViTEncoder:
        """Load published weights.

        Args:
            name: Name on the hub such as `"google/vit-base-patch16-224"`, or a local folder.
            lora_rank: Rank of the LoRA update; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_layers: Adapt only the last so many layers.
            freeze_backbone: Whether the pretrained weights are left as they are.
            normalize: How crops are normalised.
            attention: Attention implementation of transformers.
            revision: Branch, tag or commit.

        Returns:
            The encoder.

        Raises:
            WeightsNotFoundError: If the weights are not here and cannot be fetched.
            ValueError: If the weights are of another kind of model.
        """
        config = load_config(name, revision=revision, model_types=("vit",))
        config._attn_implementation = attention
        backbone = load_backbone(
            ViTModel, name, config, revision=revision, options={"add_pooling_layer": False}
        )
        return cls(
            backbone,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            freeze_backbone=freeze_backbone,
            normalize=normalize,
            mean=_HALF,
            std=_HALF,
            source=PretrainedSource(name, revision),
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        freeze_backbone: bool | None = None,
        normalize: Literal["pretrained", "per_image"] = "pretrained",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    ) -> ViTEncoder:
        """Build an encoder with random weights.

        Args:
            config: Fields of `ViTConfig`; `VIT_ARCHITECTURES` has the published ones.
            lora_rank: Rank of the LoRA update; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_layers: Adapt only the last so many layers.
            freeze_backbone: Whether the random weights are frozen; by default with LoRA.
            normalize: How crops are normalised.
            attention: Attention implementation of transformers.

        Returns:
            The encoder.

        Raises:
            TypeError: If `config` has a key that is no field.
        """
        check_config_keys(config, ViTConfig)
        backbone = ViTModel(
            ViTConfig(**dict(config), attn_implementation=attention), add_pooling_layer=False
        )
        return cls(
            backbone,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            freeze_backbone=lora_rank is not None if freeze_backbone is None else freeze_backbone,
            normalize=normalize,
            mean=_HALF,
            std=_HALF,
        )


def vit(
    name: str = "google/vit-base-patch16-224",
    *,
    pretrained: bool = True,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_layers: int | None = None,
    freeze_backbone: bool = True,
    normalize: Literal["pretrained", "per_image"] = "pretrained",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> ViTEncoder:
    """Build a published ViT."""
    if pretrained:
        return ViTEncoder.from_pretrained(
            name,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            freeze_backbone=freeze_backbone,
            normalize=normalize,
            attention=attention,
            revision=revision,
        )
    check_choice("name", name, VIT_ARCHITECTURES)
    return ViTEncoder.from_config(
        VIT_ARCHITECTURES[name],
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_layers=lora_layers,
        freeze_backbone=freeze_backbone,
        normalize=normalize,
        attention=attention,
    )
