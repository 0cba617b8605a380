"""WavLM as an audio encoder: frozen, with an adapter in each layer and a mix of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel

from mmau._checks import check_choice, check_range, check_shapes
from mmau.encoders._weights import check_config_keys, load_backbone, load_config, own_names
from mmau.encoders.adapters import BottleneckAdapter, LayerMix, freeze
from mmau.encoders.framing import Framing, check_waveform
from mmau.encoders.protocols import AudioFeatures, PretrainedSource

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

# Layers dropped and spans masked at random make a frozen model noisy, and dropped layers break
# distributed training; both belong to pre-training.
_QUIET: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0}


class WavLMEncoder(nn.Module):
    """Turn a 16 kHz waveform into WavLM features with the time of each.

    Use `from_pretrained` or `from_config`. The frozen backbone stays in evaluation mode, also under
    `.train()`. After the feed-forward of each layer comes a `BottleneckAdapter`; a `LayerMix` then
    averages all layers. (LoRA on WavLM's attention would do nothing: transformers hands the weights
    to a fused function and never calls the layers that carry it.) Waveforms longer than
    `max_chunk` seconds run in overlapping chunks of which only the inner part is kept.

    Args:
        backbone: `WavLMModel`; changed in place.
        d_bottleneck: Inner width of the adapters; `None` for no adapters.
        freeze_backbone: Whether the pretrained weights are left as they are.
        normalize_waveform: Whether each waveform is brought to zero mean and unit variance first.
            `None` decides as the published models do: yes for Large, no for Base.
        normalize_layers: Whether the layers are normalised before they are mixed.
        max_chunk: Longest stretch that is encoded at once, in seconds.
        chunk_margin: Overlap that is thrown away on either side of a chunk, in seconds.
        source: Where the backbone's weights can be had again, if anywhere.

    Shape:
        - waveform: `(b, n)`, float in [-1, 1], 16 kHz
        - lengths: `(b,)`, number of real samples of each; all `n` if left out
        - output: `AudioFeatures`, `(b, s, d_out)`, times in seconds, mask; `s` is 0 if `n` is
          shorter than one window (25 ms)

    References:
        Section 3.1 and 4.1 of the paper. Chen et al., *WavLM*, 2022.

    Examples:
        >>> encoder = tiny_wavlm()
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
        freeze_backbone: bool = True,
        normalize_waveform: bool | None = None,
        normalize_layers: bool = True,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
        source: PretrainedSource | None = None,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        self.framing = Framing.from_convolutions(
            config.conv_kernel, config.conv_stride, sample_rate=self.sample_rate
        )
        check_range("chunk_margin", chunk_margin, 0)
        check_range("max_chunk", max_chunk, 2 * chunk_margin + 1.0)
        self.d_out = int(config.hidden_size)
        self.source = source
        self.freeze_backbone = freeze_backbone
        self.normalize_waveform = (
            config.feat_extract_norm == "layer"
            if normalize_waveform is None
            else normalize_waveform
        )
        self._chunk = self.framing.count(round(max_chunk * self.sample_rate))
        self._margin = self.framing.count(round(chunk_margin * self.sample_rate))
        config.layerdrop = 0.0
        config.apply_spec_augment = False
        self.backbone = backbone
        layers: Any = backbone.get_submodule("encoder.layers")
        if freeze_backbone:
            freeze(backbone)
        else:
            _freeze_without_effect(backbone)
        self.adapters = nn.ModuleList()
        if d_bottleneck is not None:
            for layer in layers:
                adapter = BottleneckAdapter(self.d_out, d_bottleneck)
                adapter.attach(layer.feed_forward)
                self.adapters.append(adapter)
        self.layer_mix = LayerMix(len(layers) + 1, normalize=normalize_layers)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        d_bottleneck: int | None = 64,
        normalize_layers: bool = True,
        max_chunk: float = 20.0,
        chunk_margin: float = 2.0,
        revision: str | None = None,
    ) -> WavLMEncoder:
        """Load published weights and freeze them, beside new adapters.

        Args:
            name: Name on the hub such as `"microsoft/wavlm-large"`, or a local folder.
            d_bottleneck: Inner width of the adapters; `None` for no adapters.
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
        for key, value in _QUIET.items():
            setattr(config, key, value)
        backbone = load_backbone(
            WavLMModel, name, config, revision=revision, optional=("masked_spec_embed",)
        )
        return cls(
            backbone,
            d_bottleneck=d_bottleneck,
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
            freeze_backbone: Whether the random weights are frozen; by default with adapters.
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
        backbone = WavLMModel(WavLMConfig(**{**config, **_QUIET}))
        return cls(
            backbone,
            d_bottleneck=d_bottleneck,
            freeze_backbone=d_bottleneck is not None
            if freeze_backbone is None
            else freeze_backbone,
            normalize_waveform=normalize_waveform,
            normalize_layers=normalize_layers,
            max_chunk=max_chunk,
            chunk_margin=chunk_margin,
        )

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
                features = features.to(encoded.dtype).index_copy(0, rows, padded)
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
        output = self.backbone(waveform, output_hidden_states=True)
        # The recorded states of Large end before its final normalisation.
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        mixed: Tensor = self.layer_mix(states)
        return mixed

    def train(self, mode: bool = True) -> WavLMEncoder:
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
            Adapters and layer mix, and the backbone unless it is frozen and can be fetched again.
        """
        tensors = {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if not name.startswith("backbone.")
        }
        if self.source is None or not self.freeze_backbone:
            tensors.update(own_names(self.backbone))
        return tensors

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        source = self.source.name if self.source else "random weights"
        return f"{source}, d_out={self.d_out}, freeze_backbone={self.freeze_backbone}"


def _freeze_without_effect(backbone: nn.Module) -> None:
    """Freeze what cannot learn: softmax cancels a key bias, and no span is masked here."""
    for name, parameter in backbone.named_parameters():
        if name.endswith(("k_proj.bias", "masked_spec_embed")):
            parameter.requires_grad_(False)


def wavlm(
    name: str = "microsoft/wavlm-large",
    *,
    pretrained: bool = True,
    d_bottleneck: int | None = 64,
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
            normalize_layers=normalize_layers,
            max_chunk=max_chunk,
            chunk_margin=chunk_margin,
            revision=revision,
        )
    check_choice("name", name, WAVLM_ARCHITECTURES)
    return WavLMEncoder.from_config(
        WAVLM_ARCHITECTURES[name],
        d_bottleneck=d_bottleneck,
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
