"""Pieces of any length give what one pass gives, in memory that does not grow."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmau.inference import LogitStream
from mmau.models import Component, DetectorConfig, build_detector


def detector_of(name, *, sound=True, **options):
    torch.manual_seed(0)
    config = DetectorConfig(
        visual=Component("tiny"),
        audio=Component("log_mel", {"num_mels": 24}) if sound else None,
        d_region=16,
        num_heads=4,
        d_model=16,
        d_audio=8,
        temporal=Component(name, options),
        crop_size=64,
    )
    return build_detector(config).eval()


CAUSAL = {
    "agssm": {"num_layers": 2, "d_inner": 16, "d_state": 4},
    "tcn": {"num_layers": 4, "d_hidden": 8},
    "transformer": {"num_layers": 2, "window": 12},
}


def features(t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(t, 16, generator=generator)
    audio = torch.randn(t, 8, generator=generator)
    mask = torch.rand(t, generator=generator) < 0.8
    return visual, audio, mask


def one_pass(detector, visual, audio, mask):
    with torch.no_grad():
        return detector.classify(visual[None], audio[None], audio_mask=mask[None])[0][0]


def in_pieces(detector, parts, sizes, **options):
    stream = LogitStream(detector, **options)
    ready, start = [], 0
    while start < len(parts[0]):
        size = sizes[len(ready) % len(sizes)]
        ready.append(stream.push(*(part[start : start + size] for part in parts)))
        start += size
    return [*ready, stream.finish()]


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4))
def test_a_causal_model_gives_what_one_pass_gives(name, sizes):
    detector, parts = detector_of(name, **CAUSAL[name]), features(150)
    pieces = in_pieces(detector, parts, sizes)
    assert [len(piece) for piece in pieces[:-2]] == [
        sizes[i % len(sizes)] for i in range(len(pieces) - 2)
    ]  # every frame comes out at once
    torch.testing.assert_close(torch.cat(pieces), one_pass(detector, *parts), rtol=1e-5, atol=1e-5)


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_fifty_thousand_frames_in_flat_memory():
    """Nothing is kept: the features come from a generator, the logits are compared and dropped."""
    detector = detector_of("agssm", num_layers=1, d_inner=8, d_state=4)
    visual, audio, mask = features(500)
    repeats = 100
    with torch.no_grad():
        whole = detector.classify(
            visual.repeat(repeats, 1)[None],
            audio.repeat(repeats, 1)[None],
            audio_mask=mask.repeat(repeats)[None],
        )[0][0]
    stream, sizes = LogitStream(detector), []
    for number in range(repeats):
        logits = stream.push(visual, audio, mask)
        torch.testing.assert_close(
            logits, whole[500 * number : 500 * (number + 1)], rtol=1e-5, atol=1e-5
        )
        sizes.append(resident_megabytes())
    assert len(stream.finish()) == 0
    assert max(sizes[20:]) - sizes[19] < 8, "memory grows with the length of the stream"


def test_windows_with_enough_margin_are_exact():
    """Two layers that look 8 frames either way reach 16: a margin of 16 hides nothing."""
    detector = detector_of("transformer", num_layers=2, causal=False, window=9)
    parts = features(200)
    pieces = in_pieces(detector, parts, [7, 50], window_frames=60, margin_frames=16)
    torch.testing.assert_close(torch.cat(pieces), one_pass(detector, *parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 39, 40, 41, 80, 200])
def test_every_frame_is_owned_once_by_a_window_that_sees_around_it(t):
    detector, parts = detector_of("agssm", bidirectional=True, d_inner=16), features(t)
    logits = torch.cat(in_pieces(detector, parts, [13], window_frames=40, margin_frames=10))
    assert len(logits) == t
    last = max(0, -(-(t - 40) // 20))  # windows start every 20 frames; this one reaches the end
    for number in range(last + 1):
        start = 20 * number
        window = slice(start, t if number == last else start + 40)
        owned = slice(start + 10 if number else 0, t if number == last else start + 30)
        expected = one_pass(detector, *(part[window] for part in parts))
        torch.testing.assert_close(
            logits[owned],
            expected[owned.start - start : owned.stop - start],
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_short_video_is_read_in_one_pass():
    detector, parts = detector_of("agssm", bidirectional=True, d_inner=16), features(64)
    pieces = in_pieces(detector, parts, [10], window_frames=64, margin_frames=16)
    torch.testing.assert_close(torch.cat(pieces), one_pass(detector, *parts), rtol=1e-5, atol=1e-5)


def test_pieces_with_and_without_sound_share_a_window():
    detector = detector_of("agssm", bidirectional=True, d_inner=16)
    visual, audio, _ = features(20)
    stream = LogitStream(detector)
    stream.push(visual[:8], audio[:8])
    stream.push(visual[8:])
    heard = torch.arange(20) < 8
    torch.testing.assert_close(stream.finish(), one_pass(detector, visual, audio, heard))


def test_no_frames_no_logits():
    for detector in (detector_of("tcn"), detector_of("agssm", bidirectional=True)):
        stream = LogitStream(detector)
        assert stream.push(torch.zeros(0, 16)).shape == (0, 12)
        assert stream.finish().shape == (0, 12)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"more than twice `margin_frames`.* got 20 and 10"):
        LogitStream(detector_of("tcn"), window_frames=20, margin_frames=10)
    with pytest.raises(ValueError, match="axis `d`"):
        LogitStream(detector_of("tcn")).push(torch.zeros(3, 15))
    with pytest.raises(TypeError, match="`audio_mask` must be a bool"):
        LogitStream(detector_of("tcn")).push(*features(3)[:2], torch.ones(3))
    for options in ({"bidirectional": True}, {}):
        deaf = detector_of("agssm", sound=False, **options)
        with pytest.raises(ValueError, match="without an audio encoder"):
            LogitStream(deaf).push(torch.zeros(3, 16), torch.zeros(3, 8))
