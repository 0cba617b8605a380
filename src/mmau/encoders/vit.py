"""The plain vision transformer: the visual encoder of the paper's baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mmau._checks import check_choice
from mmau.encoders._weights import check_config_keys, load_backbone, load_config
from mmau.encoders.hugging_face_vision import HuggingFaceVisualEncoder
from mmau.encoders.protocols import PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

with hide_broken_torchaudio():
    from transformers import ViTConfig, ViTModel

__all__ = ["VIT_ARCHITECTURES", "ViTEncoder", "vit"]

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
    """Build a published ViT.

    Args:
        name: Name on the hub, or a local folder.
        pretrained: Whether to load the weights; without, the architecture of that name is filled
            with random numbers, for tests, planning and timing.
        lora_rank: Rank of the LoRA update; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_layers: Adapt only the last so many layers.
        freeze_backbone: Whether the weights are left as they are.
        normalize: How crops are normalised.
        attention: Attention implementation of transformers.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        ValueError: If `pretrained` is off and the name is none of `VIT_ARCHITECTURES`.
    """
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
