"""Checkpoint folders: written, read, described by a model card, uploaded.

`model.safetensors` holds the weights that cannot be fetched again, `config.json` everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmau._files import atomic_dir, atomic_write
from mmau._optional import require
from mmau.encoders.protocols import SelectiveSaving
from mmau.models.config import DetectorConfig
from mmau.models.detector import AUDetector, build_detector

_FORMAT = "mmau.detector"
_FORMAT_VERSION = 1
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class CheckpointRecord:
    """What `config.json` says about a checkpoint."""

    config: DetectorConfig
    """Architecture, names of the outputs and size of the crops."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """What the input was in training: crop size, landmark scheme, sample rate, pixel range."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """On what the weights were trained, by what command, what was measured."""
    licence: str = "unstated"
    """Licence of the weights, which follows from the data and the base weights."""
    base_weights: dict[str, Any] = field(default_factory=dict)
    """Frozen encoders whose weights are not in the folder, and where they come from."""
    versions: dict[str, str] = field(default_factory=dict)
    """Libraries that wrote it."""

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.config.au_names


class LoadedDetector(NamedTuple):
    """What `load_pretrained` returns."""

    detector: AUDetector
    """In evaluation mode."""
    config: DetectorConfig
    """How it was built."""


def save_pretrained(
    detector: AUDetector,
    folder: str | Path,
    *,
    config: DetectorConfig | None = None,
    provenance: Mapping[str, Any] | None = None,
    licence: str = "unstated",
) -> Path:
    """Write a checkpoint folder; it is complete or absent.

    Weights of a frozen encoder that came from a hub or a folder are not written, only its name is.

    Args:
        detector: The detector.
        folder: Where to write; an older checkpoint there is replaced.
        config: How it was built; left out, what `build_detector` noted.
        provenance: On what the weights were trained and by what; JSON values.
        licence: Licence of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no config, the folder holds something that is not a checkpoint, or
            a weight is not finite.
    """
    folder = Path(folder)
    config = config or detector.config
    if config is None:
        raise ValueError("`config` is needed: this detector was not made by `build_detector`.")
    _refuse_to_replace(folder)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _live_tensors(detector).items()
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"the weight {name!r} holds NaN or infinite values; nothing was written."
            )
    record = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "detector": config.to_dict(),
        "au_names": list(detector.au_names),
        "preprocessing": {
            "crop_size": config.crop_size,
            "landmarks": config.regions,
            "pixel_range": [0.0, 1.0],
            "sample_rate": 16000,
        },
        "provenance": dict(provenance or {}),
        "licence": licence,
        "base_weights": {
            name: {"name": child.source.name, "revision": child.source.revision}
            for name, child in detector.named_children()
            if isinstance(child, SelectiveSaving) and child.source is not None
        },
        "versions": _versions(),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with atomic_dir(folder) as partial:
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
        (partial / _CONFIG).write_text(text, encoding="utf-8")
    return folder


def read_record(folder: str | Path) -> CheckpointRecord:
    """Read what a checkpoint says about itself, without building anything.

    Args:
        folder: A checkpoint folder.

    Returns:
        The record.

    Raises:
        FileNotFoundError: If there is no such folder, or no `config.json` in it.
        ValueError: If the folder is something else.
    """
    folder = Path(folder)
    if folder.is_file():
        what = "a pickle, which can run code when it is read" if _is_pickle(folder) else "a file"
        raise ValueError(
            f"{folder} is {what}; expected a checkpoint folder with {_WEIGHTS} and {_CONFIG}."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}.")
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it holds no {_CONFIG}.")
    pickles = [file.name for file in sorted(folder.iterdir()) if _is_pickle(file)]
    if pickles and not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read; "
            f"only {_WEIGHTS} is accepted."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"{path} does not describe a detector of mmau.")
    if values.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values.get('format_version')!r}; this version of mmau "
            f"reads {_FORMAT_VERSION}."
        )
    try:
        config = DetectorConfig.from_dict(values["detector"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    names = ("preprocessing", "provenance", "licence", "base_weights", "versions")
    return CheckpointRecord(config, **{name: values[name] for name in names if name in values})


def load_pretrained(folder: str | Path, *, device: str | torch.device = "cpu") -> LoadedDetector:
    """Build the detector that a folder describes and fill it, strictly.

    Args:
        folder: A checkpoint folder.
        device: Where the detector shall be.

    Returns:
        Detector in evaluation mode, and its config.

    Raises:
        FileNotFoundError: If there is no such folder, or a file in it is missing.
        ValueError: If weights are missing, superfluous, of another shape, or the file is damaged.
        WeightsNotFoundError: If frozen base weights must be fetched and cannot.
    """
    record = read_record(folder)
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {_WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}.") from error
    # Its name in older checkpoints.
    given = {n.replace("audio_query.", "audio_cross_attention.", 1): t for n, t in given.items()}
    detector = build_detector(record.config)
    _fill(_live_tensors(detector), given, str(path))
    detector.eval().to(device)
    return LoadedDetector(detector, record.config)


def _live_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """Name the tensors of a detector that a checkpoint needs, without copying them."""
    tensors = dict(detector.state_dict(keep_vars=True))
    for name, child in detector.named_children():
        if isinstance(child, SelectiveSaving):
            tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{name}.")}
            tensors.update({f"{name}.{k}": v for k, v in child.saved_tensors().items()})
    return dict(sorted(tensors.items()))


@torch.no_grad()
def _fill(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into place if names and shapes agree exactly, and touch nothing otherwise."""
    for words, names in (
        ("lacks", sorted(set(expected) - set(given))),
        ("has weights that the detector does not take:", sorted(set(given) - set(expected))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{source} {words} {', '.join(names[:3])}{more}.")
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(given[name].shape)} in {source}, but "
                f"{tuple(tensor.shape)} in the detector: the checkpoint is of another size."
            )
    for name, tensor in expected.items():
        tensor.copy_(given[name])


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in _PICKLES


