"""What a run leaves behind: scores, the checkpoint, and a first use of it on a held-out video."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from affwild2_data import Video
from affwild2_presets import Config
from torch import Tensor

import mmau
from mmau._files import atomic_write
from mmau.evaluation import ScoredTrial, compare_reports, evaluate_trials, fit_calibration
from mmau.inference import AUPredictor
from mmau.models import AUDetector, save_pretrained
from mmau.modules import LOSSES
from mmau.plot import save_timeline


def scored_trials(videos: Sequence[Video], logits: Mapping[str, Tensor]) -> list[ScoredTrial]:
    """Put logits beside what is true."""
    scored = []
    for video in videos:
        trial = video.load()
        scored.append(
            ScoredTrial(
                video.trial.name,
                video.trial.video_name,
                logits[video.trial.name],
                torch.from_numpy(video.labels),
                torch.from_numpy(trial.timestamps),
                torch.from_numpy(trial.valid),
            )
        )
    return scored


def provenance_of(config: Config, videos: dict[str, list[Video]], seconds: float) -> dict[str, Any]:
    """Say what the weights were trained on, by what, and on which machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "recipe": "affwild2_au",
        "data": "rendered from two photographs" if config.data.render else "Aff-Wild2",
        "num_videos": {split: len(found) for split, found in videos.items()},
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "commit": commit or "unknown",
        "versions": {"mmau": mmau.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.device}",
    }


def report(
    config: Config,
    videos: Sequence[Video],
    systems: Mapping[str, AUDetector],
    logits: Mapping[str, Mapping[str, Tensor]],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate, save the checkpoint, and use it on one held-out video."""
    loss = LOSSES.create(config.loss.name, **config.loss.options)
    names = config.model.au_names
    scored = {system: scored_trials(videos, one) for system, one in logits.items()}
    reports = {
        system: evaluate_trials(trials, au_names=names, posterior=loss.posterior)
        for system, trials in scored.items()
    }
    metrics: dict[str, Any] = {"systems": {}, "differences": []}
    for system, found in reports.items():
        print(f"\n{system}\n{found.render()}")
        metrics["systems"][system] = found.as_dict()
    main, *others = reports
    for other in others:
        gain = compare_reports(reports[main], reports[other], names=(main, other))
        print(f"\n{gain.render()}")
        metrics["differences"].append(gain.as_dict())
    calibration = fit_calibration(
        scored[main],
        au_names=names,
        # Thresholds for the posterior, if whoever loads the checkpoint can compute it.
        posterior=loss.posterior if getattr(loss, "posterior_options", None) else None,
        note="chosen on all held-out videos of the run; the reported scores are cross-validated",
    )
    checkpoint = config.out / "checkpoint"
    save_pretrained(systems[main], checkpoint, config=config.model, provenance=provenance)
    calibration.save(checkpoint / "calibration.json")
    metrics["provenance"] = provenance
    with atomic_write(config.out / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n")

    example = videos[0]
    trial = example.load()
    table = AUPredictor.from_pretrained(checkpoint).predict_trial(trial)
    table.write_csv(config.out / "predictions.csv")
    save_timeline(
        table,
        config.out / "timeline.png",
        labels=example.labels,
        waveform=trial.waveform,
        audio_start=trial.audio_start,
        images=trial.crops,
        title=f"{trial.name} (held out)",
    )
    print(f"\n{config.out}: checkpoint/, metrics.json, config.json, timeline.png, predictions.csv")
    print(f"try: mmau predict {example.trial.video} --checkpoint {checkpoint} \\")
    print("         -o out.csv --plot out.png")
    if config.data.render is not None:
        print(
            "These scores are on clips rendered from two photographs: they say that the pipeline "
            "learns, and nothing about people."
        )
    return metrics
