"""A trained detector with its thresholds: a video in, a table out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau.data.prepare import find_face_chunks
from mmau.data.prepared import PreparedChunk, PreparedTrial
from mmau.evaluation.calibration import Calibration
from mmau.inference.live import LiveSession
from mmau.inference.session import (
    Session,
    StageTimes,
    VideoLogits,
    check_calibration,
    checked_frames,
    detector_logits,
    increasing,
    score_faces,
)
from mmau.inference.stream import SoundStream
from mmau.inference.table import AUTable, join_faces
from mmau.media.audio import AudioSegment, cut_sound, iterate_audio
from mmau.media.faces import FaceFinder, FaceOptions
from mmau.media.video import VideoFrame, VideoReader
from mmau.models import AUDetector, load_pretrained
from mmau.progress import ProgressCallback

FRAMES_PER_CHUNK = 256


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
        check_calibration(calibration, detector)
        self.detector = detector.eval()
        self.calibration = calibration
        self.crop_size = crop_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> AUPredictor:
        """Load a checkpoint folder as the recipe and `mmau.models.save_pretrained` write it.

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

    def predict_file(
        self,
        path: str | os.PathLike[str],
        *,
        faces: FaceOptions | None = None,
        strict: bool = False,
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> AUTable:
        """Predict a video file.

        Args:
            path: A video file; its sound track is used if it has one.
            faces: Which face is followed, and by what it is found; the largest, by MediaPipe, if
                left out. With `FaceOptions(face="all")` each person has rows from the first to the
                last frame in which their face was found.
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
            path, faces=faces, strict=strict, geometry=geometry, stages=stages, progress=progress
        )
        return self._table(scored, faces)

    def score_file(
        self,
        path: str | os.PathLike[str],
        *,
        faces: FaceOptions | None = None,
        strict: bool = False,
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[VideoLogits]:
        """Run the detector over a video file, without calibration; what an evaluation wants.

        Args:
            path: A video file.
            faces: As in `predict_file`, and so are the other options.
            strict: Raise if frames are missing, instead of noting it.
            geometry: Whether to keep landmarks and boxes.
            stages: Where to add the time of each stage.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            One record per person; exactly one unless all faces are followed.

        Raises:
            MediaError: As `predict_file`.
        """
        with VideoReader(path, strict=strict) as reader:
            return self._score(
                reader,
                iterate_audio(path),
                faces,
                Path(path).stem,
                geometry=geometry,
                stages=stages,
                progress=progress,
            )

    def predict_frames(
        self,
        frames: Iterable[tuple[NDArray[np.uint8], float]],
        *,
        sound: Iterable[NDArray[np.floating]] | None = None,
        sound_start: float = 0.0,
        faces: FaceOptions | None = None,
        name: str = "frames",
        geometry: bool = False,
        stages: StageTimes | None = None,
        progress: ProgressCallback | None = None,
    ) -> AUTable:
        """Predict frames from anywhere, such as a recording or a camera that stops at some time.

        For a camera that does not stop, and for results at once, see `live`.

        Args:
            frames: Images `(h, w, 3)` uint8, RGB, and their times in seconds, increasing.
            sound: Chunks `(n,)` of the waveform, 16 kHz mono in [-1, 1]; they are taken as the
                frames need them, up to 20 s ahead.
            sound_start: Time of the first sample in seconds, on the clock of the frames.
            faces: As in `predict_file`.
            name: Name of the trial, for faces that are looked up.
            geometry: Whether to keep landmarks and boxes.
            stages: Where to add the time of each stage.
            progress: Called as `progress(done, total)` in frames.

        Returns:
            The table, one row per frame.

        Raises:
            ValueError: If there is no frame, one is not an image, or their times do not increase.
        """
        scored = self._score(
            checked_frames(frames),
            () if sound is None else cut_sound(sound, sound_start),
            faces,
            name,
            geometry=geometry,
            stages=stages,
            progress=progress,
        )
        return self._table(scored, faces)

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
        return self._table([self.score_trial(trial, progress=progress)])

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
            notes=(*self._notes(valid, trial.waveform is not None), *trial.warnings),
        )

    def live(self, *, smoothing: bool = True, **options: Any) -> LiveSession:
        """Start a session that takes frames one by one and answers at once.

        Args:
            smoothing: Whether to smooth as the checkpoint says; must be switched off for a
                checkpoint whose smoothing looks ahead.
            **options: Options of `LiveSession`, such as `faces` or `sound_start`.

        Returns:
            The session; use it in a `with` block.

        Raises:
            TypeError: If there is no such option.
            ValueError: If the model or the smoothing of the checkpoint looks ahead.
        """
        calibration = self.calibration if smoothing else replace(self.calibration, smoothing=())
        return LiveSession(self.detector, calibration, crop_size=self.crop_size, **options)

    def probability(self, logits: Tensor) -> Tensor:
        """Turn logits into the kind of probability that the thresholds are for.

        Args:
            logits: `(..., c)`.

        Returns:
            `(..., c)`, in [0, 1]: the sigmoid, or the posterior under the training loss.
        """
        return self.calibration.probability_of(logits)

    def _score(
        self,
        frames: VideoReader | Iterable[VideoFrame],
        segments: Iterable[AudioSegment],
        faces: FaceOptions | None,
        name: str,
        *,
        geometry: bool,
        stages: StageTimes | None,
        progress: ProgressCallback | None,
    ) -> list[VideoLogits]:
        faces = (faces or FaceOptions()).check()
        stages = StageTimes() if stages is None else stages
        reader = frames if isinstance(frames, VideoReader) else None
        with closing(FaceFinder(faces, self.crop_size)) as finder:
            finder.start(name)
            sound = None
            if self.detector.audio_encoder is not None:
                with stages.during("sound"):
                    sound = SoundStream(self.detector, segments)
                sound = None if sound.is_empty else sound
            chunks = find_face_chunks(
                frames,
                finder,
                frames_per_chunk=FRAMES_PER_CHUNK,
                total=None if reader is None else reader.info.num_frames_announced,
                progress=progress,
                seconds=stages.seconds,
            )
            scored = score_faces(
                _counted(chunks, stages),
                lambda: Session(self.detector, sound, stages),
                all_faces=faces.all_faces,
                geometry=geometry,
            )
            warnings = (*(() if reader is None else reader.warnings), *finder.warnings())
        return [
            replace(one, notes=(*self._notes(one.valid, sound is not None), *warnings))
            for one in scored
        ]

    def _notes(self, valid: NDArray[np.bool_], has_sound: bool) -> list[str]:
        notes = []
        if self.detector.audio_encoder is not None and not has_sound:
            notes.append("no sound track: the audio conditioning was masked")
        if not valid.any():
            notes.append("no face was found in any frame: what follows rests on the sound alone")
        elif not valid.all():
            notes.append(f"no face in {int((~valid).sum())} of {len(valid)} frames (valid = 0)")
        return notes

    def _table(self, scored: list[VideoLogits], faces: FaceOptions | None = None) -> AUTable:
        tables = [self._table_of(one) for one in scored]
        if faces is None or not faces.all_faces:
            return tables[0]
        return join_faces(tables, [one.face_id for one in scored])

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


def _counted(
    chunks: Iterable[dict[int, PreparedChunk]], stages: StageTimes
) -> Iterator[dict[int, PreparedChunk]]:
    for chunk in chunks:
        stages.num_frames += next(iter(chunk.values())).num_frames
        yield chunk
