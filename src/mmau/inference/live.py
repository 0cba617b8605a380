"""Frames one by one, answers at once: a camera, a robot, a call."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._checks import check_range
from mmau.inference.session import (
    GRID,
    SAMPLE_RATE,
    LogitStream,
    StageTimes,
    check_frame,
    encode_crops,
    reach_of,
)
from mmau.media.faces import FaceFinder, FaceOptions
from mmau.media.video import VideoFrame
from mmau.models import AUDetector

if TYPE_CHECKING:
    from mmau.inference.predictor import AUPredictor


class LiveRow(NamedTuple):
    """The answer to one frame."""

    frame: int
    """Number of the frame, from 1."""
    timestamp: float
    """Seconds, as given."""
    valid: bool
    """Whether a face was found."""
    confidence: float
    """In [0, 1]; 0 without a face."""
    probability: NDArray[np.float32]
    """`(c,)`, in [0, 1]."""
    active: NDArray[np.bool_]
    """`(c,)`, probability at or above its threshold."""
    box: NDArray[np.float32]
    """`(4,)`, left, top, right, bottom of the face, in pixels; NaN without a face."""


class LiveSession:
    """Predict a stream that goes on: `step` takes a frame and gives its row.

    Time and memory of a step do not depend on how long the stream has been running (except with a
    causal transformer without `window`). It knows nothing of what comes later: give it the sound up
    to the frame, and the features of windows that are not complete yet are missing, so with an
    audio encoder that looks ahead a row differs a little from that of a file. With `log_mel` and
    `causal=True` it is the same, to rounding.

    Args:
        predictor: Detector and calibration.
        detector: Name of a face detector.
        landmarks: Name of a landmark extractor.
        face: `"largest"`, `"left"`, `"right"`, or the number of a person.
        detector_options: Options of the face detector.
        landmark_options: Options of the landmark extractor.
        smoothing: Whether to smooth as the checkpoint says; must be switched off for a checkpoint
            whose smoothing looks ahead.
        sound_start: Time of the first sample in seconds, on the clock of the frames.
        sound_context: Seconds of sound that the audio encoder is given at each step.
        stages: Where to add the time of each stage.

    Raises:
        ValueError: If the temporal model or the smoothing looks ahead.

    Examples:
        ```python
        with predictor.live(smoothing=False) as session:
            for image, time in camera:
                row = session.step(image, time)
                print(row.timestamp, row.probability[session.au_names.index("AU12")])
        ```
    """

    def __init__(
        self,
        predictor: AUPredictor,
        *,
        detector: str = "mediapipe",
        landmarks: str = "mediapipe",
        face: str | int = "largest",
        detector_options: Mapping[str, Any] | None = None,
        landmark_options: Mapping[str, Any] | None = None,
        smoothing: bool = True,
        sound_start: float = 0.0,
        sound_context: float = 2.0,
        stages: StageTimes | None = None,
    ) -> None:
        check_range("sound_context", sound_context, 0, open_low=True)
        self._predictor = predictor
        self._stream = LogitStream(predictor.detector)
        if not self._stream.causal:
            raise ValueError(
                f"the temporal model of this detector, {type(predictor.detector.temporal).__name__}"
                ", looks ahead, so there is no answer before the video ends: use `predict_file` or "
                "`predict_frames`, or train a causal one."
            )
        if smoothing and not predictor.calibration.is_causal:
            raise ValueError(
                f"the smoothing of this checkpoint, a {predictor.calibration.smoothing_kind} of up "
                f"to {max(predictor.calibration.smoothing):g} "
                f"{predictor.calibration.smoothing_unit}, looks ahead, which a live step cannot: "
                "pass `smoothing=False`, or calibrate with `smoothing_kind='exponential'`."
            )
        self._smoother = predictor.calibration.smoother() if smoothing else None
        self._stages = StageTimes() if stages is None else stages
        self._sound = (
            None
            if predictor.detector.audio_encoder is None
            else _LiveSound(predictor.detector, sound_start, sound_context)
        )
        self._num_frames = 0
        self._time = -np.inf
        self._finder: FaceFinder | None = FaceFinder(
            FaceOptions(
                crop_size=predictor.crop_size,
                detector=detector,
                landmarks=landmarks,
                face=face,
                detector_options=detector_options or {},
                landmark_options=landmark_options or {},
            ).check(several=False)
        )
        self._finder.start("live")

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._predictor.detector.au_names)

    def step(
        self,
        image: NDArray[np.uint8],
        timestamp: float,
        samples: NDArray[np.floating] | None = None,
    ) -> LiveRow:
        """Take the next frame, and the sound since the last one.

        Args:
            image: `(h, w, 3)` uint8, RGB.
            timestamp: Seconds, later than that of the frame before.
            samples: `(n,)`, 16 kHz mono in [-1, 1], or `None` for a stream without sound.

        Returns:
            The row of this frame.

        Raises:
            RuntimeError: If the session was closed.
            ValueError: If the frame is no picture or comes at no later time.
        """
        if self._finder is None:
            raise RuntimeError("this session was closed; start another with `predictor.live()`.")
        check_frame(image, timestamp, self._time)
        self._time = float(timestamp)
        with self._stages.during("detect"):
            found = self._finder.find(VideoFrame(self._num_frames, self._time, image))
        self._num_frames += 1
        self._stages.num_frames += 1
        size = self._predictor.crop_size
        crop = found[0].crop if found else np.zeros((size, size, 3), dtype=np.uint8)
        points = found[0].landmarks if found else np.full((68, 2), np.nan, dtype=np.float32)
        valid = bool(found) and bool(np.isfinite(points).all())
        with self._stages.during("encode"):
            visual = encode_crops(
                self._predictor.detector, crop[None], points[None], np.array([valid])
            )
        audio = audio_mask = None
        if self._sound is not None:
            with self._stages.during("sound"):
                if samples is not None:
                    self._sound.hear(samples)
                audio, audio_mask = self._sound.align(visual, self._time)
        with self._stages.during("temporal"):
            logits = self._stream.push(visual, audio, audio_mask)[0].float().cpu()
        prob = self._predictor.probability(logits)
        if self._smoother is not None:
            prob = self._smoother.step(prob, self._time)
        return LiveRow(
            frame=self._num_frames,
            timestamp=self._time,
            valid=valid,
            confidence=found[0].confidence if valid else 0.0,
            probability=prob.numpy(),
            active=self._predictor.calibration.decide(prob).numpy(),
            box=found[0].box if valid else np.full(4, np.nan, dtype=np.float32),
        )

    def close(self) -> None:
        """Stop the face models."""
        if self._finder is not None:
            self._finder.close()
            self._finder = None

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _LiveSound:
    """The last seconds of a waveform, and the features near the present."""

    def __init__(self, detector: AUDetector, start: float, context: float) -> None:
        self._detector = detector
        self._start = start
        framing = getattr(detector.audio_encoder, "framing", None)
        # What is dropped is a whole number of hops, so that windows stay where they were.
        self._hop = GRID if framing is None else int(framing.hop)
        self._context = max(1, round(context * SAMPLE_RATE / self._hop)) * self._hop
        self._reach = reach_of(detector) + 0.5
        self._waveform = np.zeros(0, dtype=np.float32)
        self._first = 0  # number of the first sample that is kept
        self._encoded = 0  # samples when the encoder last ran
        self._times = np.zeros(0)
        self._features: Tensor | None = None
        self._mask: Tensor | None = None

    def hear(self, samples: NDArray[np.floating]) -> None:
        """Take the next samples."""
        if samples.ndim != 1:
            raise ValueError(f"`samples` must be mono, of shape (n,); got {samples.shape}.")
        self._waveform = np.concatenate([self._waveform, np.asarray(samples, dtype=np.float32)])

    @torch.no_grad()
    def align(self, visual: Tensor, time: float) -> tuple[Tensor | None, Tensor | None]:
        """Bring what has been heard to a frame."""
        total = self._first + len(self._waveform)
        if total > self._encoded:
            self._encode()
            self._encoded = total
        if self._features is None or self._mask is None or not len(self._times):
            return None, None
        device = visual.device
        audio, mask = self._detector.align_audio(
            visual[None],
            self._features[None],
            torch.from_numpy(self._times)[None].to(device),
            torch.tensor([[time]], dtype=torch.float64, device=device),
            self._mask[None],
        )
        return audio[0], mask[0]

    def _encode(self) -> None:
        device = self._detector.no_face.device
        heard = self._detector.encode_audio(torch.from_numpy(self._waveform).to(device)[None])
        times = self._start + self._first / SAMPLE_RATE + heard.times[0].cpu().numpy()
        complete = heard.mask[0].cpu().numpy()
        newest = self._times[-1] if len(self._times) else -np.inf
        chosen = complete & (times > newest + 1e-6)
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(device)
        features, mask = heard.features[0, rows], heard.mask[0, rows]
        if self._features is not None and self._mask is not None:
            features = torch.cat([self._features, features])
            mask = torch.cat([self._mask, mask])
        times = np.concatenate([self._times, times[chosen]])
        if len(times):
            old = int(np.searchsorted(times, times[-1] - 2 * self._reach))
            times, features, mask = times[old:], features[old:], mask[old:]
        self._times, self._features, self._mask = times, features, mask
        excess = max(0, len(self._waveform) - self._context) // self._hop * self._hop
        self._waveform = self._waveform[excess:]
        self._first += excess
