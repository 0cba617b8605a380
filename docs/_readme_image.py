"""Draw the image of the README from a finished demo: `python docs/_readme_image.py runs/demo`.

Without the face crops, since the repository holds no photographs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmau.data import load_trial, read_annotation
from mmau.inference import AUPredictor
from mmau.plot import save_timeline

run = Path(sys.argv[1])
name = sys.argv[2] if len(sys.argv) > 2 else "validation_0002"
(prepared,) = (run / "prepared").glob(f"{name}.*")
annotation = run / "data" / "AU_Detection_Challenge" / "Validation_Set" / f"{name}.txt"
trial = load_trial(prepared)
save_timeline(
    AUPredictor.from_pretrained(run / "checkpoint").predict_trial(trial),
    Path(__file__).parent / "images" / "timeline.png",
    labels=read_annotation(annotation).labels,
    waveform=trial.waveform,
    audio_start=trial.audio_start,
)
