"""Any wav2vec-like model of the transformers library as an audio encoder."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes
from mmau.encoders._adapted_backbone import AdaptedBackbone
from mmau.encoders._weights import load_backbone, load_config, model_class_named
from mmau.encoders.adapters import BottleneckAdapter, LayerMix, inject_lora
from mmau.encoders.framing import Framing, check_waveform
from mmau.encoders.protocols import AudioFeatures, PretrainedSource

__all__ = ["QUIET", "HuggingFaceSpeechEncoder", "LoraPlace", "hf_speech"]

QUIET: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0}
"""Layers dropped and spans masked at random make a frozen model noisy, and dropped layers break
distributed training; both belong to pre-training."""

LoraPlace = Literal["feed_forward", "attention"]

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
    """Load the published weights of any wav2vec-like model and freeze them.

    Args:
        name: Name on the hub such as `"facebook/hubert-large-ll60k"`, or a local folder.
        model_class: Class of transformers.
        d_bottleneck: Inner width of the adapters; `None` for no adapters.
        lora_rank: Rank of LoRA pairs; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        lora_place: Which linear layers get them.
        mix_layers: Whether the output is a learned mix of all layers, or the last one.
        normalize_waveform: Whether each waveform is normalised first; `None` decides by the model.
        normalize_layers: Whether the layers are normalised before they are mixed.
        max_chunk: Longest stretch that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        attention: Attention implementation of transformers.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        WeightsNotFoundError: If the weights are not here and cannot be fetched.
        ValueError: If transformers has no such class, the weights do not fill it, or it is a WavLM.
    """
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
