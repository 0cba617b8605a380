"""The former place of what `mmau.media.mediapipe` holds."""

from mmau.media.mediapipe import *  # noqa: F403
