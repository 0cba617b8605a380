"""Adapter of flash-attn, which runs on CUDA in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mmau._optional import require

__all__ = ["check_flash", "flash_context", "load_flash_attention"]

DEVICE = "cuda"
"""Where flash-attn runs; tests with a stand-in change it."""
LARGEST_HEAD = 256
_LOADED: dict[str, Callable[..., Tensor]] = {}


def load_flash_attention() -> Callable[..., Tensor]:
    """Return the kernel, or say how to install it.

    A module calls this once when it is built: the compiler cannot trace an import.
    """
    if "flash_attn" not in _LOADED:
        library = require("flash_attn", purpose="attention with 'flash'", extra="gpu")
        _LOADED["flash_attn"] = cast("Callable[..., Tensor]", library.flash_attn_func)
    return _LOADED["flash_attn"]


def check_flash(queries: Tensor, mask: Tensor | None) -> None:
    """Refuse what the kernel cannot do; `queries` are `(b, m, h, i)` in the dtype that it gets."""
    if queries.device.type != DEVICE:
        raise ValueError(
            f"`implementation='flash'` needs tensors on a CUDA device; got {queries.device}. "
            "'folded' and 'sdpa' run anywhere."
        )
    if queries.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "`implementation='flash'` needs float16 or bfloat16, by autocast or by `.to`; got "
            f"{queries.dtype}."
        )
    if queries.shape[-1] > LARGEST_HEAD:
        raise ValueError(
            f"`implementation='flash'` needs heads of at most {LARGEST_HEAD} channels; got "
            f"{queries.shape[-1]}."
        )
    if mask is not None:
        raise ValueError("`implementation='flash'` takes no `mask`; use 'folded' or 'sdpa'.")


def flash_context(queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend: queries `(b, m, h, i)` are scaled, keys and values are `(b, p, h, i)`."""
    return load_flash_attention()(queries, key, value, softmax_scale=1.0, causal=False)
