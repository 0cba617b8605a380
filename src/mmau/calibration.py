"""The former place of what `mmau.evaluation` holds."""

from mmau.evaluation import *  # noqa: F403
