"""What every encoder around a model of transformers shares: loading, freezing, what may learn."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmau._checks import check_choice, check_range, did_you_mean
from mmau._optional import hide_broken_torchaudio
from mmau.encoders.protocols import PretrainedSource

__all__ = ["BottleneckAdapter", "LayerMix", "count_parameters"]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What learns in an encoder around a pretrained backbone, and how exact the rest is.

    With the defaults nothing is added and pretrained weights stay as they are. A record replaces
    what is usual for an encoder as a whole: WavLM with LoRA beside its usual mix of layers is
    `AdapterOptions(lora_rank=8, mix_layers=True)`. Registered names take the same options one by
    one and keep what is usual for the others: `AUDIO_ENCODERS.create("wavlm", lora_rank=8)`.

    Raises:
        ValueError: If a value is out of range, or LoRA or half precision is asked for next to a
            trainable backbone.

    Examples:
        >>> AdapterOptions(lora_rank=8).lora_alpha
        16.0
        >>> AdapterOptions(lora_rank=8, freeze_backbone=False)
        Traceback (most recent call last):
        ...
        ValueError: LoRA next to a trainable backbone has no effect of its own; ...
    """

    lora_rank: int | None = None
    """Rank of the LoRA pairs; `None` for none."""
    lora_alpha: float = 16.0
    """The LoRA update is scaled by `lora_alpha / lora_rank`."""
    lora_layers: int | None = None
    """Put LoRA only into that many layers, counted from the output; into all if `None`."""
    lora_place: Literal["attention", "feed_forward"] | None = None
    """Linear layers that get LoRA: query and value of the `"attention"`, or both of the
    `"feed_forward"`, which only wav2vec-like models offer, and take if this is `None`."""
    d_bottleneck: int | None = None
    """Inner width of a `BottleneckAdapter` after each feed-forward; `None` for none. Wav2vec-like
    models only."""
    mix_layers: bool = False
    """Whether the output is a learned `LayerMix` of all layers, or the last one. Wav2vec-like
    models only."""
    normalize_layers: bool = True
    """Whether the layers are normalised before they are mixed."""
    freeze_backbone: bool | None = None
    """Whether the weights of the backbone are left as they are. `None`: pretrained ones are, random
    ones (those of `from_config`) if LoRA or bottlenecks are added to them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which frozen weights are kept and computed, whatever their file stores. What
    learns is float32, and features are no less exact than the input."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_layers", "d_bottleneck"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        if self.lora_place is not None:
            check_choice("lora_place", self.lora_place, ("attention", "feed_forward"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.lora_rank is not None and self.freeze_backbone is False:
            raise ValueError(
                "LoRA next to a trainable backbone has no effect of its own; "
                "use `lora_rank=None` or `freeze_backbone=True`."
            )
        if self.dtype != "float32" and self.freeze_backbone is False:
            raise ValueError(
                f"`dtype={self.dtype!r}` is for frozen weights, those that learn are float32; "
                "use `freeze_backbone=True`, or leave `dtype` out and train under autocast."
            )


# ------------------------------------------------------------------ what is added
def freeze(module: nn.Module) -> nn.Module:
    """Switch the gradients of all parameters off and put the module into evaluation mode."""
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

    The up projection starts at zero, so at initialisation this is the identity.

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
        correction: Tensor = self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))
        return x + correction.to(x.dtype)

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
    model: nn.Module, roles: Mapping[str, Iterable[str]], num_layers: int, options: AdapterOptions
) -> dict[str, str]:
    """Put LoRA pairs beside named linear layers, in place, and freeze everything else.

    Module names differ between versions of transformers, so each role (`{"query": ("query",
    "q_proj")}`) is looked up by the last part of the name, and there must be exactly one per layer:
    a silent miss would train nothing. Returns a name of our own, such as `lora.0.query.down`, to
    the name of the trainable parameter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    depth = options.lora_layers or num_layers
    check_range("lora_layers", depth, 1, num_layers)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = {}
    for role, endings in roles.items():
        accepted = tuple(endings)
        names = [name for name in linear if name.split(".")[-1] in accepted]
        if len(names) != num_layers:
            raise RuntimeError(
                f"expected one {role} projection in each of {num_layers} layers, by the names "
                f"{', '.join(accepted)}; found {len(names)}. This version of transformers may call "
                f"them otherwise; the first layers are called {', '.join(linear[:6])}."
            )
        for index in range(num_layers - depth, num_layers):
            targets[f"lora.{index}.{role}"] = names[index]
    settings = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=list(targets.values())
    )
    inject_adapter_in_model(settings, model)
    return {
        f"{own_name}.{own_part}": f"{module_name}.{part}.default.weight"
        for own_name, module_name in targets.items()
        for own_part, part in (("down", "lora_A"), ("up", "lora_B"))
    }


