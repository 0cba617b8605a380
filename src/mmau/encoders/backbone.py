"""Small trainable additions to a frozen Transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_range, did_you_mean
from mmau.encoders.protocols import PretrainedSource
from mmau.encoders.torchaudio_backend import hide_broken_torchaudio

__all__ = ["BottleneckAdapter", "LayerMix", "count_parameters", "freeze", "inject_lora"]


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
    """Return a model class of transformers."""
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
    """Load a configuration and check that it is of the expected family."""
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
    """Load a model and refuse weights that do not fill it."""
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
    """Refuse a misspelt key, which transformers would store and ignore."""
    known = sorted(
        {key for c in classes for key in c.__dataclass_fields__ if not key.startswith("_")}
    )
    for key in config:
        if key not in known:
            raise TypeError(
                f"{classes[0].__name__} takes no option {key!r}{did_you_mean(key, known)}"
            )


def own_names(backbone: nn.Module, keep: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """Name the live tensors of a backbone without the traces that LoRA leaves in its names."""
    return {
        f"backbone.{name.replace('.base_layer.', '.')}": tensor
        for name, tensor in backbone.state_dict(keep_vars=True).items()
        if ".lora_" not in name and keep(name)
    }


def freeze(module: nn.Module) -> nn.Module:
    """Switch the gradients of all parameters off and put the module into evaluation mode.

    Args:
        module: Any module; changed in place.

    Returns:
        The module itself.
    """
    module.requires_grad_(False)
    return module.eval()


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters.

    Args:
        module: Any module, also one on the meta device.

    Returns:
        Trainable, all.

    Examples:
        >>> count_parameters(nn.Linear(3, 2))
        (8, 8)
    """
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


