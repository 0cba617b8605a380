"""DINOv2 as a visual encoder: frozen, with LoRA on query and value, or trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from mmau._checks import check_choice, check_shapes
from mmau.encoders._weights import check_config_keys, load_backbone, load_config, own_names
from mmau.encoders.adapters import freeze, inject_lora
from mmau.encoders.protocols import PretrainedSource, VisualFeatures

__all__ = ["DINOV2_ARCHITECTURES", "DINOv2Encoder", "dinov2", "tiny_dinov2"]

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

_ROLES = {"query": ("query", "q_proj"), "value": ("value", "v_proj")}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Keeps the normalisation of an empty (constant) crop finite and its noise small.
_PER_IMAGE_EPS = 0.05


class DINOv2Encoder(nn.Module):
    """Turn face crops into DINOv2 patch tokens.

    Use `from_pretrained` or `from_config`. A frozen backbone stays in evaluation mode and keeps no
    gradients, also under `.train()`; only the LoRA pairs learn. The class token and the register
    tokens are dropped. Crops may have any size that is a multiple of the patch size; position
    embeddings are interpolated. At initialisation LoRA changes nothing.

    Args:
        backbone: `Dinov2Model` or `Dinov2WithRegistersModel`; changed in place.
        lora_rank: Rank of the LoRA update of each query and value projection; `None` for none. The
            paper gives no rank.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_layers: Adapt only that many layers, counted from the output; all if `None`.
        freeze_backbone: Whether the pretrained weights are left as they are; needed with LoRA.
        normalize: `"imagenet"`, the statistics DINOv2 was trained with, or `"per_image"`, zero mean
            and unit deviation over each crop.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - images: `(b, 3, h, w)`, float in [0, 1]
        - output: `VisualFeatures`, `(b, p, d_out)` and the grid

    References:
        Section 3.1 and 4.1 of the paper. Oquab et al., *DINOv2*, 2023.

    Examples:
        >>> encoder = tiny_dinov2()
        >>> features = encoder(torch.rand(2, 3, 64, 64))
        >>> features.patch_tokens.shape, features.grid_size
        (torch.Size([2, 64, 48]), (8, 8))
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        lora_rank: int | None = 8,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        freeze_backbone: bool = True,
        normalize: Literal["imagenet", "per_image"] = "imagenet",
        source: PretrainedSource | None = None,
    ) -> None:
        super().__init__()
        check_choice("normalize", normalize, ("imagenet", "per_image"))
        if lora_rank is not None and not freeze_backbone:
            raise ValueError(
                "LoRA next to a trainable backbone has no effect of its own; "
                "use `lora_rank=None` or `freeze_backbone=True`."
            )
        config: Any = backbone.config
        self.d_out = int(config.hidden_size)
        self.patch_size = int(config.patch_size)
        self.normalize = normalize
        self.source = source
        self.freeze_backbone = freeze_backbone
        self.num_prefix_tokens = 1 + int(getattr(config, "num_register_tokens", 0))
        self.backbone = backbone
        self._lora_names: dict[str, str] = {}
        if freeze_backbone:
            freeze(backbone)
        else:
            _freeze_without_effect(backbone)
        if lora_rank is not None:
            self._lora_names = inject_lora(
                backbone,
                _ROLES,
                int(config.num_hidden_layers),
                rank=lora_rank,
                alpha=lora_alpha,
                last_layers=lora_layers,
            )
        self.register_buffer("_mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        lora_rank: int | None = 8,
        lora_alpha: float = 16.0,
        lora_layers: int | None = None,
        normalize: Literal["imagenet", "per_image"] = "imagenet",
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
        normalize: Literal["imagenet", "per_image"] = "imagenet",
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
        tokens = self.backbone(pixel_values=self._normalized(images)).last_hidden_state
        grid = (height // self.patch_size, width // self.patch_size)
        return VisualFeatures(tokens[:, self.num_prefix_tokens :], grid)

    def _normalized(self, images: Tensor) -> Tensor:
        if self.normalize == "imagenet":
            return (images - self._mean) / self._std
        mean = images.mean((1, 2, 3), keepdim=True)
        deviation = images.std((1, 2, 3), keepdim=True)
        return (images - mean) / (deviation + _PER_IMAGE_EPS)

    def train(self, mode: bool = True) -> DINOv2Encoder:
        """Switch training mode; a frozen backbone stays in evaluation mode.

        Args:
            mode: Whether to train.

        Returns:
            The encoder itself.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint needs, under names of our own.

        Returns:
            The LoRA pairs, and the backbone unless it is frozen and can be fetched again.
        """
        live = dict(self.backbone.named_parameters())
        tensors: dict[str, Tensor] = {own: live[name] for own, name in self._lora_names.items()}
        if self.source is None or not self.freeze_backbone:
            tensors.update(own_names(self.backbone))
        return tensors

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        source = self.source.name if self.source else "random weights"
        return (
            f"{source}, d_out={self.d_out}, patch_size={self.patch_size}, "
            f"normalize={self.normalize!r}, freeze_backbone={self.freeze_backbone}"
        )


def _freeze_without_effect(backbone: nn.Module) -> None:
    """Freeze what cannot learn: softmax cancels a key bias, and no token is masked here."""
    for name, parameter in backbone.named_parameters():
        if name.endswith(("key.bias", "k_proj.bias", "mask_token")):
            parameter.requires_grad_(False)


def dinov2(
    name: str = "facebook/dinov2-large",
    *,
    pretrained: bool = True,
    lora_rank: int | None = 8,
    lora_alpha: float = 16.0,
    lora_layers: int | None = None,
    normalize: Literal["imagenet", "per_image"] = "imagenet",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> DINOv2Encoder:
    """Build a published DINOv2, frozen, with LoRA on query and value.

    Args:
        name: Name on the hub, or a local folder.
        pretrained: Whether to load the weights; without, the architecture of that name is filled
            with random numbers, for tests, planning and timing.
        lora_rank: Rank of the LoRA update; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_layers: Adapt only the last so many layers.
        normalize: How crops are normalised.
        attention: Attention implementation of transformers.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        ValueError: If `pretrained` is off and the name is none of `DINOV2_ARCHITECTURES`.
    """
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
    normalize: Literal["imagenet", "per_image"] = "per_image",
    lora_rank: int | None = None,
) -> DINOv2Encoder:
    """Build the same class small enough to train from scratch on a CPU.

    Args:
        hidden_size: Width of the tokens.
        num_layers: Number of Transformer layers.
        num_heads: Attention heads.
        patch_size: Side of a patch in pixels.
        image_size: Side of the crop in pixels that the position embeddings are made for.
        mlp_ratio: Hidden width of the feed-forward over `hidden_size`.
        num_register_tokens: Register tokens, which are dropped from the output.
        normalize: How crops are normalised.
        lora_rank: `None`: everything is trainable. A rank: frozen random weights beside LoRA.

    Returns:
        The encoder.
    """
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