# ------------------------------------------------------------------ published weights
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


def _model_class(name: str) -> Any:
    """Return a model class of transformers."""
    import transformers

    with hide_broken_torchaudio():
        found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        known = [known for known in dir(transformers) if known.endswith("Model")]
        raise ValueError(f"transformers has no model class {name!r}{did_you_mean(name, known)}")
    return found


def _load_config(name: str, revision: str | None, accepted: Sequence[str]) -> Any:
    """Load a configuration and check that it is of one of the accepted kinds; of any, if none."""
    from transformers import AutoConfig

    try:
        with hide_broken_torchaudio():
            config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _explain(name, error) from error
    if accepted and config.model_type not in accepted:
        raise ValueError(
            f"{name!r} is a model of type {config.model_type!r}; expected {' or '.join(accepted)}."
        )
    return config


def _load_model(model_class: Any, name: str, may_lack: tuple[str, ...], **options: Any) -> Any:
    """Load a model and refuse weights that do not fill it."""
    try:
        with hide_broken_torchaudio():
            model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    except OSError as error:
        raise _explain(name, error) from error
    absent = [str(key) for key in report["missing_keys"] if not str(key).endswith(may_lack)]
    absent += [str(key) for key in report.get("mismatched_keys", ())]
    if absent:
        raise ValueError(
            f"the weights of {name!r} do not fill the model: {len(absent)} tensors are missing or "
            f"of another shape, such as {', '.join(sorted(absent)[:3])}."
        )
    return model.eval()


def _load_preprocessing(name: str, revision: str | None, part: str) -> dict[str, Any]:
    """Read how published weights want their input; empty if no file says it."""
    from transformers.utils import cached_file

    # transformers 5 writes a folder of several parts into the first.
    for file in ("processor_config.json", "preprocessor_config.json"):
        try:
            path = Path(cached_file(name, file, revision=revision))
        except OSError:
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        said = said.get(part, {}) if file == "processor_config.json" else said
        if said:
            return {key: value for key, value in said.items() if value is not None}
    if not Path(name).is_dir():
        warnings.warn(
            f"no preprocessor_config.json of {name!r} is in the local cache or could be fetched; "
            "its input is normalised as is usual for this kind of model.",
            stacklevel=3,
        )
    return {}


def contradiction(name: str, stated: str, taken: str) -> ValueError:
    """Say that pretrained weights want another input than they would get."""
    return ValueError(
        f"the preprocessor_config.json of {name!r} says {stated}, which contradicts {taken}; "
        "correct the file if it is wrong."
    )


def _check_config_keys(config: Mapping[str, Any], classes: Sequence[Any]) -> None:
    """Refuse a misspelt key, which transformers would store and ignore."""
    known = sorted(
        {key for c in classes for key in c.__dataclass_fields__ if not key.startswith("_")}
    )
    for key in config:
        if key not in known:
            raise TypeError(
                f"{classes[0].__name__} takes no option {key!r}{did_you_mean(key, known)}"
            )


