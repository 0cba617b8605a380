"""The encoder of Whisper: the audio encoder of the paper's baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, check_shapes
from mmau.encoders._adapted_backbone import AdaptedBackbone
from mmau.encoders._weights import check_config_keys, load_backbone, load_config
from mmau.encoders.adapters import inject_lora
from mmau.encoders.framing import check_waveform
from mmau.encoders.protocols import AudioFeatures, PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

with hide_broken_torchaudio():
    from transformers import WhisperConfig, WhisperModel
    from transformers.audio_utils import mel_filter_bank

__all__ = ["WHISPER_ARCHITECTURES", "WhisperEncoder", "whisper"]


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
_ROLES = {"query": ("q_proj",), "value": ("v_proj",)}


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
                encoder, _ROLES, int(config.encoder_layers), rank=lora_rank, alpha=lora_alpha
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
    """Build the encoder of a published Whisper, frozen.

    Args:
        name: Name on the hub, or a local folder. The paper does not say which one it took.
        pretrained: Whether to load the weights; without, the architecture of that name is filled
            with random numbers, for tests, planning and timing.
        lora_rank: Rank of the LoRA update; `None` for none.
        lora_alpha: The update is scaled by `lora_alpha / lora_rank`.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        attention: Attention implementation of transformers.
        revision: Branch, tag or commit.

    Returns:
        The encoder.

    Raises:
        ValueError: If `pretrained` is off and the name is none of `WHISPER_ARCHITECTURES`.
    """
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
