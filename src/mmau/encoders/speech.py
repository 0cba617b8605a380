"""Any wav2vec-like model of the transformers library as an audio encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes
from mmau.encoders.backbone import (
    AdaptedBackbone,
    BottleneckAdapter,
    LayerMix,
    check_config_keys,
    inject_lora,
    load_backbone,
    load_config,
    model_class_named,
)
from mmau.encoders.log_mel import Framing, check_waveform
from mmau.encoders.protocols import AudioFeatures, PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

_ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "feed_forward": {"intermediate": ("intermediate_dense",), "output": ("output_dense",)},
    "attention": {"query": ("q_proj",), "value": ("v_proj",)},
}
# Softmax cancels a key bias, and no span is masked here.
_WITHOUT_EFFECT = ("k_proj.bias", "masked_spec_embed")


class HuggingFaceSpeechEncoder(AdaptedBackbone):
    """Turn a 16 kHz waveform into features with the time of each, by any wav2vec-like model.

    It serves wav2vec 2.0, HuBERT, WavLM and whatever else has their convolutions and a Transformer
    with a `feed_forward` in each layer. The frozen backbone stays in evaluation mode, also under
    `.train()`. What learns: after the feed-forward of each layer a `BottleneckAdapter`, LoRA pairs
    if asked for, and a `LayerMix` over all layers. Waveforms longer than `max_chunk` seconds run in
    overlapping chunks of which only the inner part is kept.

    Args:
        backbone: Model of transformers; changed in place.
        d_bottleneck: Inner width of the adapters; `None` for no adapters.
        lora_rank: Rank of LoRA pairs; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_place: Which linear layers get them: both of the `"feed_forward"`, or query and value
            of the `"attention"`.
        mix_layers: Whether the output is a learned mix of all layers, or the last one.
        freeze_backbone: Whether the pretrained weights are left as they are.
        normalize_waveform: Whether each waveform is brought to zero mean and unit variance first.
            `None` decides as most published models do: yes for those with a layer norm in their
            convolutions (Large), no for the others (Base).
        normalize_layers: Whether the layers are normalised before they are mixed.
        max_chunk: Longest stretch that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1], 16 kHz
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, d_out)`, times in seconds, mask; `s` is 0 if `n` is
          shorter than one window (25 ms)

    Raises:
        ValueError: If LoRA is asked for next to a trainable backbone, or where it would do nothing.

    Examples:
        >>> from transformers import HubertConfig, HubertModel
        >>> hubert = HubertModel(HubertConfig(
        ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...     conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ... ))
        >>> encoder = HuggingFaceSpeechEncoder(hubert, d_bottleneck=8)
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, times[0, 0].item() * 16000
        (torch.Size([1, 49, 32]), 199.5)
    """

    sample_rate = 16000

    def __init__(
        self,
        backbone: nn.Module,
        *,
        d_bottleneck: int | None = 64,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_place: LoraPlace = "feed_forward",
        mix_layers: bool = True,
        freeze_backbone: bool = True,
        normalize_waveform: bool | None = None,
        normalize_layers: bool = True,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
        source: PretrainedSource | None = None,
    ) -> None:
        super().__init__(
            backbone,
            freeze_backbone=freeze_backbone,
            lora_rank=lora_rank,
            source=source,
            without_effect=_WITHOUT_EFFECT,
        )
        config: Any = backbone.config
        self.framing = Framing.from_convolutions(
            config.conv_kernel, config.conv_stride, sample_rate=self.sample_rate
        )
        check_range("chunk_margin", chunk_margin, 0)
        check_range("max_chunk", max_chunk, 2 * chunk_margin + 1.0)
        check_choice("lora_place", lora_place, _ROLES)
        self.d_out = int(config.hidden_size)
        self.normalize_waveform = (
            config.feat_extract_norm == "layer"
            if normalize_waveform is None
            else normalize_waveform
        )
        self._chunk = self.framing.count(round(max_chunk * self.sample_rate))
        self._margin = self.framing.count(round(chunk_margin * self.sample_rate))
        config.layerdrop = 0.0
        config.apply_spec_augment = False
        layers: Any = backbone.get_submodule("encoder.layers")
        if lora_rank is not None:
            self._refuse_lora_without_effect(lora_place)
            self._lora_names = inject_lora(
                backbone, _ROLES[lora_place], len(layers), rank=lora_rank, alpha=lora_alpha
            )
        self.adapters = nn.ModuleList()
        if d_bottleneck is not None:
            for layer in layers:
                adapter = BottleneckAdapter(self.d_out, d_bottleneck)
                adapter.attach(layer.feed_forward)
                self.adapters.append(adapter)
        self.layer_mix = (
            LayerMix(len(layers) + 1, normalize=normalize_layers) if mix_layers else None
        )

    def _refuse_lora_without_effect(self, place: LoraPlace) -> None:
        """Refuse LoRA on layers that the model never calls; a subclass knows which."""

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Encode a batch of waveforms."""
        check_shapes(waveform=(waveform, "b n"), lengths=(lengths, "b"))
        counts = check_waveform(waveform, lengths)
        num_features = self.framing.count(waveform.shape[1])
        features = waveform.new_zeros(len(waveform), num_features, self.d_out)
        # Clips of one length run together and never see padding: Base normalises over time, so a
        # padded batch changes its features (by a quarter, measured), mask or not.
        for length in sorted(set(counts.tolist())):
            if self.framing.count(length):
                rows = (counts == length).nonzero().flatten()
                encoded = self._encode(waveform[rows, :length])
                padded = encoded.new_zeros(len(rows), num_features, self.d_out)
                padded[:, : encoded.shape[1]] = encoded
                features = features.to(encoded.dtype).index_copy(
                    0, rows.to(features.device), padded
                )
        return self.framing.label(features, counts)

    def _encode(self, waveform: Tensor) -> Tensor:
        if self.normalize_waveform:
            mean = waveform.mean(-1, keepdim=True)
            variance = waveform.var(-1, unbiased=False, keepdim=True)
            waveform = (waveform - mean) / torch.sqrt(variance + 1e-7)
        pieces = []
        for span in self.framing.chunks(waveform.shape[1], self._chunk, self._margin):
            encoded = self._encode_at_once(waveform[:, span.first_sample : span.last_sample])
            pieces.append(encoded[:, span.keep_from : span.keep_to])
        return torch.cat(pieces, dim=1)

    def _encode_at_once(self, waveform: Tensor) -> Tensor:
        output = self.backbone(waveform, output_hidden_states=self.layer_mix is not None)
        if self.layer_mix is None:
            last: Tensor = output.last_hidden_state
            return last
        # The recorded states of Large end before its final normalisation.
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        mixed: Tensor = self.layer_mix(states)
        return mixed

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        return f"{self.described()}, d_out={self.d_out}"


def hf_speech(
    name: str,
    *,
    model_class: str = "AutoModel",
    d_bottleneck: int | None = 64,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_place: LoraPlace = "feed_forward",
    mix_layers: bool = True,
    normalize_waveform: bool | None = None,
    normalize_layers: bool = True,
    max_chunk: float = 20.0,
    chunk_margin: float = 2.0,
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> HuggingFaceSpeechEncoder:
    """Load the published weights of any wav2vec-like model and freeze them."""
    kind = model_class_named(model_class)
    config = load_config(name, revision=revision)
    if config.model_type == "wavlm":
        raise ValueError(
            f"{name!r} is a WavLM, whose attention needs care; use the audio encoder 'wavlm'."
        )
    for key, value in QUIET.items():
        setattr(config, key, value)
    config._attn_implementation = attention
    backbone = load_backbone(kind, name, config, revision=revision, optional=("masked_spec_embed",))
    return HuggingFaceSpeechEncoder(
        backbone,
        d_bottleneck=d_bottleneck,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_place=lora_place,
        mix_layers=mix_layers,
        normalize_waveform=normalize_waveform,
        normalize_layers=normalize_layers,
        max_chunk=max_chunk,
        chunk_margin=chunk_margin,
        source=PretrainedSource(name, revision),
    )


with hide_broken_torchaudio():
    from transformers import WavLMConfig, WavLMModel
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention


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
    """Build a published WavLM, frozen, with a light adapter."""
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


with hide_broken_torchaudio():
    from transformers import WhisperConfig, WhisperModel
    from transformers.audio_utils import mel_filter_bank


def _size(width: int, layers: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": 4 * width,
    }


WHISPER_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"openai/whisper-{name}": _size(width, layers)
    for name, width, layers in (
        ("tiny", 384, 4),
        ("base", 512, 6),
        ("small", 768, 12),
        ("medium", 1024, 24),
        ("large-v2", 1280, 32),
    )
}
"""Name on the hub to the sizes of the published encoders, for building one with random weights."""

_HOP = 160
_WINDOW = 400
_SECONDS = 30.0
_WHISPER_ROLES = {"query": ("q_proj",), "value": ("v_proj",)}


class WhisperEncoder(AdaptedBackbone):
    r"""Turn a 16 kHz waveform into the features of Whisper's encoder, 50 per second.

    Use `from_pretrained` or `from_config`. Whisper reads exactly 30 seconds: shorter waveforms are
    padded with silence and the features of the silence dropped; longer ones run in overlapping
    chunks of which only the inner part is kept. What goes in is its own log-mel picture,

    $$ \frac{1}{4} \left( \max(\log_{10} M, \max \log_{10} M - 8) + 4 \right) $$

    whose inner maximum is that of the chunk, as in the original. Feature $j$ is centred at sample
    $320 j$.

    Args:
        encoder: `WhisperModel(...).encoder`; changed in place.
        lora_rank: Rank of the LoRA update of each query and value projection; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        freeze_backbone: Whether the pretrained weights are left as they are.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1], 16 kHz
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, d_out)`, times in seconds, mask

    Raises:
        ValueError: If LoRA is asked for next to a trainable backbone.

    References:
        Table 1 of the paper. Radford et al., *Robust Speech Recognition via Large-Scale Weak
        Supervision*, 2022.

    Examples:
        >>> encoder = WhisperEncoder.from_config({
        ...     "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
        ...     "encoder_ffn_dim": 64,
        ... })
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, times[0, :3].tolist()
        (torch.Size([1, 50, 32]), [0.0, 0.02, 0.04])
    """

    sample_rate = 16000
    _mel: Tensor
    _window: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        freeze_backbone: bool = True,
        chunk_margin: float = 2.0,
        source: PretrainedSource | None = None,
    ) -> None:
        check_range("chunk_margin", chunk_margin, 0, 10)
        super().__init__(
            encoder,
            freeze_backbone=freeze_backbone,
            lora_rank=lora_rank,
            source=source,
            # Sines, written down once and for all.
            without_effect=("embed_positions.weight",),
        )
        config: Any = encoder.config
        # A dropped layer would make a frozen encoder noisy, and breaks distributed training.
        config.encoder_layerdrop = 0.0
        for module in (encoder, config):
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0
        self.d_out = int(config.d_model)
        self._margin = round(chunk_margin * self.sample_rate / (2 * _HOP))
        if lora_rank is not None:
            self._lora_names = inject_lora(
                encoder,
                _WHISPER_ROLES,
                int(config.encoder_layers),
                rank=lora_rank,
                alpha=lora_alpha,
            )
        mel = mel_filter_bank(
            num_frequency_bins=1 + _WINDOW // 2,
            num_mel_filters=int(config.num_mel_bins),
            min_frequency=0.0,
            max_frequency=self.sample_rate / 2,
            sampling_rate=self.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("_mel", torch.from_numpy(mel).float(), persistent=False)
        self.register_buffer("_window", torch.hann_window(_WINDOW), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        chunk_margin: float = 2.0,
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        revision: str | None = None,
    ) -> WhisperEncoder:
        """Load published weights, keep the encoder and freeze it.

        Args:
            name: Name on the hub such as `"openai/whisper-base"`, or a local folder.
            lora_rank: Rank of the LoRA update; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
            attention: Attention implementation of transformers.
            revision: Branch, tag or commit.

        Returns:
            The encoder.

        Raises:
            WeightsNotFoundError: If the weights are not here and cannot be fetched.
            ValueError: If the weights are of another kind of model.
        """
        config = load_config(name, revision=revision, model_types=("whisper",))
        config._attn_implementation = attention
        model = load_backbone(WhisperModel, name, config, revision=revision)
        return cls(
            model.get_submodule("encoder"),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            chunk_margin=chunk_margin,
            source=PretrainedSource(name, revision),
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        freeze_backbone: bool | None = None,
        chunk_margin: float = 2.0,
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    ) -> WhisperEncoder:
        """Build an encoder with random weights.

        Args:
            config: Fields of `WhisperConfig`; `WHISPER_ARCHITECTURES` has the published ones.
            lora_rank: Rank of the LoRA update; `None` for none.
            lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
            freeze_backbone: Whether the random weights are frozen; by default with LoRA.
            chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
            attention: Attention implementation of transformers.

        Returns:
            The encoder.

        Raises:
            TypeError: If `config` has a key that is no field.
        """
        check_config_keys(config, WhisperConfig)
        # The decoder is never built at its size: one narrow layer, thrown away.
        small: dict[str, Any] = {
            "decoder_layers": 1,
            "decoder_attention_heads": 1,
            "decoder_ffn_dim": 8,
            "vocab_size": 8,
            "pad_token_id": 0,
            # transformers remarks on those that are outside of so small a vocabulary.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        }
        model = WhisperModel(WhisperConfig(**{**small, **config}, attn_implementation=attention))
        return cls(
            model.get_submodule("encoder"),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            freeze_backbone=lora_rank is not None if freeze_backbone is None else freeze_backbone,
            chunk_margin=chunk_margin,
        )

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Encode a batch of waveforms."""
        check_shapes(waveform=(waveform, "b n"), lengths=(lengths, "b"))
        counts = check_waveform(waveform, lengths)
        step = 2 * _HOP
        num_features = waveform.shape[1] // step
        counts = counts.to(waveform.device)
        present = torch.arange(num_features, device=waveform.device) < (counts // step)[:, None]
        samples = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.masked_fill(samples >= counts[:, None], 0.0)
        chunk = round(_SECONDS * self.sample_rate) // step
        pieces, done = [], 0
        while done < num_features:
            # The last chunk is moved back rather than shortened: no feature loses context.
            first = max(0, min(done - self._margin, num_features - chunk))
            last = min(first + chunk, num_features)
            keep_to = last if last == num_features else last - self._margin
            encoded = self._encode(waveform[:, first * step : (first + chunk) * step])
            pieces.append(encoded[:, done - first : keep_to - first])
            done = keep_to
        features = (
            torch.cat(pieces, dim=1) if pieces else waveform.new_zeros(len(waveform), 0, self.d_out)
        )
        times = torch.arange(num_features, device=waveform.device, dtype=torch.float64)
        return AudioFeatures(
            features.masked_fill(~present[..., None], 0.0),
            (times * step / self.sample_rate).expand(len(waveform), -1),
            present,
        )

    def _encode(self, waveform: Tensor) -> Tensor:
        missing = round(_SECONDS * self.sample_rate) - waveform.shape[1]
        picture = self.log_mel(F.pad(waveform, (0, missing)))
        encoded: Tensor = self.backbone(picture).last_hidden_state
        return encoded

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Compute the picture that Whisper reads.

        Args:
            waveform: `(b, n)`.

        Returns:
            `(b, num_mel_bins, n / 160)`.
        """
        spectrum = torch.stft(
            waveform.float(), _WINDOW, _HOP, window=self._window.float(), return_complex=True
        )
        power = spectrum[..., :-1].abs().square()
        logs = torch.log10((self._mel.T.float() @ power).clamp_min(1e-10))
        logs = logs.maximum(logs.amax((1, 2), keepdim=True) - 8.0)
        picture: Tensor = ((logs + 4.0) / 4.0).to(waveform.dtype)
        return picture

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        return f"{self.described()}, d_out={self.d_out}"


def whisper(
    name: str = "openai/whisper-base",
    *,
    pretrained: bool = True,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    chunk_margin: float = 2.0,
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    revision: str | None = None,
) -> WhisperEncoder:
    """Build the encoder of a published Whisper, frozen."""
    if pretrained:
        return WhisperEncoder.from_pretrained(
            name,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            chunk_margin=chunk_margin,
            attention=attention,
            revision=revision,
        )
    check_choice("name", name, WHISPER_ARCHITECTURES)
    return WhisperEncoder.from_config(
        WHISPER_ARCHITECTURES[name],
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        freeze_backbone=True,
        chunk_margin=chunk_margin,
        attention=attention,
    )


QUIET: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0}
"""Layers dropped and spans masked at random make a frozen model noisy, and dropped layers break
distributed training; both belong to pre-training."""

LoraPlace = Literal["feed_forward", "attention"]