# ------------------------------------------------------------------ the encoder
@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts in which one family of models differs from another."""

    usual: AdapterOptions = AdapterOptions()
    """What is added to pretrained weights unless it is said."""
    options: tuple[str, ...] = (
        "lora_rank",
        "lora_alpha",
        "lora_layers",
        "lora_place",
        "freeze_backbone",
        "dtype",
    )
    """Fields of `AdapterOptions` that mean something here."""
    lora_places: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Place, the usual one first, to the roles of its linear layers and the names they may bear."""
    preprocessing: str
    """Part of `processor_config.json` that tells how the input is made."""
    without_effect: tuple[str, ...]
    """Endings of parameters on which no output depends: they never learn."""
    may_lack: tuple[str, ...] = ()
    """Endings of weights that published files may lack."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is set in each config and model that has it."""
    configs: tuple[Any, ...] = ()
    """Configuration classes of the family; none: any model of the hub."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration for random weights, unless it is said."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's class."""
    architectures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name on the hub to the sizes of a published model, for building it with random weights."""


def as_exact_as(inputs: Tensor, features: Tensor) -> Tensor:
    """Bring features of half precision weights to the precision of the input."""
    return features.to(torch.promote_types(features.dtype, inputs.dtype))


Encoder = TypeVar("Encoder", bound="AdaptedBackbone")


class AdaptedBackbone(nn.Module):
    """A backbone of transformers that is frozen or not, with LoRA pairs in it or not."""

    family: ClassVar[Family]

    def __init__(
        self, backbone: nn.Module, adapters: AdapterOptions | None, source: PretrainedSource | None
    ) -> None:
        super().__init__()
        adapters = self.family.usual if adapters is None else adapters
        for name, value in vars(adapters).items():
            if name not in self.family.options and value != getattr(AdapterOptions, name):
                raise ValueError(
                    f"{type(self).__name__} has no use for `{name}={value!r}`; it takes "
                    f"{', '.join(self.family.options)}."
                )
        config: Any = backbone.config
        self._apply_settings(config)
        self._apply_settings(backbone)
        self.backbone = backbone
        self.d_out = int(config.hidden_size)
        self.freeze_backbone = adapters.freeze_backbone is not False
        self.source = source
        if self.freeze_backbone:
            freeze(backbone)
        else:
            for name, parameter in backbone.named_parameters():
                if name.endswith(self.family.without_effect):
                    parameter.requires_grad_(False)
        self._lora_names: dict[str, str] = {}
        if adapters.lora_rank is not None:
            place: str = adapters.lora_place or next(iter(self.family.lora_places))
            self._lora_names = inject_lora(
                backbone, self._lora_roles(place), int(config.num_hidden_layers), adapters
            )
        frozen = getattr(torch, adapters.dtype)
        for parameter in backbone.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)

    @classmethod
    def from_pretrained(
        cls: type[Encoder],
        name: str,
        adapters: AdapterOptions | None = None,
        *,
        model_class: str = "AutoModel",
        attention: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Encoder:
        """Load published weights and freeze them, beside new adapters.

        The input is normalised as the `preprocessor_config.json` beside the weights says, or where
        there is none, as is usual for the family.

        Args:
            name: Name on the hub such as `"facebook/dinov2-large"`, or a local folder.
            adapters: What learns; by default what is usual for this kind of model.
            model_class: Class of transformers that holds the weights, where a checkpoint has
                several parts: `"CLIPVisionModel"`.
            attention: Attention implementation: `"sdpa"`, `"eager"` or `"flash_attention_2"`.
            revision: Branch, tag or commit.
            **options: Keyword arguments of the class.

        Returns:
            The encoder.

        Raises:
            WeightsNotFoundError: If the weights are not here and cannot be fetched.
            ValueError: If the weights are of another kind of model, or an option contradicts their
                `preprocessor_config.json`.
        """
        kind = _model_class(model_class)
        config = _load_config(name, revision, [known.model_type for known in cls.family.configs])
        if model_class != "AutoModel":
            # A checkpoint of several towers keeps the sizes of each in a config of its own.
            config = getattr(config, "vision_config", config)
        cls._prepare(config, attention)
        said = _load_preprocessing(name, revision, cls.family.preprocessing)
        if said:
            options = cls._follow(said, name, options)
        model = _load_model(
            kind,
            name,
            cls.family.may_lack,
            config=config,
            revision=revision,
            dtype=(adapters or cls.family.usual).dtype,
            **cls.family.model_options,
        )
        backbone = cls._backbone_of(model, attention)
        return cls(backbone, adapters, source=PretrainedSource(name, revision), **options)

    @classmethod
    def from_config(
        cls: type[Encoder],
        config: Mapping[str, Any],
        adapters: AdapterOptions | None = None,
        *,
        attention: str | None = None,
        **options: Any,
    ) -> Encoder:
        """Build an encoder with random weights, which all learn unless something is added.

        Args:
            config: Fields of the family's configuration in transformers, such as `hidden_size`;
                `family.architectures` has those of the published models.
            adapters: What is added and what is frozen; by default no LoRA and no bottlenecks.
            attention: Attention implementation: `"sdpa"`, `"eager"` or `"flash_attention_2"`.
            **options: Keyword arguments of the class.

        Returns:
            The encoder.

        Raises:
            TypeError: If `config` has a key that is no field, or the class serves any model.
        """
        from transformers import AutoModel

        if not cls.family.configs:
            raise TypeError(
                f"{cls.__name__} serves many kinds of models: build one with transformers and pass "
                f"it, {cls.__name__}(model)."
            )
        _check_config_keys(config, cls.family.configs)
        if adapters is None:
            adapters = replace(
                cls.family.usual, lora_rank=None, d_bottleneck=None, freeze_backbone=None
            )
        if adapters.freeze_backbone is None:
            adds = adapters.lora_rank is not None or adapters.d_bottleneck is not None
            adapters = replace(adapters, freeze_backbone=adds)
        built = cls._config_class(config)(**{**cls.family.config_defaults, **config})
        cls._prepare(built, attention)
        with hide_broken_torchaudio():
            model = AutoModel.from_config(built, **cls.family.model_options)
        return cls(cls._backbone_of(model, attention), adapters, source=None, **options)

    @classmethod
    def _config_class(cls, config: Mapping[str, Any]) -> Any:
        """Choose the class that holds these fields."""
        return cls.family.configs[0]

    @classmethod
    def _prepare(cls, config: Any, attention: str | None) -> None:
        """Set in a config what must be so before the model is built."""
        cls._apply_settings(config)
        config._attn_implementation = attention or "sdpa"

    @classmethod
    def _backbone_of(cls, model: nn.Module, attention: str | None) -> nn.Module:
        """Return the part of a model that is used."""
        return model

    @classmethod
    def _follow(
        cls, said: Mapping[str, Any], name: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Complete the options of the class by what a preprocessor_config.json says."""
        raise NotImplementedError

    @classmethod
    def _apply_settings(cls, target: Any) -> None:
        for key, value in cls.family.settings.items():
            if hasattr(target, key):
                setattr(target, key, value)

    def _lora_roles(self, place: str) -> Mapping[str, tuple[str, ...]]:
        """Return the linear layers of a place."""
        check_choice("lora_place", place, self.family.lora_places)
        return self.family.lora_places[place]

    def _for_backbone(self, x: Tensor) -> Tensor:
        """Bring an input to the precision of the frozen weights."""
        return x.to(next(self.backbone.parameters(), x).dtype)

    def train(self: Encoder, mode: bool = True) -> Encoder:
        """Switch training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint needs, under names of our own."""
        state = self.state_dict(keep_vars=True)
        tensors = {name: t for name, t in state.items() if not name.startswith("backbone.")}
        tensors.update({own: state[f"backbone.{name}"] for own, name in self._lora_names.items()})
        if self.source is None or not self.freeze_backbone:
            # Without the traces that LoRA leaves in the names.
            tensors.update(
                {
                    name.replace(".base_layer.", "."): tensor
                    for name, tensor in state.items()
                    if name.startswith("backbone.") and ".lora_" not in name
                }
            )
        return tensors

    def extra_repr(self) -> str:
        """Say what is trained and from where the weights come."""
        source = self.source.name if self.source else "random weights"
        return f"{source}, freeze_backbone={self.freeze_backbone}, d_out={self.d_out}"


