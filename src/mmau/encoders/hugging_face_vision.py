"""The former place of what `mmau.encoders.vision` holds."""

from mmau.encoders.vision import HuggingFaceVisualEncoder, hf_vision  # noqa: F401
