"""Speech models of the transformers library as audio encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes
from mmau._optional import hide_broken_torchaudio
from mmau.encoders.backbone import (
    AdaptedBackbone,
    AdapterOptions,
    BottleneckAdapter,
    Family,
    LayerMix,
    as_exact_as,
    contradiction,
    encoder_factory,
)
from mmau.encoders.log_mel import Framing, check_waveform
from mmau.encoders.protocols import AudioFeatures, PretrainedSource

with hide_broken_torchaudio():
    from transformers import WavLMConfig, WhisperConfig
    from transformers.audio_utils import mel_filter_bank
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

_SAMPLE_RATE = 16000

_WAV2VEC = Family(
    usual=AdapterOptions(d_bottleneck=64, mix_layers=True, freeze_backbone=True),
    options=tuple(AdapterOptions.__dataclass_fields__),
    lora_places={
        "feed_forward": {"intermediate": ("intermediate_dense",), "output": ("output_dense",)},
        "attention": {"query": ("q_proj",), "value": ("v_proj",)},
    },
    preprocessing="feature_extractor",
    # Softmax cancels a key bias, and no span is masked here.
    without_effect=("k_proj.bias", "masked_spec_embed"),
    may_lack=("masked_spec_embed",),
    # Layers dropped and spans masked at random make a frozen model noisy, and dropped layers break
    # distributed training; both belong to pre-training.
    settings={"layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0},
)


def _check_constants(said: Mapping[str, Any], name: str, **constants: float) -> None:
    """Refuse weights that want another input than the encoder computes."""
    for key, value in constants.items():
        if said.get(key, value) != value:
            raise contradiction(name, f"`{key}={said[key]}`", f"{value}, which is built in")


class HuggingFaceSpeechEncoder(AdaptedBackbone):
    """Turn a 16 kHz waveform into features with the time of each, by any wav2vec-like model.

    It serves wav2vec 2.0, HuBERT, WavLM and whatever else has their convolutions and a Transformer
    with a `feed_forward` in each layer. The frozen backbone stays in evaluation mode, also under
    `.train()`. Waveforms longer than `max_chunk` seconds run in overlapping chunks of which only
    the inner part is kept.

    Args:
        backbone: Model of transformers; changed in place. `from_pretrained` loads one.
        adapters: What learns; by default bottlenecks of width 64 and a mix of all layers, beside a
            frozen backbone.
        normalize_waveform: Whether each waveform is brought to zero mean and unit variance first.
            `None` does what `from_pretrained` finds beside the weights, or as WavLM does: yes for
            models with a layer norm in their convolutions (Large), no for the others (Base).
        max_chunk: Longest segment that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1], 16 kHz
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, d_out)`, times in seconds, mask; `s` is 0 if `n` is
          shorter than one window (25 ms)

    Raises:
        ValueError: If LoRA is asked for where it would do nothing, or an option is out of range.

    Examples:
        >>> from transformers import HubertConfig, HubertModel
        >>> hubert = HubertModel(HubertConfig(
        ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...     conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ... ))
        >>> encoder = HuggingFaceSpeechEncoder(hubert, AdapterOptions(d_bottleneck=8))
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, times[0, 0].item() * 16000
        (torch.Size([1, 49, 32]), 199.5)
    """

    family = _WAV2VEC
    sample_rate = _SAMPLE_RATE

    def __init__(
        self,
        backbone: nn.Module,
        adapters: AdapterOptions | None = None,
        *,
        normalize_waveform: bool | None = None,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
        source: PretrainedSource | None = None,
    ) -> None:
        check_range("chunk_margin", chunk_margin, 0)
        check_range("max_chunk", max_chunk, 2 * chunk_margin + 1.0)
        adapters = self.family.usual if adapters is None else adapters
        super().__init__(backbone, adapters, source)
        config: Any = backbone.config
        self.framing = Framing.from_convolutions(
            config.conv_kernel, config.conv_stride, sample_rate=_SAMPLE_RATE
        )
        self.normalize_waveform = (
            config.feat_extract_norm == "layer"
            if normalize_waveform is None
            else normalize_waveform
        )
        self._chunk = self.framing.count(round(max_chunk * _SAMPLE_RATE))
        self._margin = self.framing.count(round(chunk_margin * _SAMPLE_RATE))
        layers: Any = backbone.get_submodule("encoder.layers")
        self.adapters = nn.ModuleList()
        if adapters.d_bottleneck is not None:
            for layer in layers:
                adapter = BottleneckAdapter(self.d_out, adapters.d_bottleneck)
                adapter.attach(layer.feed_forward)
                self.adapters.append(adapter)
        self.layer_mix = (
            LayerMix(len(layers) + 1, normalize=adapters.normalize_layers)
            if adapters.mix_layers
            else None
        )

    @classmethod
    def _prepare(cls, config: Any, attention: str | None) -> None:
        if config.model_type == "wavlm" and not cls.family.configs:
            raise ValueError(
                f"{config.name_or_path!r} is a WavLM, whose attention needs care; "
                "use the audio encoder 'wavlm'."
            )
        super()._prepare(config, attention)

    @classmethod
    def _follow(
        cls, said: Mapping[str, Any], name: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        _check_constants(said, name, sampling_rate=_SAMPLE_RATE)
        # Where it is left out, transformers normalises.
        stated = bool(said.get("do_normalize", True))
        given = options.get("normalize_waveform")
        if given not in (None, stated):
            taken = f"`normalize_waveform={given}`, which can be left out"
            raise contradiction(name, f"`do_normalize={stated}`", taken)
        return {**options, "normalize_waveform": stated}

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
                padded = F.pad(encoded, (0, 0, 0, num_features - encoded.shape[1]))
                features = features.to(encoded.dtype).index_copy(
                    0, rows.to(features.device), padded
                )
        return self.framing.label(features, counts)

    def _encode(self, waveform: Tensor) -> Tensor:
        if self.normalize_waveform:
            mean = waveform.mean(-1, keepdim=True)
            variance = waveform.var(-1, unbiased=False, keepdim=True)
            waveform = (waveform - mean) / torch.sqrt(variance + 1e-7)
        return self.framing.encode_in_chunks(
            waveform, self._encode_chunk, self._chunk, self._margin
        )

    def _encode_chunk(self, waveform: Tensor) -> Tensor:
        output = self.backbone(
            self._for_backbone(waveform), output_hidden_states=self.layer_mix is not None
        )
        last = as_exact_as(waveform, output.last_hidden_state)
        if self.layer_mix is None:
            return last
        # The recorded states of Large end before its final normalisation.
        states = [as_exact_as(waveform, state) for state in output.hidden_states[:-1]]
        mixed: Tensor = self.layer_mix((*states, last))
        return mixed


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


class WavLMEncoder(HuggingFaceSpeechEncoder):
    """Turn a 16 kHz waveform into WavLM features with the time of each.

    Use `from_pretrained` or `from_config`; behaviour is that of `HuggingFaceSpeechEncoder`.
    `attention` is `"eager"`, that of transformers and the default, or `"sdpa"`, the same numbers
    (to 2.5e-6) through torch's fused kernel. LoRA on the attention needs `"sdpa"`: that of
    transformers never calls the layers that carry it.

    References:
        Section 3.1 and 4.1 of the paper. Chen et al., *WavLM*, 2022.

    Examples:
        >>> import torch
        >>> encoder = tiny_wavlm()
        >>> features, times, mask = encoder(torch.zeros(1, 16000))
        >>> features.shape, times[0, 0].item() * 16000
        (torch.Size([1, 49, 32]), 199.5)
    """

    family = replace(_WAV2VEC, configs=(WavLMConfig,), architectures=WAVLM_ARCHITECTURES)

    @classmethod
    def _prepare(cls, config: Any, attention: str | None) -> None:
        check_choice("attention", attention or "eager", ("eager", "sdpa"))
        super()._prepare(config, "eager")

    @classmethod
    def _backbone_of(cls, model: nn.Module, attention: str | None) -> nn.Module:
        if attention == "sdpa":
            for module in model.modules():
                if type(module) is WavLMAttention:
                    module.__class__ = _SdpaAttention
        return model

    def _lora_roles(self, place: str) -> Any:
        kinds = {type(m) for m in self.backbone.modules() if isinstance(m, WavLMAttention)}
        if place == "attention" and kinds != {_SdpaAttention}:
            raise ValueError(
                'LoRA on the attention of WavLM needs `attention="sdpa"`: the attention of '
                "transformers never calls the layers that would carry it."
            )
        return super()._lora_roles(place)


WHISPER_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"openai/whisper-{name}": {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": 4 * width,
    }
    for name, width, layers in (
        ("tiny", 384, 4),
        ("base", 512, 6),
        ("small", 768, 12),
        ("medium", 1024, 24),
        ("large-v2", 1280, 32),
    )
}
"""Name on the hub to the sizes of the published encoders, for building one with random weights."""

_WHISPER = Family(
    usual=AdapterOptions(freeze_backbone=True),
    lora_places={"attention": {"query": ("q_proj",), "value": ("v_proj",)}},
    preprocessing="feature_extractor",
    # Sines, written down once and for all.
    without_effect=("embed_positions.weight",),
    # A dropped layer would make a frozen encoder noisy, and breaks distributed training.
    settings={"encoder_layerdrop": 0.0, "layerdrop": 0.0},
    configs=(WhisperConfig,),
    # The decoder is never built at its size: one narrow layer, thrown away.
    config_defaults={
        "decoder_layers": 1,
        "decoder_attention_heads": 1,
        "decoder_ffn_dim": 8,
        "vocab_size": 8,
        "pad_token_id": 0,
        # transformers remarks on those that are outside of so small a vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    },
    architectures=WHISPER_ARCHITECTURES,
)


class WhisperEncoder(AdaptedBackbone):
    r"""Turn a 16 kHz waveform into the features of Whisper's encoder, 50 per second.

    Use `from_pretrained` or `from_config`. Whisper reads exactly 30 seconds: shorter waveforms are
    padded with silence and the features of the silence dropped; longer ones run in overlapping
    chunks of which only the inner part is kept. What goes in is its own log-mel spectrogram, always
    in float32,

    $$ \frac{1}{4} \left( \max(\log_{10} M, \max \log_{10} M - 8) + 4 \right) $$

    whose inner maximum is that of the chunk, as in the original. Feature $j$ is centred at sample
    $320 j$.

    Args:
        encoder: `WhisperModel(...).encoder`; changed in place.
        adapters: What learns; by default nothing is added and the backbone is frozen.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1], 16 kHz
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, d_out)`, times in seconds, mask

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

    family = _WHISPER
    sample_rate = _SAMPLE_RATE
    # The second of its two convolutions halves the rate of the spectrogram.
    _WINDOW, _HOP, _CHUNK = 400, 160, 1500
    framing = Framing(2 * _HOP, 2 * _HOP, _SAMPLE_RATE, stamp=0.0)

    _mel: Tensor
    _window: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        adapters: AdapterOptions | None = None,
        *,
        chunk_margin: float = 2.0,
        source: PretrainedSource | None = None,
    ) -> None:
        check_range("chunk_margin", chunk_margin, 0, 10)
        super().__init__(encoder, adapters, source)
        config: Any = encoder.config
        self._margin = round(chunk_margin * _SAMPLE_RATE / self.framing.hop)
        mel = mel_filter_bank(
            num_frequency_bins=1 + self._WINDOW // 2,
            num_mel_filters=int(config.num_mel_bins),
            min_frequency=0.0,
            max_frequency=_SAMPLE_RATE / 2,
            sampling_rate=_SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("_mel", torch.from_numpy(mel).float(), persistent=False)
        self.register_buffer("_window", torch.hann_window(self._WINDOW), persistent=False)

    @classmethod
    def _backbone_of(cls, model: nn.Module, attention: str | None) -> nn.Module:
        return model.get_submodule("encoder")

    @classmethod
    def _follow(
        cls, said: Mapping[str, Any], name: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        _check_constants(
            said,
            name,
            sampling_rate=_SAMPLE_RATE,
            n_fft=cls._WINDOW,
            hop_length=cls._HOP,
            chunk_length=30,
            dither=0.0,
        )
        return dict(options)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Encode a batch of waveforms."""
        check_shapes(waveform=(waveform, "b n"), lengths=(lengths, "b"))
        counts = check_waveform(waveform, lengths).to(waveform.device)
        samples = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.masked_fill(samples >= counts[:, None], 0.0)
        if not self.framing.count(waveform.shape[1]):
            return self.framing.label(waveform.new_zeros(len(waveform), 0, self.d_out), counts)
        features = self.framing.encode_in_chunks(
            waveform, self._encode_chunk, self._CHUNK, self._margin
        )
        return self.framing.label(features, counts)

    def _encode_chunk(self, waveform: Tensor) -> Tensor:
        seconds = F.pad(waveform, (0, self._CHUNK * self.framing.hop - waveform.shape[1]))
        spectrogram = self._for_backbone(self.log_mel(seconds))
        return as_exact_as(waveform, self.backbone(spectrogram).last_hidden_state)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Compute the spectrogram that Whisper reads.

        Args:
            waveform: `(b, n)`.

        Returns:
            `(b, num_mel_bins, n / 160)`.
        """
        spectrum = torch.stft(
            waveform.float(),
            self._WINDOW,
            self._HOP,
            window=self._window.float(),
            return_complex=True,
        )
        power = spectrum[..., :-1].abs().square()
        logs = torch.log10((self._mel.T.float() @ power).clamp_min(1e-10))
        logs = logs.maximum(logs.amax((1, 2), keepdim=True) - 8.0)
        scaled: Tensor = ((logs + 4.0) / 4.0).to(waveform.dtype)
        return scaled


wavlm = encoder_factory(WavLMEncoder, "microsoft/wavlm-large")
whisper = encoder_factory(WhisperEncoder, "openai/whisper-base")
hf_speech = encoder_factory(HuggingFaceSpeechEncoder)


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
    """Build a WavLM small enough to train from scratch on a CPU.

    The seven convolutions keep their kernels and strides, so the features have WavLM's own times.
    """
    config = {
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
    }
    return WavLMEncoder.from_config(
        config,
        AdapterOptions(d_bottleneck=d_bottleneck, mix_layers=True, freeze_backbone=freeze),
        normalize_waveform=False,
        max_chunk=max_chunk,
        chunk_margin=chunk_margin,
    )
