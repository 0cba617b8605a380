"""One seed and one hypothesis profile for every test."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "mmau",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mmau")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
