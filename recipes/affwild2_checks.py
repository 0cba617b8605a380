"""What stands in the way of a run, said in sentences before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from affwild2_presets import MAY_CHANGE, Config

from mmau.data.affwild2_check import check_data_root
from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.modules import LOSSES, TEMPORAL_MODELS
from mmau.training import differing_settings


def problems_of(config: Config, settings: Mapping[str, Any], num_ranks: int = 1) -> list[str]:
    """Return everything that stands in the way of a run; `settings` are the config as JSON."""
    optim, problems = config.optim, _problems_of_data_root(config)
    for registry, component in (
        (VISUAL_ENCODERS, config.model.visual),
        (AUDIO_ENCODERS, config.model.audio),
        (TEMPORAL_MODELS, config.model.temporal),
        (LOSSES, config.loss),
    ):
        if component is not None:
            try:
                registry.check_options(component.name, component.options)
            except (LookupError, ImportError, TypeError) as error:
                problems.append(str(error))
    for component in (config.model.visual, config.model.audio):
        name = component.options.get("name") if component else None
        if name and not Path(name).is_dir() and not _weights_at_hand(name):
            problems.append(
                f"the weights of {name!r} are not on this machine: "
                f"`hf download {name}` fetches them once."
            )
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda, but torch sees no CUDA device.")
    if config.device == "cpu" and optim.precision == "fp16":
        problems.append("--optim.precision fp16 needs a GPU; on a CPU, bf16 or fp32 work.")
    if optim.swa_epochs > optim.epochs:
        problems.append("--optim.swa-epochs must not exceed --optim.epochs.")
    if optim.swa_lr is not None and not 0 <= optim.swa_lr <= optim.lr:
        problems.append(f"--optim.swa-lr must be 0 to --optim.lr, {optim.lr}; got {optim.swa_lr}.")
    if optim.patience is not None and not optim.validate_every:
        problems.append("--optim.patience counts validations: it needs --optim.validate-every.")
    if optim.batch_clips < num_ranks:
        problems.append(
            f"--optim.batch-clips {optim.batch_clips} cannot be shared by {num_ranks} processes; "
            "give at least one clip to each."
        )
    if config.data.drop_sound + config.data.drop_face > 1:
        problems.append("--data.drop-sound and --data.drop-face must not exceed 1 together.")
    if config.data.flip and config.frame_stage is not None:
        problems.append("--data.flip mirrors pictures, but a frame stage caches what they show.")
    record = config.out / "config.json"
    if any(config.out.glob("*/states/step-*.pt")):
        differing = differing_settings(record, settings, ignore=MAY_CHANGE)
        if differing:
            problems.append(
                f"{config.out} holds a run with other settings ({'; '.join(differing[:4])}"
                f"{f'; and {len(differing) - 4} more' if len(differing) > 4 else ''}). Give "
                "another --out, or delete that folder to start over."
            )
    return problems


def problems_of_ranks(num_clips: int, num_ranks: int) -> list[str]:
    """Return what stands in the way once the number of clips is known."""
    if num_clips >= num_ranks:
        return []
    return [
        f"{num_ranks} processes cannot share {num_clips} training clips; start at most "
        f"{num_clips}, or cut shorter clips with --data.clip-frames."
    ]


def stop_if(problems: Sequence[str]) -> None:
    """End the run with one line per problem, if there is any."""
    if problems:
        raise SystemExit("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def _problems_of_data_root(config: Config) -> list[str]:
    if (config.data.root is None) == (config.data.render is None):
        return ["give the data: --data.root DIR (the Aff-Wild2 folder), or a render preset."]
    if config.data.root is None:
        return []
    labels = config.data.root / "AU_Detection_Challenge"
    folders = (
        config.data.root,
        config.data.root / "videos",
        labels / "Train_Set",
        labels / "Validation_Set",
    )
    missing = [f"no such folder: {folder}" for folder in folders if not folder.is_dir()]
    if missing:
        return missing
    # `mmau doctor` opens the videos, too, and lists what is merely odd.
    findings = check_data_root(config.data.root, open_videos=False)
    return [f"{one.where}: {one.message}" for one in findings if one.severity == "error"]


def _weights_at_hand(name: str) -> bool:
    """Return whether a model of the hub is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
