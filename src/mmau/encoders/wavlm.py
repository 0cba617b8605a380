"""WavLM as an audio encoder: frozen, with an adapter in each layer and a mix of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_choice
from mmau.encoders._weights import check_config_keys, load_backbone, load_config
from mmau.encoders.hugging_face_speech import QUIET, HuggingFaceSpeechEncoder, LoraPlace
from mmau.encoders.protocols import PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

with hide_broken_torchaudio():
    from transformers import WavLMConfig, WavLMModel
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

__all__ = ["WAVLM_ARCHITECTURES", "WavLMEncoder", "tiny_wavlm", "wavlm"]

WAVLM_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "microsoft/wavlm-base": {},
    "microsoft/wavlm-base-plus": {},
    "microsoft/wavlm-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
}
"""Name on the hub to the sizes of the published models, for building one with random weights."""


class _SdpaAttention(WavLMAttention):  # type: ignore[misc]
    """WavLM's attention through its own projections and torch's fused kernel.

    transformers hands the weights of the projections to one function and never calls the layers,
    so that LoRA pairs beside them would do nothing.
    """

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, None]:
        batch, length, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = gated_position_bias.view(batch, self.num_heads, length, length)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], -float("inf"))
        attended = F.scaled_dot_product_attention(
            query, key, value, bias.to(query.dtype), self.dropout if self.training else 0.0
        )
        joined: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return joined, None


def _use_attention(backbone: nn.Module, attention: Literal["eager", "sdpa"]) -> nn.Module:
    check_choice("attention", attention, ("eager", "sdpa"))
    if attention == "sdpa":
        for module in backbone.modules():
            if type(module) is WavLMAttention:
                module.__class__ = _SdpaAttention
    return backbone


class WavLMEncoder(HuggingFaceSpeechEncoder):
    """Turn a 16 kHz waveform into WavLM features with the time of each.

    Use `from_pretrained` or `from_config`; options and behaviour are those of
    `HuggingFaceSpeechEncoder`. LoRA on its attention would do nothing with the attention of
    transformers, which never calls the layers that carry it: it needs `attention="sdpa"`, the same
    numbers (to 2.5e-6) by another path.

    References:
        Section 3.1 and 4.1 of the paper. Chen et al., *WavLM*, 2022.

    Examples:
        >>> import torch
        >>> encoder = tiny_wavlm()
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, times[0, 0].item() * 16000
        (torch.Size([1, 49, 32]), 199.5)
    """

    def _refuse_lora_without_effect(self, place: LoraPlace) -> None:
        kinds = {type(m) for m in self.backbone.modules() if isinstance(m, WavLMAttention)}
        if place == "attention" and kinds != {_SdpaAttention}:
            raise ValueError(
                'LoRA on the attention of WavLM needs `attention="sdpa"`: the attention of '
                "transformers never calls the layers that would carry it."
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        d_bottleneck: int | None = 64,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_place: LoraPlace = "feed_forward",
        mix_layers: bool = True,
        attention: Literal["eager", "sdpa"] = "eager",
        normalize_layers: bool = True,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
        revision: str | None = None,
    ) -> WavLMEncoder:
        """Load published weights and freeze them, beside new adapters.

        Args:
            name: Name on the hub such as `"microsoft/wavlm-large"`, or a local folder.
            d_bottleneck: Inner width of the adapters; `None` for no adapters.
            lora_rank: Rank of LoRA pairs; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_place: Which linear layers get them.
            mix_layers: Whether the output is a learned mix of all layers, or the last one.
            attention: That of transformers, or the same through torch's fused kernel.
            normalize_layers: Whether the layers are normalised before they are mixed.
            max_chunk: Longest stretch that is encoded at once, in seconds.
            chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
            revision: Branch, tag or commit.

        Returns:
            The encoder.

        Raises:
            WeightsNotFoundError: If the weights are not here and cannot be fetched.
            ValueError: If the weights are of another kind of model.
        """
        config = load_config(name, revision=revision, model_types=("wavlm",))
        for key, value in QUIET.items():
            setattr(config, key, value)
        backbone = load_backbone(
            WavLMModel, name, config, revision=revision, optional=("masked_spec_embed",)
        )
        return cls(
            _use_attention(backbone, attention),
            d_bottleneck=d_bottleneck,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_place=lora_place,
            mix_layers=mix_layers,
            normalize_layers=normalize_layers,
            max_chunk=max_chunk,
            chunk_margin=chunk_margin,
            source=PretrainedSource(name, revision),
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        d_bottleneck: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_place: LoraPlace = "feed_forward",
        mix_layers: bool = True,
        attention: Literal["eager", "sdpa"] = "eager",
        freeze_backbone: bool | None = None,
        normalize_waveform: bool | None = None,
        normalize_layers: bool = True,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
    ) -> WavLMEncoder:
        """Build an encoder with random weights.

        Args:
            config: Fields of `WavLMConfig`; `WAVLM_ARCHITECTURES` has the published ones.
            d_bottleneck: Inner width of the adapters; `None` for no adapters.
            lora_rank: Rank of LoRA pairs; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            lora_place: Which linear layers get them.
            mix_layers: Whether the output is a learned mix of all layers, or the last one.
            attention: That of transformers, or the same through torch's fused kernel.
            freeze_backbone: Whether the random weights are frozen; by default if anything
                is added to them.
            normalize_waveform: Whether each waveform is normalised first.
            normalize_layers: Whether the layers are normalised before they are mixed.
            max_chunk: Longest stretch that is encoded at once, in seconds.
            chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.

        Returns:
            The encoder.

        Raises:
            TypeError: If `config` has a key that is no field.
        """
        check_config_keys(config, WavLMConfig)
        backbone = WavLMModel(WavLMConfig(**{**config, **QUIET}))
        adapted = d_bottleneck is not None or lora_rank is not None
        return cls(
            _use_attention(backbone, attention),
            d_bottleneck=d_bottleneck,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_place=lora_place,
            mix_layers=mix_layers,
            freeze_backbone=adapted if freeze_backbone is None else freeze_backbone,
            normalize_waveform=normalize_waveform,
            normalize_layers=normalize_layers,
            max_chunk=max_chunk,
            chunk_margin=chunk_margin,
        )


def wavlm(
    name: str = "microsoft/wavlm-large",
    *,
    pretrained: bool = True,
    d_bottleneck: int | None = 64,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_place: LoraPlace = "feed_forward",
    mix_layers: bool = True,
    attention: Literal["eager", "sdpa"] = "eager",
    normalize_layers: bool = True,
    max_chunk: float = 20.0,
    chunk_margin: float = 2.0,
    revision: str | None = None,
) -> WavLMEncoder:
    """Build a published WavLM, frozen, with a light adapter.

    Args:
        name: Name on the hub, or a local folder.
        pretrained: Whether to load the weights; without, the architecture of that name is filled
            with random numbers, for tests, planning and timing.
        d_bottleneck: Inner width of the adapters; `None` for no adapters.
        lora_rank: Rank of LoRA pairs; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_place: Which linear layers get them.
        mix_layers: Whether the output is a learned mix of all layers, or the last one.
        attention: That of transformers, or the same through torch's fused kernel.
        normalize_layers: Whether the layers are normalised before they are mixed.
        max_chunk: Longest stretch that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        ValueError: If `pretrained` is off and the name is none of `WAVLM_ARCHITECTURES`.
    """
    if pretrained:
        return WavLMEncoder.from_pretrained(
            name,
            d_bottleneck=d_bottleneck,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_place=lora_place,
            mix_layers=mix_layers,
            attention=attention,
            normalize_layers=normalize_layers,
            max_chunk=max_chunk,
            chunk_margin=chunk_margin,
            revision=revision,
        )
    check_choice("name", name, WAVLM_ARCHITECTURES)
    return WavLMEncoder.from_config(
        WAVLM_ARCHITECTURES[name],
        d_bottleneck=d_bottleneck,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_place=lora_place,
        mix_layers=mix_layers,
        attention=attention,
        freeze_backbone=True,
        normalize_layers=normalize_layers,
        max_chunk=max_chunk,
        chunk_margin=chunk_margin,
    )


def tiny_wavlm(
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    conv_dim: int = 16,
    freeze: bool = False,
    d_bottleneck: int | None = None,
    max_chunk: float = 20.0,
    chunk_margin: float = 2.0,
) -> WavLMEncoder:
    """Build the same class small enough to train from scratch on a CPU.

    The seven convolutions keep their kernels and strides, so the features have WavLM's own times.

    Args:
        hidden_size: Width of the features.
        num_layers: Number of Transformer layers.
        num_heads: Attention heads.
        conv_dim: Channels of the convolutions.
        freeze: Whether the random weights are frozen; by default all of them learn.
        d_bottleneck: Inner width of the adapters; `None` for no adapters.
        max_chunk: Longest stretch that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.

    Returns:
        The encoder.
    """
    return WavLMEncoder.from_config(
        {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "intermediate_size": 2 * hidden_size,
            "conv_dim": [conv_dim] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "num_buckets": 32,
            "max_bucket_distance": 80,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        d_bottleneck=d_bottleneck,
        freeze_backbone=freeze,
        normalize_waveform=False,
        max_chunk=max_chunk,
        chunk_margin=chunk_margin,
    )
