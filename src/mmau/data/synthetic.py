"""The former place of `mmau.synthetic`."""

from mmau.synthetic import *  # noqa: F403
