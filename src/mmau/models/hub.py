"""Model cards, and putting a checkpoint folder on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmau._files import whole_file
from mmau._optional import require
from mmau.models.pretrained import CheckpointRecord, read_record

__all__ = ["model_card", "push_to_hub"]

_CARD = "README.md"


def model_card(folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> str:
    """Write what a stranger must know about a checkpoint, from what the folder itself says.

    It states measured results only: those that are handed over, or none. Missing facts are named as
    missing.

    Args:
        folder: A checkpoint folder.
        metrics: Name to value, as measured on data that the provenance names.

    Returns:
        Markdown with the hub's metadata at its head.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no checkpoint.
    """
    folder = Path(folder)
    record = read_record(folder)
    lines = [
        "---",
        "library_name: mmau",
        f"license: {record.licence if record.licence != 'unstated' else 'unknown'}",
        "pipeline_tag: video-classification",
        "tags: [facial-action-units, facs, audio-visual]",
        "---",
        "",
        f"# Action Unit detector ({len(record.au_names)} Action Units)",
        "",
        f"Predicts {', '.join(record.au_names)} for every frame of a video.",
        "",
        "```python",
        "from mmau.inference import AUPredictor",
        "",
        "table = AUPredictor.from_pretrained(folder).predict_file(video)",
        "```",
        "",
        *_section("Trained on", record.provenance, "Not stated by whoever trained it."),
        *_section("Architecture", _architecture(record), ""),
        *_section("Input", record.preprocessing, "Not stated."),
        *_section(
            "Measured",
            {name: f"{value:.4g}" for name, value in (metrics or {}).items()},
            "Nothing was measured, or nobody wrote it down.",
        ),
        "## Decisions",
        "",
        _thresholds(folder),
        "",
        "## Licence and limits",
        "",
        f"Licence of the weights: {record.licence}. It follows from the data and from the base "
        "weights" + (f": {_sources(record)}." if record.base_weights else "."),
        "",
        "Action Units are movements of muscles, not emotions. Faces unlike those of the training "
        "data may be read worse; nobody has measured how much.",
        "",
        f"Written by {', '.join(f'{k} {v}' for k, v in record.versions.items())}.",
    ]
    return "\n".join(lines) + "\n"


def _section(title: str, facts: Mapping[str, Any], otherwise: str) -> list[str]:
    rows = [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in facts.items()]
    return [f"## {title}", "", *(rows or [otherwise]), ""]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _architecture(record: CheckpointRecord) -> dict[str, Any]:
    config = record.config
    audio = "none" if config.audio is None else config.audio.name
    return {
        "visual encoder": config.visual.name,
        "audio encoder": audio,
        "alignment": config.alignment,
        "temporal model": config.temporal.name,
    }


def _sources(record: CheckpointRecord) -> str:
    return ", ".join(str(source["name"]) for source in record.base_weights.values())


def _thresholds(folder: Path) -> str:
    path = folder / "calibration.json"
    if not path.is_file():
        return "No calibration is in the folder: an Action Unit counts as active from 0.5."
    values = json.loads(path.read_text(encoding="utf-8"))
    note = values.get("note") or "how they were chosen is not stated"
    return f"`calibration.json` holds a threshold for each Action Unit; {note}."


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint folder with a model card.

    Weights trained on licensed data may often not be published: Aff-Wild2's agreement is one
    example. That is why a new repository is private unless you say otherwise, and why the folder
    must state its provenance and its licence.

    Args:
        folder: A checkpoint folder.
        repo_id: `"name/repository"`.
        metrics: Name to value, for the model card.
        private: Whether a new repository can be seen by its owners only.
        revision: Branch to upload to.
        token: Token of the hub; the one of `hf auth login` if left out.

    Returns:
        Address of the upload.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no checkpoint, or says nothing about its provenance or licence.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    folder = Path(folder)
    record = read_record(folder)
    missing = [
        word
        for word, value in (("provenance", record.provenance), ("licence", record.licence))
        if not value or value == "unstated"
    ]
    if missing:
        raise ValueError(
            f"{folder} does not state its {' and its '.join(missing)}; give them to "
            "`save_pretrained` before publishing weights."
        )
    hub = require("huggingface_hub", purpose="publishing weights", extra="encoders")
    with whole_file(folder / _CARD) as partial:
        partial.write_text(model_card(folder, metrics=metrics), encoding="utf-8")
    api = hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", _CARD],
            commit_message="Upload an Action Unit detector",
        )
    )
