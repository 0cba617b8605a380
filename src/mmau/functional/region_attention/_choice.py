"""Which implementation runs."""

from __future__ import annotations

from typing import Literal, cast

from mmau._checks import check_choice
from mmau.functional.region_attention._flash import load_flash_attention

__all__ = [
    "REGION_ATTENTION_IMPLEMENTATIONS",
    "Implementation",
    "choose_region_attention",
    "require_region_attention",
    "resolve_region_attention",
]

REGION_ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("auto", "folded", "sdpa", "flash")
"""What `implementation` accepts."""

Implementation = Literal["folded", "sdpa", "flash"]


def choose_region_attention(
    num_queries: int, num_tokens: int, d_model: int, d_visual: int, num_heads: int
) -> Literal["folded", "sdpa"]:
    r"""Return the implementation that needs fewer multiply-adds.

    $$ \text{folded} = 2 M D D_v + 2 M h N D_v, \qquad \text{sdpa} = 2 N D D_v + 2 M N D $$

    Args:
        num_queries: Number `M` of queries of one frame.
        num_tokens: Number `N` of tokens of one frame.
        d_model: Width `D` of the queries.
        d_visual: Width `D_v` of the tokens.
        num_heads: Number `h` of heads.

    Returns:
        `"folded"` or `"sdpa"`.

    Examples:
        >>> choose_region_attention(12, 256, 768, 768, 8)
        'folded'
        >>> choose_region_attention(77, 256, 768, 768, 8)
        'sdpa'
    """
    folded = num_queries * d_visual * (d_model + num_heads * num_tokens)
    projected = num_tokens * d_model * (d_visual + num_queries)
    return "folded" if folded <= projected else "sdpa"


def resolve_region_attention(
    implementation: str,
    *,
    num_queries: int,
    num_tokens: int,
    d_model: int,
    d_visual: int,
    num_heads: int,
) -> Implementation:
    """Turn `"auto"` into the implementation that runs at these sizes.

    Args:
        implementation: What was asked for; every name but `"auto"` stands for itself.
        num_queries: Number of queries of one frame.
        num_tokens: Number of tokens of one frame.
        d_model: Width of the queries.
        d_visual: Width of the tokens.
        num_heads: Number of heads.

    Returns:
        `"folded"`, `"sdpa"` or `"flash"`. `"auto"` never becomes `"flash"`: where the usual order
        is cheaper, `"sdpa"` picks a fused kernel of torch for the device that is used.

    Raises:
        ValueError: If the implementation is unknown.
    """
    check_choice("implementation", implementation, REGION_ATTENTION_IMPLEMENTATIONS)
    if implementation == "auto":
        return choose_region_attention(num_queries, num_tokens, d_model, d_visual, num_heads)
    return cast("Implementation", implementation)


def require_region_attention(implementation: str) -> None:
    """Load what an implementation needs, so that a module refuses it when it is built.

    Args:
        implementation: What was asked for.

    Raises:
        ValueError: If the implementation is unknown.
        MissingDependencyError: If it is `"flash"` and flash-attn is not installed.
    """
    check_choice("implementation", implementation, REGION_ATTENTION_IMPLEMENTATIONS)
    if implementation == "flash":
        load_flash_attention()
