"""Attention of few queries over many tokens that all of them share.

`_folded` is the fast one for few queries, `_projected` the usual one; `_api` chooses and checks.
"""

from __future__ import annotations

from mmau.functional.region_attention._api import RegionAttention, region_attention
from mmau.functional.region_attention._choice import (
    REGION_ATTENTION_IMPLEMENTATIONS,
    choose_region_attention,
    require_region_attention,
    resolve_region_attention,
)
from mmau.functional.region_attention._grid import attention_on_grid
from mmau.functional.region_attention._shared_tokens import pool_shared_tokens

__all__ = [
    "REGION_ATTENTION_IMPLEMENTATIONS",
    "RegionAttention",
    "attention_on_grid",
    "choose_region_attention",
    "pool_shared_tokens",
    "region_attention",
    "require_region_attention",
    "resolve_region_attention",
]