class BottleneckAdapter(nn.Module):
    r"""Add a low-dimensional correction to the output of a frozen sub-layer.

    $$ y = x + W_\uparrow \, \text{GELU}(W_\downarrow x + b_\downarrow) + b_\uparrow $$

    The up projection starts at zero, so at initialisation this is the identity. It is attached with
    a forward hook, which leaves the names of the frozen weights as their library wrote them.

    Args:
        d_model: Width of the sub-layer's output.
        d_bottleneck: Width in between.

    Shape:
        - x: `(..., d_model)`
        - output: `(..., d_model)`

    References:
        Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, 2019.

    Examples:
        >>> adapter = BottleneckAdapter(4, 2)
        >>> x = torch.ones(1, 4)
        >>> torch.equal(adapter(x), x)
        True
    """

    def __init__(self, d_model: int, d_bottleneck: int) -> None:
        super().__init__()
        check_range("d_bottleneck", d_bottleneck, 1)
        self.down = nn.Linear(d_model, d_bottleneck)
        self.up = nn.Linear(d_bottleneck, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the identity."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Correct `x`."""
        correction: Tensor = self.up(F.gelu(self.down(x)))
        return x + correction

    def attach(self, module: nn.Module) -> None:
        """Apply this adapter to whatever `module` returns from now on.

        Args:
            module: The sub-layer; its class, parameters and names stay as they are.
        """
        module.register_forward_hook(self._correct)

    # A bound method rather than a closure: it survives copy.deepcopy and pickling, and then refers
    # to the copied adapter.
    def _correct(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        corrected: Tensor = self(output)
        return corrected


class LayerMix(nn.Module):
    r"""Average the layers of a Transformer with learned weights.

    $$ y = \sum_l \text{softmax}(w)_l \, \hat x_l $$

    where $\hat x_l$ is layer $l$ brought to zero mean and unit variance over its width (with
    `normalize`), so that the weights compare layers and not the growth of the residual stream. All
    layers start with the same weight.

    Args:
        num_layers: Number of states that are mixed.
        normalize: Whether each state is normalised first; without parameters.

    Shape:
        - states: `num_layers` tensors `(..., d)`
        - output: `(..., d)`

    Examples:
        >>> mix = LayerMix(2, normalize=False)
        >>> mix([torch.zeros(1, 2), torch.ones(1, 2)])
        tensor([[0.5000, 0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, num_layers: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.weight = nn.Parameter(torch.zeros(num_layers))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Mix the states."""
        shares = self.weight.softmax(0)
        mixed: Tensor | None = None
        for share, state in zip(shares, states, strict=True):
            x = F.layer_norm(state, state.shape[-1:]) if self.normalize else state
            mixed = share * x if mixed is None else mixed + share * x
        if mixed is None:
            raise ValueError("`states` must hold at least one tensor; got none.")
        return mixed


def inject_lora(
    model: nn.Module,
    suffixes: Mapping[str, Iterable[str]],
    num_layers: int,
    *,
    rank: int,
    alpha: float,
    last_layers: int | None = None,
) -> dict[str, str]:
    """Put LoRA pairs beside named linear layers, in place, and freeze everything else.

    Module names differ between versions of transformers, so each role is looked up by the last part
    of the name, and there must be exactly one per layer: a silent miss would train nothing.

    Args:
        model: A Transformer; its class stays the same.
        suffixes: Role to the names that it may bear: `{"query": ("query", "q_proj")}`.
        num_layers: Number of Transformer layers.
        rank: Rank of the update.
        alpha: The update is scaled by `alpha / rank`.
        last_layers: Adapt only that many layers, counted from the output; all if `None`.

    Returns:
        Name of our own, such as `lora.0.query.down`, to the name of the trainable parameter.

    Raises:
        RuntimeError: If a role is not found once per layer.

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_range("lora_rank", rank, 1)
    if last_layers is not None:
        check_range("lora_layers", last_layers, 1, num_layers)
    chosen = _projections(model, suffixes, num_layers)
    first = 0 if last_layers is None else num_layers - last_layers
    targets = {
        f"lora.{index}.{role}": names[index]
        for role, names in chosen.items()
        for index in range(first, num_layers)
    }
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets.values())), model
    )
    pairs = {}
    for own_name, module_name in targets.items():
        for own_part, part in (("down", "lora_A"), ("up", "lora_B")):
            pairs[f"{own_name}.{own_part}"] = f"{module_name}.{part}.default.weight"
    return pairs


def _projections(
    model: nn.Module, suffixes: Mapping[str, Iterable[str]], num_layers: int
) -> dict[str, list[str]]:
    """Names of the linear layers of each role, in the order of the layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    for role, endings in suffixes.items():
        accepted = tuple(endings)
        names = [name for name in linear if name.split(".")[-1] in accepted]
        if len(names) != num_layers:
            raise RuntimeError(
                f"expected one {role} projection in each of {num_layers} layers, by the names "
                f"{', '.join(accepted)}; found {len(names)}. This version of transformers may call "
                f"them otherwise; the first layers are called {', '.join(linear[:6])}."
            )
        found[role] = names
    return found


_Encoder = TypeVar("_Encoder", bound="AdaptedBackbone")


class AdaptedBackbone(nn.Module):
    """A backbone that is frozen or not, with LoRA pairs in it or not."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        freeze_backbone: bool,
        lora_rank: int | None,
        source: PretrainedSource | None,
        without_effect: Sequence[str],
    ) -> None:
        super().__init__()
        if lora_rank is not None and not freeze_backbone:
            raise ValueError(
                "LoRA next to a trainable backbone has no effect of its own; "
                "use `lora_rank=None` or `freeze_backbone=True`."
            )
        self.backbone = backbone
        self.freeze_backbone = freeze_backbone
        self.source = source
        self._lora_names: dict[str, str] = {}
        if freeze_backbone:
            freeze(backbone)
        else:
            for name, parameter in backbone.named_parameters():
                if name.endswith(tuple(without_effect)):
                    parameter.requires_grad_(False)

    def train(self: _Encoder, mode: bool = True) -> _Encoder:
        """Switch training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint needs, under names of our own."""
        tensors = {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if not name.startswith("backbone.")
        }
        live = dict(self.backbone.named_parameters())
        tensors.update({own: live[name] for own, name in self._lora_names.items()})
        if self.source is None or not self.freeze_backbone:
            tensors.update(own_names(self.backbone))
        return tensors

    def described(self) -> str:
        """Say where the weights come from and whether they are frozen."""
        source = self.source.name if self.source else "random weights"
        return f"{source}, freeze_backbone={self.freeze_backbone}"
