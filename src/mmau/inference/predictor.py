"""A trained detector with its thresholds: a video in, a table out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau.data.prepared import PreparedTrial
from mmau.evaluation.calibration import Calibration
from mmau.functional import asymmetric_posterior
from mmau.inference.live import LiveSession
from mmau.inference.session import (
    FaceChunks,
    PersonStream,
    SoundStream,
    StageTimes,
    VideoLogits,
    cut_sound,
    detector_logits,
    faces_of_file,
    faces_of_frames,
    increasing,
    score_people,
)
from mmau.inference.table import AUTable, join_people
from mmau.media.audio import AudioSegment, iterate_audio
from mmau.media.errors import check_file
from mmau.media.faces import FaceOptions
from mmau.models import AUDetector, load_pretrained
from mmau.progress import ProgressCallback


class AUPredictor:
    """A trained detector with its thresholds: video file, frames or features in, table out.

    A file is read in chunks whose memory does not grow with its length: frames are decoded, their
    faces found and encoded, the sound is encoded in overlapping segments of 20 s, and the temporal
    model carries its state from chunk to chunk, so that a causal model gives what one pass over the
    whole video would. Other models read overlapping windows; see `LogitStream`.

    Args:
        detector: The detector.
        calibration: Thresholds and smoothing per Action Unit; 0.5 for all and none if left out.
        crop_size: Side of the aligned face crop in pixels, as in training.

    Raises:
        ValueError: If the calibration is for other Action Units than the detector, or for a
            posterior without saying under which loss.
    """

    def __init__(
        self, detector: AUDetector, calibration: Calibration | None = None, *, crop_size: int = 224
    ) -> None:
        names = tuple(detector.au_names)
        if calibration is None:
            calibration = Calibration(au_names=names, thresholds=(0.5,) * len(names))
        if tuple(calibration.au_names) != names:
            raise ValueError(
                f"the calibration is for {', '.join(calibration.au_names)}, "
                f"but the detector predicts {', '.join(names)}."
            )
        if calibration.probability == "posterior" and not calibration.posterior_options:
            raise ValueError(
                "the calibration is for posterior probabilities but does not say under which loss: "
                "`posterior_options` is empty."
            )
        self.detector = detector.eval()
        self.calibration = calibration
        self.crop_size = crop_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> AUPredictor:
        """Load a checkpoint folder as the recipe and `AUDetector.save_pretrained` write it.

        Args:
            folder: Folder with `config.json`, `model.safetensors` and, optionally,
                `calibration.json`.
            device: Device to run on.

        Returns:
            The predictor.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If its files do not belong together.
        """
        folder = Path(folder)
        detector, config = load_pretrained(folder, device=device)
        path = folder / "calibration.json"
        calibration = Calibration.load(path) if path.exists() else None
        return cls(detector, calibration, crop_size=config.crop_size)

    # ------------------------------------------------------------------ a video at a time
    def predict_file(
        self,
        path: str | os.PathLike[str],
        *,
        detector: str = "mediapipe",
        landmarks: str = "mediapipe",
        face: str | int = "largest",
        detector_options: Mapping[str, Any] | None = None,
        landmark_options: Mapping[str, Any] | None = None,
        strict: bool = False,
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> AUTable:
        """Predict a video file.

        Args:
            path: A video file; its sound track is used if it has one.
            detector: Name of a face detector.
            landmarks: Name of a landmark extractor.
            face: `"largest"`, `"left"`, `"right"`, the number of a person, or `"all"`: then each
                person has rows from the first to the last frame they are seen in.
            detector_options: Options of the face detector.
            landmark_options: Options of the landmark extractor.
            strict: Raise if frames are missing, instead of noting it.
            geometry: Whether to keep landmarks and boxes, for `annotate_video`.
            stages: Where to add the time of each stage.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            The table, one row per decoded frame.

        Raises:
            MediaError: If the file cannot be read as a video; if frames are missing and `strict`.
        """
        scored = self.score_file(
            path,
            detector=detector,
            landmarks=landmarks,
            face=face,
            detector_options=detector_options,
            landmark_options=landmark_options,
            strict=strict,
            geometry=geometry,
            stages=stages,
            progress=progress,
        )
        return self._table(scored, several=face == "all")

    def score_file(
        self,
        path: str | os.PathLike[str],
        *,
        detector: str = "mediapipe",
        landmarks: str = "mediapipe",
        face: str | int = "largest",
        detector_options: Mapping[str, Any] | None = None,
        landmark_options: Mapping[str, Any] | None = None,
        strict: bool = False,
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[VideoLogits]:
        """Run the detector over a video file, without calibration; what an evaluation wants.

        Args:
            path: A video file.
            detector: Name of a face detector.
            landmarks: Name of a landmark extractor.
            face: As in `predict_file`.
            detector_options: Options of the face detector.
            landmark_options: Options of the landmark extractor.
            strict: Raise if frames are missing, instead of noting it.
            geometry: Whether to keep landmarks and boxes.
            stages: Where to add the time of each stage.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            One record per person; exactly one unless `face` is `"all"`.

        Raises:
            MediaError: If the file cannot be read as a video; if frames are missing and `strict`.
        """
        check_file(path)  # before any model is loaded
        options = self._face_options(detector, landmarks, face, detector_options, landmark_options)
        stages = StageTimes() if stages is None else stages
        with faces_of_file(
            path,
            options,
            stages,
            name=Path(path).stem,
            strict=strict,
            geometry=geometry,
            progress=progress,
        ) as faces:
            segments = None if self.detector.audio_encoder is None else iterate_audio(path)
            return self._score(faces, segments, stages)

    def predict_frames(
        self,
        frames: Iterable[tuple[NDArray[np.uint8], float]],
        *,
        sound: Iterable[NDArray[np.floating]] | None = None,
        sound_start: float = 0.0,
        detector: str = "mediapipe",
        landmarks: str = "mediapipe",
        face: str | int = "largest",
        detector_options: Mapping[str, Any] | None = None,
        landmark_options: Mapping[str, Any] | None = None,
        name: str = "frames",
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> AUTable:
        """Predict frames from anywhere, such as a recording or a camera that stops at some time.

        For a camera that runs on, and for results at once, see `live`.

        Args:
            frames: Pictures `(h, w, 3)` uint8, RGB, and their times in seconds, increasing.
            sound: Pieces `(n,)` of the waveform, 16 kHz mono in [-1, 1]; they are taken as the
                frames need them, up to 20 s ahead.
            sound_start: Time of the first sample in seconds, on the clock of the frames.
            detector: Name of a face detector.
            landmarks: Name of a landmark extractor.
            face: As in `predict_file`.
            detector_options: Options of the face detector.
            landmark_options: Options of the landmark extractor.
            name: Name of the trial, for faces that are looked up.
            geometry: Whether to keep landmarks and boxes.
            stages: Where to add the time of each stage.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            The table, one row per frame.

        Raises:
            ValueError: If there is no frame, one is no picture, or their times do not increase.
        """
        options = self._face_options(detector, landmarks, face, detector_options, landmark_options)
        stages = StageTimes() if stages is None else stages
        with faces_of_frames(
            frames, options, stages, name=name, geometry=geometry, progress=progress
        ) as faces:
            segments = None if sound is None else cut_sound(sound, sound_start)
            scored = self._score(faces, segments, stages)
        return self._table(scored, several=face == "all")

    def predict_trial(
        self, trial: PreparedTrial, *, progress: ProgressCallback | None = None
    ) -> AUTable:
        """Predict one prepared trial.

        Args:
            trial: Crops, landmarks, masks, timestamps and sound.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            The table.
        """
        return self._table([self.score_trial(trial, progress=progress)], several=False)

    def score_trial(
        self, trial: PreparedTrial, *, progress: ProgressCallback | None = None
    ) -> VideoLogits:
        """Run the detector over one prepared trial, without calibration.

        Args:
            trial: Crops, landmarks, masks, timestamps and sound.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            The logits, and what goes with them.
        """
        logits = detector_logits(self.detector, trial, progress=progress)
        valid = np.array(trial.valid)
        return VideoLogits(
            logits,
            np.array(trial.timestamps),
            valid,
            np.array(trial.confidence),
            notes=(*self._notes(valid, heard=trial.waveform is not None), *trial.warnings),
        )

    def live(self, **options: Any) -> LiveSession:
        """Start a session that takes frames one by one and answers at once.

        Args:
            **options: Options of `LiveSession`, such as `face` or `smoothing`.

        Returns:
            The session; use it in a `with` block.

        Raises:
            TypeError: If there is no such option.
            ValueError: If the model or the smoothing of the checkpoint looks ahead.
        """
        return LiveSession(self, **options)

    # ------------------------------------------------------------------ what it means
    def probability(self, logits: Tensor) -> Tensor:
        """Turn logits into the kind of probability that the thresholds are for.

        Args:
            logits: `(..., c)`.

        Returns:
            `(..., c)`, in [0, 1]: the sigmoid, or the posterior under the training loss.
        """
        if self.calibration.probability == "raw":
            return torch.sigmoid(logits)
        options = {
            name: value if isinstance(value, float) else torch.tensor(value)
            for name, value in self.calibration.posterior_options.items()
        }
        return asymmetric_posterior(logits, **cast("Any", options))

    # ------------------------------------------------------------------ inside
    def _face_options(
        self,
        detector: str,
        landmarks: str,
        face: str | int,
        detector_options: Mapping[str, Any] | None,
        landmark_options: Mapping[str, Any] | None,
    ) -> FaceOptions:
        return FaceOptions(
            crop_size=self.crop_size,
            detector=detector,
            landmarks=landmarks,
            face=face,
            detector_options=detector_options or {},
            landmark_options=landmark_options or {},
        ).check(several=True)

    def _score(
        self,
        faces: FaceChunks,
        segments: Iterable[AudioSegment] | None,
        stages: StageTimes,
    ) -> list[VideoLogits]:
        sound = None
        if self.detector.audio_encoder is not None and segments is not None:
            with stages.during("sound"):
                sound = SoundStream(self.detector, segments)
            sound = None if sound.is_empty else sound
        scored = score_people(
            faces,
            lambda: PersonStream(self.detector, sound, stages),
            all_faces=faces.all_faces,
        )
        warnings = faces.warnings
        return [
            replace(one, notes=(*self._notes(one.valid, heard=sound is not None), *warnings))
            for one in scored
        ]

    def _notes(self, valid: NDArray[np.bool_], *, heard: bool) -> list[str]:
        notes = []
        if self.detector.audio_encoder is not None and not heard:
            notes.append("no sound track: the audio guide was masked")
        if not valid.any():
            notes.append("no face was found in any frame: what follows rests on the sound alone")
        elif not valid.all():
            notes.append(f"no face in {int((~valid).sum())} of {len(valid)} frames (valid = 0)")
        return notes

    def _table(self, scored: list[VideoLogits], *, several: bool) -> AUTable:
        tables = [self._table_of(one) for one in scored]
        if not several:
            return tables[0]
        return join_people(tables, [one.face_id for one in scored])

    def _table_of(self, scored: VideoLogits) -> AUTable:
        # Containers may repeat a time; the order of the frames is what counts then.
        times = torch.from_numpy(increasing(scored.timestamps))
        prob, active = self.calibration.apply(self.probability(scored.logits), times)
        return AUTable(
            au_names=tuple(self.detector.au_names),
            timestamps=scored.timestamps,
            valid=scored.valid,
            confidence=scored.confidence,
            probability=prob.numpy(),
            active=active.numpy(),
            notes=scored.notes,
            frames=np.arange(len(scored.valid)) + scored.first_frame + 1,
            landmarks=scored.landmarks,
            boxes=scored.boxes,
        )
