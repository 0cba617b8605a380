"""The whole system as one module: crops, landmarks and sound in, Action Unit logits out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmau._checks import check_mask, check_range, check_shapes
from mmau.action_units import AU_NAMES
from mmau.encoders.protocols import AudioFeatures, VisualFeatures
from mmau.functional.time_alignment import interpolate_features
from mmau.models.audio_alignment import retrieve_audio
from mmau.modules.frame_chunked import run_in_chunks


class AUDetector(nn.Module):
    """Detect Action Units in every frame of a clip from the face and the sound.

    It receives built parts and looks up no names; `build_detector` makes them from a config. Each
    step is a method, so that features can be cached, long videos encoded in pieces, and single
    stages trained:

    1. `encode_frames`: crops and landmarks to region tokens, frame by frame;
    2. `merge_regions`: region tokens to one vector a frame, a learned one where there is no face;
    3. `encode_audio`, `align_audio`: sound to one vector a frame, with a mask;
    4. `classify`: both through time to logits.

    Args:
        visual_encoder: Images to patch tokens, a `VisualEncoder`.
        temporal: A temporal model of width `d_model`; its `d_audio` says whether it takes a guide.
        d_model: Width of the visual vector of a frame.
        merge: Region tokens `(..., m, d)` to `(..., d_model)`, such as `RegionMerge`; `None` if
            there is one token of width `d_model` already.
        landmark_to_patch: Landmarks to patch membership; needed with `hga`.
        hga: Patch tokens to region tokens; `None` averages all patch tokens into one.
        audio_encoder: Waveform to features, an `AudioEncoder`; `None` for a detector without sound.
        audio_projection: Audio features to the width of the guide, or to what `fusion` takes;
            `None` leaves them as they are.
        fusion: How audio features become one vector a frame: `"interpolate"` onto the frame's time,
            or an `AsymmetricCrossAttention`, by which the frame retrieves what it wants.
        au_names: Names of the outputs, in order.
        dropout: Dropout before the merge and before the head, in [0, 1).
        frames_per_chunk: Frames that the visual encoder sees at once; all if `None`.
        checkpoint_frames: Whether the activations of a chunk are computed again in the backward
            pass rather than stored; with `frames_per_chunk` this bounds the memory of training.
        prior: Share of frames in which an Action Unit is active; the head's bias starts there.

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
        d_model: int,
        merge: nn.Module | None = None,
        landmark_to_patch: nn.Module | None = None,
        hga: nn.Module | None = None,
        audio_encoder: nn.Module | None = None,
        audio_projection: nn.Module | None = None,
        fusion: Literal["interpolate"] | nn.Module | None = None,
        au_names: Sequence[str] = AU_NAMES,
        dropout: float = 0.1,
        frames_per_chunk: int | None = None,
        checkpoint_frames: bool = False,
        prior: float = 0.15,
    ) -> None:
        super().__init__()
        check_range("dropout", dropout, 0, 1, open_high=True)
        check_range("prior", prior, 0, 1, open_low=True, open_high=True)
        if frames_per_chunk is not None:
            check_range("frames_per_chunk", frames_per_chunk, 1)
        self.d_guide = _width_of_guide(temporal)
        if (hga is None) != (landmark_to_patch is None):
            raise ValueError("`hga` and `landmark_to_patch` belong together: give both or neither.")
        if (audio_encoder is None) != (self.d_guide is None):
            encoder = "none" if audio_encoder is None else type(audio_encoder).__name__
            raise ValueError(
                "`audio_encoder` and the `d_audio` of the temporal model belong together; got "
                f"audio encoder {encoder} and d_audio={self.d_guide}."
            )
        if (audio_encoder is None) != (fusion is None):
            raise ValueError(
                f"`fusion` and `audio_encoder` belong together: give both or neither; "
                f"got fusion={fusion!r}."
            )
        if isinstance(fusion, str) and fusion != "interpolate":
            raise ValueError(f"`fusion` must be 'interpolate' or a module; got {fusion!r}.")
        self.visual_encoder = visual_encoder
        self.landmark_to_patch = landmark_to_patch
        self.hga = hga
        self.d_region = (
            _attribute(visual_encoder, "d_out") if hga is None else _attribute(hga, "d_model")
        )
        self.num_regions = (
            1 if landmark_to_patch is None else _attribute(landmark_to_patch, "num_regions")
        )
        self.region_norm = nn.LayerNorm(self.d_region)
        self.merge = merge
        self.no_face = nn.Parameter(torch.empty(d_model))
        self.audio_encoder = audio_encoder
        self.audio_projection = audio_projection
        self.audio_query = fusion if isinstance(fusion, nn.Module) else None
        self.temporal = temporal
        self.dropout = nn.Dropout(dropout)
        self.head_norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, len(au_names))
        self.au_names = tuple(au_names)
        self.d_model = d_model
        self.frames_per_chunk = frames_per_chunk
        self.checkpoint_frames = checkpoint_frames
        self._prior = prior
        self.config: Any = None  # the DetectorConfig, if `build_detector` made it
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the head at the prior, and the missing face as a small random vector."""
        nn.init.normal_(self.no_face, std=0.02)
        nn.init.constant_(self.head.bias, math.log(self._prior / (1 - self._prior)))

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

    # ------------------------------------------------------------------ the sound
    def encode_audio(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFeatures:
        """Turn a waveform into features on a clock of their own.

        Args:
            waveform: `(b, n)`, float in [-1, 1], 16 kHz.
            lengths: `(b,)`, number of real samples of each; 0 for a clip without sound.

        Returns:
            Features, times in seconds after the first sample, and mask.

        Raises:
            ValueError: If the detector was built without sound.
        """
        if self.audio_encoder is None:
            raise ValueError("this detector was built without an audio encoder; leave sound out.")
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
        """Bring audio features onto the clock of the frames.

        Args:
            visual: `(b, t, d_model)`, from `merge_regions`; the queries of cross-attention.
            features: `(b, s, a)`, from `encode_audio`.
            feature_times: `(b, s)`, seconds after the first sample.
            frame_times: `(b, t)`, seconds after the first sample.
            feature_mask: `(b, s)` bool, which features may be used.

        Returns:
            `(b, t, d_guide)` and `(b, t)` bool, True where there is sound at that frame: within
            the reach of interpolation, or within the window of cross-attention.

        Raises:
            ValueError: If the detector was built without sound, or the shapes disagree.
        """
        if self.d_guide is None:
            raise ValueError("this detector was built without an audio encoder; leave sound out.")
        check_shapes(
            sizes={"d": self.d_model},
            visual=(visual, "b t d"),
            features=(features, "b s a"),
            feature_times=(feature_times, "b s"),
            frame_times=(frame_times, "b t"),
            feature_mask=(feature_mask, "b s"),
        )
        if features.shape[1] == 0:
            return visual.new_zeros(*visual.shape[:2], self.d_guide), visual.new_zeros(
                visual.shape[:2], dtype=torch.bool
            )
        if self.audio_projection is not None:
            features = self.audio_projection(features)
        if self.audio_query is None:
            return interpolate_features(
                features, feature_times, frame_times, feature_mask=feature_mask
            )
        return retrieve_audio(
            self.audio_query, visual, features, feature_times, frame_times, feature_mask
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
            audio: `(b, t, d_guide)`, from `align_audio`; `None` for a clip without sound.
            audio_mask: `(b, t)` bool, where there is sound; everywhere if left out.
            mask: `(b, t)` bool, which frames exist; all if left out.
            state: What the last call returned, to go on in the same video.

        Returns:
            Logits `(b, t, c)`, and the state after the last frame.

        Raises:
            ValueError: If the shapes disagree, or sound is given to a detector without.
        """
        if self.d_guide is None and audio is not None:
            raise ValueError("this detector was built without an audio encoder; leave sound out.")
        check_shapes(
            sizes={"d": self.d_model, "a": self.d_guide or 0},
            visual=(visual, "b t d"),
            audio=(audio, "b t a"),
            audio_mask=(audio_mask, "b t"),
            mask=(mask, "b t"),
        )
        check_mask("audio_mask", audio_mask)
        if self.d_guide is not None and audio is None:
            audio = visual.new_zeros(*visual.shape[:2], self.d_guide)
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

    # ------------------------------------------------------------------ on disk
    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write a checkpoint folder; see `mmau.models.save_pretrained`.

        Args:
            folder: Where to write; an older checkpoint there is replaced.
            **options: `config`, `provenance` and `licence`, as that function takes them.

        Returns:
            The folder.
        """
        from mmau.models.checkpoint import save_pretrained  # which imports this module

        return save_pretrained(self, folder, **options)

    @staticmethod
    def from_pretrained(folder: str | Path, *, device: str | torch.device = "cpu") -> AUDetector:
        """Build and fill the detector of a checkpoint; see `mmau.models.load_pretrained`.

        Args:
            folder: A checkpoint folder.
            device: Where the detector shall be.

        Returns:
            The detector, in evaluation mode.
        """
        from mmau.models.checkpoint import load_pretrained  # which imports this module

        return load_pretrained(folder, device=device).detector

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Write a checkpoint and upload it with a model card; see `mmau.models.push_to_hub`.

        Args:
            repo_id: `"name/repository"`.
            **options: Of `save_pretrained` and of `mmau.models.push_to_hub`.

        Returns:
            Address of the upload.
        """
        from mmau.models.checkpoint import (
            push_to_hub,  # which imports this module
            save_pretrained,
        )

        saved = {k: options.pop(k) for k in ("config", "provenance", "licence") if k in options}
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(self, Path(folder) / "checkpoint", **saved)
            return push_to_hub(Path(folder) / "checkpoint", repo_id, **options)

    def extra_repr(self) -> str:
        """Show the sizes and the outputs."""
        return (
            f"d_model={self.d_model}, num_regions={self.num_regions}, d_guide={self.d_guide}, "
            f"au_names={', '.join(self.au_names)}"
        )


def _attribute(module: nn.Module, name: str) -> int:
    return int(cast("Any", getattr(module, name)))


def _width_of_guide(temporal: nn.Module) -> int | None:
    width = cast("Any", temporal).d_audio
    return None if width is None else int(width)
