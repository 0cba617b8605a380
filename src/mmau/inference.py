"""From a video file to a table of Action Units with one row per decoded frame."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmau._files import whole_file
from mmau.calibration import Calibration
from mmau.data.features import PreparedTrial, prepare_video
from mmau.models import AUDetector, load_pretrained
from mmau.progress import ProgressCallback

__all__ = ["AUPredictor", "AUTable", "detector_logits", "encode_trial"]


@dataclass(frozen=True)
class AUTable:
    """Action Units of one video, a row per decoded frame; nothing is left out.

    Examples:
        >>> table = AUTable(
        ...     au_names=("AU1", "AU2"),
        ...     timestamps=np.array([0.0, 0.04]),
        ...     valid=np.array([True, False]),
        ...     confidence=np.array([0.9, 0.0]),
        ...     probability=np.array([[0.8, 0.1], [0.6, 0.2]]),
        ...     active=np.array([[True, False], [True, False]]),
        ... )
        >>> table.columns[:4], len(table)
        (('frame', 'timestamp', 'valid', 'confidence'), 2)
    """

    au_names: tuple[str, ...]
    """Names of the columns of `probability` and `active`."""
    timestamps: NDArray[np.float64]
    """`(t,)`, seconds, by the clock of the container."""
    valid: NDArray[np.bool_]
    """`(t,)`, whether a face was found; elsewhere the model had the sound and its memory only."""
    confidence: NDArray[np.floating]
    """`(t,)`, the face detector's score in [0, 1]; 0 without a face."""
    probability: NDArray[np.floating]
    """`(t, c)`, sigmoid of the model's logits; see `Calibration` for what the thresholds mean."""
    active: NDArray[np.bool_]
    """`(t, c)`, probability at or above the threshold of its Action Unit."""
    notes: tuple[str, ...] = ()
    """What a reader should know about this video: no sound track, missing frames, no face."""

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def columns(self) -> tuple[str, ...]:
        """Header of the CSV file: `frame, timestamp, valid, confidence, AU1, ..., AU1_c, ...`."""
        return (
            "frame",
            "timestamp",
            "valid",
            "confidence",
            *self.au_names,
            *(f"{name}_c" for name in self.au_names),
        )

    def write_csv(self, path: str | Path) -> Path:
        """Write the table; the file is complete or absent.

        Args:
            path: Where to write.

        Returns:
            The path.
        """
        path = Path(path)
        with whole_file(path) as partial, partial.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(self.columns)
            for i in range(len(self)):
                writer.writerow(
                    [
                        i + 1,
                        f"{self.timestamps[i]:.6f}",
                        int(self.valid[i]),
                        f"{self.confidence[i]:.4f}",
                        *(f"{p:.5f}" for p in self.probability[i]),
                        *(int(a) for a in self.active[i]),
                    ]
                )
        return path


@torch.no_grad()
def encode_trial(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Turn every frame that shows a face into region tokens, chunk by chunk.

    Args:
        detector: The detector.
        trial: Crops, landmarks and masks of a video.
        frames_per_chunk: Frames that the visual encoder sees at once; bounds the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, m, d)`, on the detector's device; zeros where there is no face.
    """
    device = detector.no_face.device
    tokens = torch.zeros(trial.num_frames, detector.num_regions, detector.d_region, device=device)
    seen = np.flatnonzero(trial.valid)
    for start in range(0, len(seen), frames_per_chunk):
        rows = seen[start : start + frames_per_chunk]
        images = torch.from_numpy(trial.crops[rows]).to(device).movedim(-1, 1).float() / 255
        landmarks = torch.from_numpy(trial.landmarks[rows]).to(device)
        tokens[torch.from_numpy(rows).to(device)] = detector.encode_frames(images, landmarks)
        if progress is not None:
            progress(start + len(rows), len(seen))
    return tokens


@torch.no_grad()
def detector_logits(
    detector: AUDetector,
    trial: PreparedTrial,
    *,
    frames_per_chunk: int = 256,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Run a detector over one prepared trial.

    Args:
        detector: The detector, in eval mode.
        trial: Crops, landmarks, masks, timestamps and sound of a video.
        frames_per_chunk: Frames that the visual encoder sees at once; bounds the memory.
        progress: Called as `progress(done, total)` in frames.

    Returns:
        `(t, c)`, logits on the CPU.
    """
    device = detector.no_face.device
    tokens = encode_trial(detector, trial, frames_per_chunk=frames_per_chunk, progress=progress)
    valid = torch.from_numpy(trial.valid).to(device)
    visual = detector.merge_regions(tokens[None], valid[None])
    audio = audio_mask = None
    if detector.audio_encoder is not None and trial.waveform is not None:
        heard = detector.encode_audio(torch.from_numpy(trial.waveform).to(device)[None])
        frame_times = torch.from_numpy(trial.timestamps - trial.audio_start).to(device)
        audio, audio_mask = detector.align_audio(
            visual, heard.features, heard.times, frame_times[None], heard.mask
        )
    logits, _ = detector.classify(visual, audio, audio_mask=audio_mask)
    return logits[0].float().cpu()


class AUPredictor:
    """A trained detector with its thresholds: video file in, table out.

    Args:
        detector: The detector.
        calibration: Thresholds per Action Unit; 0.5 for all if left out.
        crop_size: Side of the aligned face crop in pixels, as in training.

    Raises:
        ValueError: If the calibration is for other Action Units than the detector.
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
        logits = detector_logits(self.detector, trial, progress=progress)
        prob = torch.sigmoid(logits)
        valid = np.asarray(trial.valid)
        notes = []
        if self.detector.audio_encoder is not None and trial.waveform is None:
            notes.append("no sound track: the audio guide was masked")
        if not valid.any():
            notes.append("no face was found in any frame: what follows rests on the sound alone")
        elif not valid.all():
            notes.append(f"no face in {int((~valid).sum())} of {len(valid)} frames (valid = 0)")
        notes.extend(trial.warnings)
        return AUTable(
            au_names=tuple(self.detector.au_names),
            timestamps=trial.timestamps,
            valid=valid,
            confidence=trial.confidence,
            probability=prob.numpy(),
            active=self.calibration.decide(prob).numpy(),
            notes=tuple(notes),
        )

    def predict_file(
        self,
        path: str | Path,
        *,
        detector: str = "mediapipe",
        progress: ProgressCallback | None = None,
    ) -> AUTable:
        """Predict a video file.

        Args:
            path: A video file; its sound track is used if it has one.
            detector: Name of a face detector.
            progress: Called as `progress(done, total)` in frames, for finding the faces.

        Returns:
            The table, one row per decoded frame.

        Raises:
            MediaError: If the file cannot be read as a video.
        """
        trial = prepare_video(path, crop_size=self.crop_size, detector=detector, progress=progress)
        return self.predict_trial(trial)
