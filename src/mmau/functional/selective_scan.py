"""The former place of `mmau.scan`."""

from mmau.scan import *  # noqa: F403
