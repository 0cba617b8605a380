"""The former place of what `mmau.encoders.backbone` holds."""

from mmau.encoders.backbone import *  # noqa: F403
