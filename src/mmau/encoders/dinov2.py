"""DINOv2 as a visual encoder: frozen, with LoRA on query and value, or trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from mmau._checks import check_choice
from mmau.encoders._weights import check_config_keys, load_backbone, load_config
from mmau.encoders.hugging_face_vision import HuggingFaceVisualEncoder
from mmau.encoders.protocols import PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

with hide_broken_torchaudio():
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

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
    normalize: Literal["pretrained", "per_image"] = "per_image",
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
