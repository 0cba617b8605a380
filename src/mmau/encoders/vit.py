"""The former place of what `mmau.encoders.vision` holds."""

from mmau.encoders.vision import VIT_ARCHITECTURES, ViTEncoder, vit  # noqa: F401
