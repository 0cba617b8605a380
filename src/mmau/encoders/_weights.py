"""Loading weights of the transformers library, with its long errors made short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmau._checks import did_you_mean
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

__all__ = [
    "WeightsNotFoundError",
    "check_config_keys",
    "load_backbone",
    "load_config",
    "model_class_named",
    "own_names",
]


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are neither on this machine nor can they be fetched."""


def _explain(name: str, error: Exception) -> Exception:
    path = Path(name)
    if path.is_absolute() or name.startswith("."):
        if not path.is_dir():
            return WeightsNotFoundError(f"no such folder: {name!r}, given as pretrained weights.")
        return WeightsNotFoundError(
            f"the folder {name!r} holds no usable weights: {str(error).splitlines()[0]}"
        )
    return WeightsNotFoundError(
        f"the weights of {name!r} are not in the local cache and could not be fetched; check the "
        f"name and the connection, or fetch them where there is one with `hf download {name}` "
        "and pass the folder instead of the name."
    )


def model_class_named(name: str) -> Any:
    """Return a model class of transformers.

    Args:
        name: Its name, such as `"CLIPVisionModel"`.

    Returns:
        The class.

    Raises:
        ValueError: If there is none of that name.
    """
    import transformers

    with hide_broken_torchaudio():
        found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        known = [known for known in dir(transformers) if known.endswith("Model")]
        raise ValueError(f"transformers has no model class {name!r}{did_you_mean(name, known)}")
    return found


def load_config(
    name: str, *, revision: str | None, model_types: Iterable[str] | None = None
) -> Any:
    """Load a configuration and check that it is of the expected family.

    Args:
        name: Name on the hub, or a local folder.
        revision: Branch, tag or commit.
        model_types: Accepted `model_type` values; any if left out.

    Returns:
        The configuration.

    Raises:
        WeightsNotFoundError: If it cannot be had.
        ValueError: If it belongs to another kind of model.
    """
    from transformers import AutoConfig

    try:
        with hide_broken_torchaudio():
            config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _explain(name, error) from error
    accepted = None if model_types is None else tuple(model_types)
    if accepted is not None and config.model_type not in accepted:
        raise ValueError(
            f"{name!r} is a model of type {config.model_type!r}; expected {' or '.join(accepted)}."
        )
    return config


def load_backbone(
    model_class: Any,
    name: str,
    config: Any,
    *,
    revision: str | None,
    optional: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a model and refuse weights that do not fill it.

    Args:
        model_class: Class of transformers.
        name: Name on the hub, or a local folder.
        config: Its configuration, with our changes.
        revision: Branch, tag or commit.
        optional: Endings of parameter names that may be absent.
        options: Further arguments of the model's constructor.

    Returns:
        The model, in evaluation mode.

    Raises:
        WeightsNotFoundError: If the weights cannot be had.
        ValueError: If some weights are absent or have another shape; transformers would only warn
            and leave them random.
    """
    try:
        with hide_broken_torchaudio():
            model, report = model_class.from_pretrained(
                name, config=config, revision=revision, output_loading_info=True, **(options or {})
            )
    except OSError as error:
        raise _explain(name, error) from error
    endings = tuple(optional)
    absent = [str(key) for key in report["missing_keys"] if not str(key).endswith(endings)]
    absent += [str(key) for key in report.get("mismatched_keys", ())]
    if absent:
        shown = ", ".join(sorted(absent)[:3])
        raise ValueError(
            f"the weights of {name!r} do not fill the model: {len(absent)} tensors are missing or "
            f"of another shape, such as {shown}."
        )
    loaded: nn.Module = model.eval()
    return loaded


def check_config_keys(config: Mapping[str, Any], *classes: Any) -> None:
    """Refuse a misspelt key, which transformers would store and ignore.

    Args:
        config: Keys and values.
        *classes: Configuration classes whose fields are accepted.

    Raises:
        TypeError: If a key is a field of none.
    """
    known = sorted(
        {key for c in classes for key in c.__dataclass_fields__ if not key.startswith("_")}
    )
    for key in config:
        if key not in known:
            raise TypeError(
                f"{classes[0].__name__} takes no option {key!r}{did_you_mean(key, known)}"
            )


def own_names(backbone: nn.Module, keep: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """Name the live tensors of a backbone without the traces that LoRA leaves in its names.

    Args:
        backbone: A model, with or without LoRA.
        keep: Which names to keep; all by default.

    Returns:
        `backbone.<name>` to tensor.
    """
    return {
        f"backbone.{name.replace('.base_layer.', '.')}": tensor
        for name, tensor in backbone.state_dict(keep_vars=True).items()
        if ".lora_" not in name and keep(name)
    }