def _refuse_to_replace(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder to write the checkpoint to.")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            read_record(folder)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{folder} holds something that is not a checkpoint and would be replaced; "
                "give another folder."
            ) from error


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("mmau", "torch", "transformers", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def model_card(folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> str:
    """Describe a checkpoint for its users, from what the folder itself says.

    Of results it states those that are given, or none. Missing facts are named as missing.

    Args:
        folder: A checkpoint folder.
        metrics: Name to value, as measured on data that the provenance names.

    Returns:
        Markdown with the hub's metadata at its head.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not a checkpoint.
    """
    record = read_record(folder)
    config, au_names = record.config, record.au_names
    architecture = {
        "visual encoder": config.visual.name,
        "audio encoder": "none" if config.audio is None else config.audio.name,
        "alignment": config.alignment,
        "temporal model": config.temporal.name,
    }
    measured = {name: f"{value:.4g}" for name, value in (metrics or {}).items()}
    sources = ", ".join(str(source["name"]) for source in record.base_weights.values())
    return f"""---
library_name: mmau
license: {"unknown" if record.licence == "unstated" else record.licence}
pipeline_tag: video-classification
tags: [facial-action-units, facs, audio-visual]
---

# Action Unit detector ({len(au_names)} Action Units)

Predicts {", ".join(au_names)} for every frame of a video.

```python
from mmau.inference import AUPredictor

table = AUPredictor.from_pretrained(folder).predict_file(video)
```

## Trained on

{_listed(record.provenance)}

## Architecture

{_listed(architecture)}

## Input

{_listed(record.preprocessing)}

## Measured

{_listed(measured, "Nothing was measured, or it was not written down.")}

## Decisions

{_decisions(Path(folder))}

## Licence and limits

Licence of the weights: {record.licence}. It follows from the data and from the base weights\
{": " if sources else ""}{sources}.

Action Units are movements of muscles, not emotions. Faces unlike those of the training data may be
recognised worse; by how much has not been measured.

Written by {", ".join(f"{name} {version}" for name, version in record.versions.items())}.
"""


def _listed(facts: Mapping[str, Any], otherwise: str = "Not stated.") -> str:
    rows = [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in facts.items()]
    return "\n".join(rows) or otherwise


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _decisions(folder: Path) -> str:
    path = folder / "calibration.json"
    if not path.is_file():
        return "No calibration is in the folder: an Action Unit counts as active from 0.5."
    note = json.loads(path.read_text(encoding="utf-8")).get("note")
    return (
        "`calibration.json` holds a threshold for each Action Unit; "
        f"{note or 'how they were chosen is not stated'}."
    )


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
    example. That is why a new repository is private by default, and why the folder must state its
    provenance and its licence.

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
        ValueError: If it is not a checkpoint, or says nothing about its provenance or licence.
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
    with atomic_write(folder / _CARD) as partial:
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