def encoder_factory(
    encoder: type[Encoder], name: Any = inspect.Parameter.empty, **usual: Any
) -> Callable[..., Encoder]:
    """Make what a registry calls: options are JSON values, given one by one.

    It takes the fields of `AdapterOptions` that mean something to the encoder, the keyword
    arguments of its `from_pretrained` and of its constructor, and, where there are published
    sizes, `pretrained=False` for random weights. `usual` are defaults of adapter fields.
    """
    adapters = replace(encoder.family.usual, **usual)
    parameters = [inspect.Parameter("name", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=name)]

    def add(name: str, default: Any) -> None:
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))

    if encoder.family.architectures:
        add("pretrained", True)
    for option in encoder.family.options:
        add(option, getattr(adapters, option))
    for function in (encoder.from_pretrained, encoder.__init__):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "source":
                add(parameter.name, parameter.default)
    signature = inspect.Signature(parameters)

    def build(*args: Any, **options: Any) -> Encoder:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        chosen = dict(bound.arguments)
        name = chosen.pop("name")
        own = replace(adapters, **{option: chosen.pop(option) for option in encoder.family.options})
        if chosen.pop("pretrained", True):
            return encoder.from_pretrained(name, own, **chosen)
        check_choice("name", name, encoder.family.architectures)
        for option in ("model_class", "revision"):
            del chosen[option]
        return encoder.from_config(encoder.family.architectures[name], own, **chosen)

    # Registries read it to refuse an unknown option before the call.
    build.__signature__ = signature  # type: ignore[attr-defined]
    return build
