"""The Action Units of Aff-Wild2, in the order of its annotation files."""

from __future__ import annotations

__all__ = ["AU_DESCRIPTIONS", "AU_NAMES"]

AU_DESCRIPTIONS: dict[str, str] = {
    "AU1": "Inner brow raiser",
    "AU2": "Outer brow raiser",
    "AU4": "Brow lowerer",
    "AU6": "Cheek raiser",
    "AU7": "Lid tightener",
    "AU10": "Upper lip raiser",
    "AU12": "Lip corner puller",
    "AU15": "Lip corner depressor",
    "AU23": "Lip tightener",
    "AU24": "Lip pressor",
    "AU25": "Lips part",
    "AU26": "Jaw drop",
}
"""Name to the FACS description."""

AU_NAMES: tuple[str, ...] = tuple(AU_DESCRIPTIONS)
"""The twelve names in label order; column `c` of every label, logit and probability tensor."""
