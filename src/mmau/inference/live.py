"""Frames one by one, answers at once: a camera, a robot, a call."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmau._checks import check_range
from mmau.data.prepared import PreparedChunk
from mmau.evaluation.calibration import Calibration
from mmau.inference.session import Session, StageTimes, check_calibration, check_frame
from mmau.inference.stream import LiveSound
from mmau.media.faces import FaceFinder, FaceOptions
from mmau.media.video import VideoFrame
from mmau.models import AUDetector


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
    """Predict a stream that does not end: `step` takes a frame and gives its row.

    Time and memory of a step do not depend on how long the stream has been running (except with a
    causal transformer without `window`). It knows nothing of what comes later: give it the sound up
    to the frame, and the features of windows that are not complete yet are missing, so with an
    audio encoder that looks ahead a row differs a little from that of a file. With `log_mel` and
    `causal=True` it is the same, to rounding.

    Args:
        detector: The detector, with a causal temporal model; it is set to eval mode.
        calibration: Thresholds and smoothing; the smoothing must not look ahead.
        crop_size: Side of the aligned face crop in pixels, as in training.
        faces: Which face is followed, and by what it is found; not `"all"`.
        sound_start: Time of the first sample in seconds, on the clock of the frames.
        sound_context: Seconds of sound that the audio encoder is given at each step.
        stages: Where to add the time of each stage.

    Raises:
        ValueError: If the temporal model or the smoothing looks ahead, or the calibration is for
            other Action Units than the detector, or for a posterior without saying under which
            loss.

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
        detector: AUDetector,
        calibration: Calibration,
        *,
        crop_size: int = 224,
        faces: FaceOptions | None = None,
        sound_start: float = 0.0,
        sound_context: float = 2.0,
        stages: StageTimes | None = None,
    ) -> None:
        check_range("sound_context", sound_context, 0, open_low=True)
        check_calibration(calibration, detector)
        detector.eval()
        self._calibration = calibration
        self._stages = StageTimes() if stages is None else stages
        self._sound = (
            None
            if detector.audio_encoder is None
            else LiveSound(detector, sound_start, sound_context)
        )
        self._session = Session(detector, self._sound, self._stages)
        if not self._session.causal:
            raise ValueError(
                f"the temporal model of this detector, {type(detector.temporal).__name__}"
                ", looks ahead, so there is no answer before the video ends: use `predict_file` or "
                "`predict_frames`, or train a causal one."
            )
        if not calibration.is_causal:
            raise ValueError(
                f"the smoothing of this checkpoint, a {calibration.smoothing_kind} of up "
                f"to {max(calibration.smoothing):g} {calibration.smoothing_unit}, looks ahead, "
                "which a live step cannot: "
                "pass `smoothing=False`, or calibrate with `smoothing_kind='exponential'`."
            )
        self._smoother = calibration.smoother()
        self._num_frames = 0
        self._time = -np.inf
        options = (faces or FaceOptions()).check(one_face=True)
        self._finder: FaceFinder | None = FaceFinder(options, crop_size)
        self._finder.start("live")

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self._calibration.au_names

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
            ValueError: If the frame is not an image or comes at no later time.
        """
        if self._finder is None:
            raise RuntimeError("this session was closed; start another with `predictor.live()`.")
        check_frame(image, timestamp, self._time)
        self._time = float(timestamp)
        with self._stages.during("detect"):
            chunk = PreparedChunk.without_face([self._time], self._finder.crop_size)
            for face in self._finder.find(VideoFrame(self._num_frames, self._time, image)):
                chunk.set_face(0, face)
        self._num_frames += 1
        self._stages.num_frames += 1
        if samples is not None and self._sound is not None:
            with self._stages.during("sound"):
                self._sound.add(samples)
        logits = self._session.push(chunk)[0]
        prob = self._smoother.step(self._calibration.probability_of(logits), self._time)
        valid = bool(chunk.valid[0])
        return LiveRow(
            frame=self._num_frames,
            timestamp=self._time,
            valid=valid,
            confidence=float(chunk.confidence[0]) if valid else 0.0,
            probability=prob.numpy(),
            active=self._calibration.decide(prob).numpy(),
            box=chunk.boxes[0] if valid else np.full(4, np.nan, dtype=np.float32),
        )

    def close(self) -> None:
        """Stop the face models."""
        if self._finder is not None:
            self._finder.close()
            self._finder = None

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
