"""The texts that go with a rendered data set: the truth behind it and what it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.synthetic.clip import ClipPlan, hidden_ranges
from mmau.synthetic.photographs import PHOTOGRAPHS
from mmau.synthetic.timeline import Event, intensities_at

TRUTH_FILE = "truth.json"
"""Written last: a folder that has it is complete."""

_README = """Synthetic clips in the layout of Aff-Wild2, rendered by mmau

What they are: {num_train} training and {num_validation} validation clips. Two photographs, warped
by rules that stand for twelve Action Units, with synthesised sounds that precede some movements.
They exist so that the whole chain, from a video file with sound to scores, can be run and tested
by anyone without a licence or a download.

What they are not: recordings of anybody. The two people did not make these expressions, the sounds
are no voices, and the names of the episodes in {truth} are names of movement combinations, not of
feelings. Both photographs appear in both splits, with other proportions in each clip: a score on
these data says that the pipeline learns. It says nothing about Aff-Wild2 or about real faces.

Layout: videos/<name>.mp4 (H.264, AAC); AU_Detection_Challenge/Train_Set/<name>.txt and
Validation_Set/<name>.txt (a header, then one row of 0 or 1 per frame); {truth}
(events, frames without a visible face, seeds, settings). Labels hold in every
frame, also where the face is hidden.

The photographs:
{credits}
"""


def write_truth(path: Path, settings: Mapping[str, Any], plans: Mapping[str, ClipPlan]) -> None:
    """Write `truth.json`."""
    document = {
        "settings": dict(settings),
        "au_names": list(AU_NAMES),
        "photographs": {name: asdict(info) for name, info in PHOTOGRAPHS.items()},
        "clips": {name: _as_json(plan) for name, plan in plans.items()},
    }
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _as_json(plan: ClipPlan) -> dict[str, Any]:
    return {
        "seed": list(plan.seed),
        "photograph": plan.photograph,
        "mirrored": plan.mirrored,
        "hidden_frames": hidden_ranges(plan.hidden),
        "events": [asdict(event) for event in plan.events],
    }


def read_truth(root: str | Path) -> dict[str, ClipPlan]:
    """Read what is behind each clip of a rendered data set.

    Args:
        root: Folder that `render_dataset` wrote.

    Returns:
        Name of a clip to its plan: events, hidden frames, intensities, labels.

    Raises:
        FileNotFoundError: If the folder has no complete rendering.
    """
    path = Path(root) / TRUTH_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {TRUTH_FILE} in '{Path(root)}'; it is the last file that render_dataset writes."
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    settings = document["settings"]
    timestamps = np.arange(settings["num_frames"]) / settings["fps"]
    threshold = settings["config"]["label_threshold"]
    plans = {}
    for name, clip in document["clips"].items():
        events = tuple(Event(**event) for event in clip["events"])
        intensities = intensities_at(events, timestamps)
        hidden = np.zeros(len(timestamps), dtype=bool)
        for start, stop in clip["hidden_frames"]:
            hidden[start:stop] = True
        plans[name] = ClipPlan(
            seed=tuple(clip["seed"]),
            photograph=clip["photograph"],
            mirrored=clip["mirrored"],
            timestamps=timestamps,
            events=events,
            hidden=hidden,
            intensities=intensities,
            labels=(intensities >= threshold).astype(np.int8),
        )
    return plans


def write_readme(path: Path, *, num_train: int, num_validation: int) -> None:
    """Write `README.txt`: what the data are, what they are not, and whom to credit."""
    credits_text = "\n".join(
        f"- {info.title}. {info.credit}. {info.licence}. Loaded with {info.source}."
        for info in PHOTOGRAPHS.values()
    )
    text = _README.format(
        num_train=num_train, num_validation=num_validation, truth=TRUTH_FILE, credits=credits_text
    )
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
