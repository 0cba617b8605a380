"""The former place of what `mmau.media.external` holds."""

from mmau.media.external import *  # noqa: F403
