"""What every encoder around a pretrained network shares: what is frozen, and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from mmau.encoders._weights import own_names
from mmau.encoders.adapters import freeze
from mmau.encoders.protocols import PretrainedSource

__all__ = ["AdaptedBackbone"]

_Encoder = TypeVar("_Encoder", bound="AdaptedBackbone")


class AdaptedBackbone(nn.Module):
    """A backbone that is frozen or not, with LoRA pairs in it or not.

    Args:
        backbone: Model of transformers; changed in place.
        freeze_backbone: Whether its weights are left as they are; needed with LoRA.
        lora_rank: Rank of the LoRA pairs that will be put in; `None` for none.
        source: Where the backbone's weights can be had again, if anywhere.
        without_effect: Endings of the names of parameters that cannot learn, and stay frozen.

    Raises:
        ValueError: If LoRA is asked for next to a trainable backbone.
    """

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
        """Switch training mode; a frozen backbone stays in evaluation mode.

        Args:
            mode: Whether to train.

        Returns:
            The encoder itself.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint needs, under names of our own.

        Returns:
            LoRA pairs and whatever else was added, and the backbone unless it is frozen and can be
            fetched again.
        """
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
        """Say where the weights come from and whether they are frozen.

        Returns:
            For `extra_repr`.
        """
        source = self.source.name if self.source else "random weights"
        return f"{source}, freeze_backbone={self.freeze_backbone}"
