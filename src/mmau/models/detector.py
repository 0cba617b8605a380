"""The whole system as one module: crops, landmarks and audio in, Action Unit logits out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.action_units import AU_NAMES
from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.encoders.protocols import AudioFeatures, VisualFeatures
from mmau.functional.time_alignment import interpolate_features
from mmau.models.config import DetectorConfig
from mmau.modules import (
    HGA,
    TEMPORAL_MODELS,
    AsymmetricCrossAttention,
    LandmarkToPatch,
    RegionMerge,
)
from mmau.modules.frame_chunked import run_in_chunks

NO_AUDIO = "this detector was built without an audio encoder; leave audio out."
PRIOR = 0.15
"""Share of frames in which an Action Unit is active, where the head's bias starts."""


class AUDetector(nn.Module):
    """Detect Action Units in every frame of a clip from the face and the audio.

    It receives built parts and looks up no names; `build_detector` makes them from a config. Each
    step is a method, so that features can be cached, long videos encoded in chunks, and single
    stages trained:

    1. `encode_frames`: crops and landmarks to region tokens, frame by frame;
    2. `merge_regions`: region tokens to one vector a frame, a learned one where there is no face;
    3. `encode_audio`, `align_audio`: waveform to one vector a frame, with a mask;
    4. `classify`: both through time to logits.

    Args:
        visual_encoder: Images to patch tokens, a `VisualEncoder`.
        temporal: A temporal model; its `d_model` is the width of the visual vector of a frame, its
            `d_audio` the width of the audio vector, or `None` for a detector without audio.
        merge: Region tokens `(..., m, d)` to `(..., d_model)`, such as `RegionMerge`; `None` if
            there is one token of width `d_model` already.
        landmark_to_patch: Landmarks to patch membership; needed with `hga`.
        hga: Patch tokens to region tokens; `None` averages all patch tokens into one.
        audio_encoder: Waveform to features, an `AudioEncoder`; `None` for a detector without audio.
        audio_projection: Audio features to `d_audio`, or to what the cross-attention takes; `None`
            leaves them as they are.
        audio_cross_attention: An `AsymmetricCrossAttention` from frames to audio features; `None`
            interpolates the features at the times of the frames.
        au_names: Names of the outputs, in order.
        dropout: Dropout before the merge and before the head, in [0, 1).
        frames_per_chunk: Frames that the visual encoder takes at once; all if `None`.
        checkpoint_frames: Whether the activations of a chunk are computed again in the backward
            pass rather than stored; with `frames_per_chunk` this bounds the memory of training.
        config: How it was built, for the checkpoint; `build_detector` gives it.

    Shape:
        - images: `(b, t, 3, h, w)` float in [0, 1]
        - landmarks: `(b, t, k, 2)`, x then y, pixels of the crop
        - valid: `(b, t)` bool, whether there is a face
        - waveform: `(b, n)` float in [-1, 1], 16 kHz
        - frame_times: `(b, t)`, seconds after the first audio sample
        - output: `(b, t, c)` logits

    Raises:
        ValueError: If the parts do not fit together.

    References:
        Sections 3.1 to 3.3 of the paper. The vector for a missing face and the merge of regions are
        ours; the paper is silent.
    """

    def __init__(
        self,
        *,
        visual_encoder: nn.Module,
        temporal: nn.Module,
        merge: nn.Module | None = None,
        landmark_to_patch: nn.Module | None = None,
        hga: nn.Module | None = None,
        audio_encoder: nn.Module | None = None,
        audio_projection: nn.Module | None = None,
        audio_cross_attention: AsymmetricCrossAttention | None = None,
        au_names: Sequence[str] = AU_NAMES,
        dropout: float = 0.1,
        frames_per_chunk: int | None = None,
        checkpoint_frames: bool = False,
        config: DetectorConfig | None = None,
    ) -> None:
        super().__init__()
        check_range("dropout", dropout, 0, 1, open_high=True)
        if frames_per_chunk is not None:
            check_range("frames_per_chunk", frames_per_chunk, 1)
        # Parts are of any class that has what is read here.
        temporal_model, encoder, regions = (
            cast("Any", part) for part in (temporal, visual_encoder, landmark_to_patch)
        )
        self.d_model = int(temporal_model.d_model)
        self.d_audio: int | None = temporal_model.d_audio
        if (hga is None) != (landmark_to_patch is None):
            raise ValueError("`hga` and `landmark_to_patch` belong together: give both or neither.")
        if (audio_encoder is None) != (self.d_audio is None):
            given = "none" if audio_encoder is None else type(audio_encoder).__name__
            raise ValueError(
                "`audio_encoder` and the `d_audio` of the temporal model belong together; got "
                f"audio encoder {given} and d_audio={self.d_audio}."
            )
        if audio_cross_attention is not None and audio_encoder is None:
            raise ValueError("`audio_cross_attention` needs an `audio_encoder`; got None.")
        self.visual_encoder = visual_encoder
        self.landmark_to_patch = landmark_to_patch
        self.hga = hga
        self.d_region = int(encoder.d_out if hga is None else cast("Any", hga).d_model)
        self.num_regions = 1 if regions is None else int(regions.num_regions)
        self.region_norm = nn.LayerNorm(self.d_region)
        self.merge = merge
        self.no_face = nn.Parameter(torch.empty(self.d_model))
        self.audio_encoder = audio_encoder
        self.audio_projection = audio_projection
        self.audio_cross_attention = audio_cross_attention
        self.temporal = temporal
        self.dropout = nn.Dropout(dropout)
        self.head_norm = nn.LayerNorm(self.d_model)
        self.head = nn.Linear(self.d_model, len(au_names))
        self.au_names = tuple(au_names)
        self.frames_per_chunk = frames_per_chunk
        self.checkpoint_frames = checkpoint_frames
        self.config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the head at the prior, and the missing face as a small random vector."""
        nn.init.normal_(self.no_face, std=0.02)
        nn.init.constant_(self.head.bias, math.log(PRIOR / (1 - PRIOR)))

    # ------------------------------------------------------------------ the face
    def encode_frames(
        self,
        images: Tensor,
        landmarks: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        frames_per_chunk: int | None = None,
    ) -> Tensor:
        """Turn single frames into region tokens.

        Args:
            images: `(n, 3, h, w)`, float in [0, 1].
            landmarks: `(n, k, 2)`, pixels of the crop; NaN counts as not visible. Not needed with
                global pooling.
            visible: `(n, k)` bool, which landmarks may be used; all if left out.
            frames_per_chunk: Frames at once; the detector's own setting if left out.

        Returns:
            `(n, m, d)`, one token per region; `m` is 1 with global pooling.

        Raises:
            ValueError: If the shapes disagree, or landmarks are needed and absent.
        """
        check_shapes(
            images=(images, "n 3 h w"), landmarks=(landmarks, "n k 2"), visible=(visible, "n k")
        )
        check_mask("visible", visible)
        if self.hga is not None and landmarks is None:
            raise ValueError("`landmarks` are needed to find the regions; got None.")
        tokens: Tensor = run_in_chunks(
            self._encode_chunk,
            (images, landmarks, visible),
            frames_per_chunk or self.frames_per_chunk,
            recompute=self.checkpoint_frames,
        )
        return tokens

    def _encode_chunk(
        self, images: Tensor, landmarks: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        encoded: VisualFeatures = self.visual_encoder(images)
        if self.hga is None or self.landmark_to_patch is None or landmarks is None:
            return encoded.patch_tokens.mean(1, keepdim=True)
        regions = self.landmark_to_patch(
            landmarks,
            grid_size=encoded.grid_size,
            image_size=tuple(images.shape[-2:]),
            visible=visible,
        )
        tokens: Tensor = self.hga(encoded.patch_tokens, regions.weights).tokens
        return tokens

    def merge_regions(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Turn region tokens into one vector a frame.

        Args:
            tokens: `(b, t, m, d)`; what stands in frames without a face has no influence.
            valid: `(b, t)` bool, whether there is a face.

        Returns:
            `(b, t, d_model)`; one learned vector where there is no face.

        Raises:
            ValueError: If the shapes disagree.
        """
        check_shapes(
            sizes={"m": self.num_regions, "d": self.d_region},
            tokens=(tokens, "b t m d"),
            valid=(valid, "b t"),
        )
        check_mask("valid", valid)
        known = tokens.masked_fill(~valid[..., None, None], 0.0)
        regions = self.dropout(self.region_norm(known))
        visual = regions.squeeze(-2) if self.merge is None else self.merge(regions)
        return torch.where(valid[..., None], visual, self.no_face.to(visual.dtype))

    # ------------------------------------------------------------------ the audio
    def encode_audio(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Turn a waveform into features with times of their own.

        Args:
            waveform: `(b, n)`, float in [-1, 1], 16 kHz.
            lengths: `(b,)`, number of real samples of each; 0 for a clip without audio.

        Returns:
            Features, times in seconds after the first sample, and mask.

        Raises:
            ValueError: If the detector was built without an audio encoder.
        """
        if self.audio_encoder is None:
            raise ValueError(NO_AUDIO)
        encoded: AudioFeatures = self.audio_encoder(waveform, lengths)
        return encoded

    def align_audio(
        self,
        visual: Tensor,
        features: Tensor,
        feature_times: Tensor,
        frame_times: Tensor,
        feature_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Bring audio features to the times of the frames.

        Args:
            visual: `(b, t, d_model)`, from `merge_regions`; the queries of cross-attention.
            features: `(b, s, a)`, from `encode_audio`.
            feature_times: `(b, s)`, seconds after the first sample.
            frame_times: `(b, t)`, seconds after the first sample.
            feature_mask: `(b, s)` bool, which features may be used.

        Returns:
            `(b, t, d_audio)` and the audio mask `(b, t)` bool: True within the longest gap of
            interpolation, or within the window of cross-attention.

        Raises:
            ValueError: If the detector was built without an audio encoder, or the shapes disagree.
        """
        if self.d_audio is None:
            raise ValueError(NO_AUDIO)
        check_shapes(
            sizes={"d": self.d_model},
            visual=(visual, "b t d"),
            features=(features, "b s a"),
            feature_times=(feature_times, "b s"),
            frame_times=(frame_times, "b t"),
            feature_mask=(feature_mask, "b s"),
        )
        if features.shape[1] == 0:
            return visual.new_zeros(*visual.shape[:2], self.d_audio), visual.new_zeros(
                visual.shape[:2], dtype=torch.bool
            )
        if self.audio_projection is not None:
            features = self.audio_projection(features)
        if self.audio_cross_attention is None:
            return interpolate_features(
                features, feature_times, frame_times, feature_mask=feature_mask
            )
        return self.audio_cross_attention.attend_by_blocks(
            visual, features, frame_times, feature_times, feature_mask
        )

    # ------------------------------------------------------------------ through time
    def classify(
        self,
        visual: Tensor,
        audio: Tensor | None = None,
        *,
        audio_mask: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """Turn the two streams into logits.

        Args:
            visual: `(b, t, d_model)`, from `merge_regions`.
            audio: `(b, t, d_audio)`, from `align_audio`; `None` for a clip without audio.
            audio_mask: `(b, t)` bool, where there is audio; everywhere if left out.
            mask: `(b, t)` bool, which frames exist; all if left out.
            state: What the last call returned, to continue in the same video.

        Returns:
            Logits `(b, t, c)`, and the state after the last frame.

        Raises:
            ValueError: If the shapes disagree, or audio is given to a detector without.
        """
        if self.d_audio is None and audio is not None:
            raise ValueError(NO_AUDIO)
        check_shapes(
            sizes={"d": self.d_model, "a": self.d_audio or 0},
            visual=(visual, "b t d"),
            audio=(audio, "b t a"),
            audio_mask=(audio_mask, "b t"),
            mask=(mask, "b t"),
        )
        check_mask("audio_mask", audio_mask)
        if self.d_audio is not None and audio is None:
            audio = visual.new_zeros(*visual.shape[:2], self.d_audio)
            audio_mask = visual.new_zeros(visual.shape[:2], dtype=torch.bool)
        out, state = self.temporal(visual, audio, audio_mask=audio_mask, mask=mask, state=state)
        return self.head(self.dropout(self.head_norm(out))), state

    def forward(
        self,
        images: Tensor,
        landmarks: Tensor | None,
        valid: Tensor,
        waveform: Tensor | None = None,
        frame_times: Tensor | None = None,
        *,
        visible: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run all steps over a batch of clips; frames without a face are not encoded."""
        check_shapes(
            images=(images, "b t 3 h w"),
            landmarks=(landmarks, "b t k 2"),
            valid=(valid, "b t"),
            visible=(visible, "b t k"),
            frame_times=(frame_times, "b t"),
            waveform=(waveform, "b n"),
        )
        check_mask("valid", valid)
        visual = self.merge_regions(self._encode_valid(images, landmarks, valid, visible), valid)
        audio = audio_mask = None
        if waveform is not None:
            if frame_times is None:
                raise ValueError("`frame_times` are needed to align `waveform`; got None.")
            encoded = self.encode_audio(waveform, lengths)
            audio, audio_mask = self.align_audio(
                visual, encoded.features, encoded.times, frame_times, encoded.mask
            )
        logits, _ = self.classify(visual, audio, audio_mask=audio_mask, mask=mask)
        return logits

    def _encode_valid(
        self, images: Tensor, landmarks: Tensor | None, valid: Tensor, visible: Tensor | None
    ) -> Tensor:
        chosen = valid.flatten()
        frames = images.flatten(0, 1)
        if not bool(chosen.any()):
            # One blank frame, whose token is not used: the encoder's parameters then get zero
            # gradients rather than none, which distributed training insists on.
            chosen = torch.arange(len(chosen), device=chosen.device) == 0
            frames = torch.zeros_like(frames)
        encoded = self.encode_frames(
            frames[chosen],
            None if landmarks is None else landmarks.flatten(0, 1)[chosen],
            None if visible is None else visible.flatten(0, 1)[chosen],
        )
        tokens = encoded.new_zeros(len(chosen), *encoded.shape[1:])
        return tokens.index_put((chosen,), encoded).view(*valid.shape, *encoded.shape[1:])

    def extra_repr(self) -> str:
        """Show the sizes and the outputs."""
        return (
            f"d_model={self.d_model}, num_regions={self.num_regions}, d_audio={self.d_audio}, "
            f"au_names={', '.join(self.au_names)}"
        )


def build_detector(config: DetectorConfig) -> AUDetector:
    """Build a detector, with random weights except those that its encoders fetch.

    Args:
        config: Names and options.

    Returns:
        The detector; its `config` is the argument.

    Raises:
        UnknownComponentError: If a name is not registered.
        MissingDependencyError: If a component's library is not installed.
        WeightsNotFoundError: If pretrained weights cannot be had.
        ValueError: If the parts do not fit together.

    Examples:
        >>> from mmau.models import Component
        >>> config = DetectorConfig(
        ...     visual=Component("tiny"), audio=Component("log_mel", {"num_mels": 24}),
        ...     d_region=32, num_heads=4, d_model=32, d_audio=16, crop_size=64,
        ... )
        >>> detector = build_detector(config)
        >>> detector.d_model, detector.d_audio, len(detector.au_names)
        (32, 16, 12)
    """
    visual_encoder = VISUAL_ENCODERS.create(config.visual.name, **config.visual.options)
    if config.crop_size % visual_encoder.patch_size:
        raise ValueError(
            f"`crop_size` must be a multiple of the patch size {visual_encoder.patch_size} of "
            f"{config.visual.name!r}; got {config.crop_size}."
        )
    landmark_to_patch = hga = None
    if config.alignment == "hga":
        landmark_to_patch = LandmarkToPatch(config.regions)
        hga = HGA(visual_encoder.d_out, config.d_region, config.num_heads)
        merge = RegionMerge(
            landmark_to_patch.num_regions, config.d_region, config.d_model, mode=config.merge
        )
    else:
        merge = RegionMerge(1, visual_encoder.d_out, config.d_model, mode="flatten")

    audio_encoder = audio_projection = audio_cross_attention = d_audio = None
    if config.audio is not None:
        audio_encoder = AUDIO_ENCODERS.create(config.audio.name, **config.audio.options)
        audio_projection = nn.Sequential(
            nn.Linear(audio_encoder.d_out, config.d_audio),
            nn.GELU(),
            nn.Linear(config.d_audio, config.d_audio),
        )
        d_audio = config.d_audio
        if config.fusion == "cross_attention":
            d_audio = config.d_model
            audio_cross_attention = AsymmetricCrossAttention(
                config.d_model, config.d_audio, config.num_heads, window=config.fusion_window
            )
    return AUDetector(
        visual_encoder=visual_encoder,
        landmark_to_patch=landmark_to_patch,
        hga=hga,
        merge=merge,
        audio_encoder=audio_encoder,
        audio_projection=audio_projection,
        audio_cross_attention=audio_cross_attention,
        temporal=TEMPORAL_MODELS.create(
            config.temporal.name, config.d_model, d_audio, **config.temporal.options
        ),
        au_names=config.au_names,
        dropout=config.dropout,
        frames_per_chunk=config.frames_per_chunk,
        checkpoint_frames=config.checkpoint_frames,
        config=config,
    )
