"""Small detectors with random weights, and a short film with sound."""

import numpy as np
import pytest
import torch

from mmau.models import Component, DetectorConfig, build_detector
from mmau.synthetic import SyntheticConfig, render_clip, write_movie


def build_small_detector(*, sound=True, audio_options=None, fusion="interpolate", **temporal):
    """A detector of 64-pixel crops whose outputs depend on everything it is given."""
    torch.manual_seed(1)
    name = temporal.pop("name", "agssm")
    config = DetectorConfig(
        visual=Component("tiny"),
        audio=Component("log_mel", {"num_mels": 24, **(audio_options or {})}) if sound else None,
        d_region=32,
        num_heads=4,
        d_model=32,
        d_audio=16,
        fusion=fusion,
        fusion_window=0.5,
        temporal=Component(name, temporal),
        crop_size=64,
    )
    detector = build_detector(config).eval()
    with torch.no_grad():  # a fresh head says nearly the same of every frame
        detector.head.weight.mul_(5)
    return detector


@pytest.fixture(scope="session")
def small_detector():
    return build_small_detector


@pytest.fixture(scope="session")
def clip():
    """Forty frames at 15 per second; the face leaves for frames 12 to 19."""
    made = render_clip(987654, SyntheticConfig(num_frames=40, hidden=(0.0, 0.0)))
    frames = made.frames.copy()
    frames[12:20] = 110
    return frames, made.waveform, made.sample_rate


@pytest.fixture(scope="session")
def film(clip, tmp_path_factory):
    frames, waveform, rate = clip
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    return write_movie(path, frames, fps=15.0, waveform=waveform, sample_rate=rate)


@pytest.fixture(scope="session")
def silent_film(clip, tmp_path_factory):
    return write_movie(tmp_path_factory.mktemp("films") / "silent.mp4", clip[0], fps=15.0)


@pytest.fixture(scope="session")
def film_of_two(clip, tmp_path_factory):
    """Two faces side by side; the right one comes in at frame 20."""
    frames = clip[0]
    right = frames[:, :, ::-1].copy()
    right[:20] = 110
    right[20:] = frames[:1, :, ::-1]
    left = np.repeat(frames[:1], len(frames), axis=0)
    path = tmp_path_factory.mktemp("films") / "two.mp4"
    return write_movie(path, np.concatenate([left, right], axis=2), fps=15.0)
