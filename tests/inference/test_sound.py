"""Sound in segments is sound in one piece, and only what is near the frames is kept."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmau.inference.stream import SoundStream
from mmau.media.audio import AudioSegment, cut_sound

NOISE = np.random.default_rng(0).normal(0, 0.1, 16000 * 60).astype(np.float32)


@given(
    seconds=st.floats(0.01, 50),
    pieces=st.lists(st.integers(1, 200_000), min_size=1, max_size=5),
)
def test_owned_parts_tile_the_sound(seconds, pieces):
    sound = NOISE[: round(seconds * 16000)]
    cuts = np.minimum(np.cumsum(pieces), len(sound))
    segments = list(cut_sound(np.split(sound, cuts), 1.5))
    joined = np.concatenate([segment.waveform[segment.owned_samples] for segment in segments])
    np.testing.assert_array_equal(joined, sound)
    assert segments[0].owned[0] == 1.5
    for before, after in itertools.pairwise(segments):
        assert before.owned[1] == after.owned[0]
    for segment in segments:
        assert len(segment.waveform) <= 20 * 16000
        assert round((segment.start_time - 1.5) * 16000) % 320 == 0  # on the grid of the features


def test_inner_segments_have_their_margin():
    for segment in list(cut_sound([NOISE]))[1:-1]:
        assert segment.owned[0] - segment.start_time >= 2
        end = segment.start_time + len(segment.waveform) / 16000
        assert end - segment.owned[1] >= 2


@pytest.mark.parametrize("fusion", ["interpolate", "cross_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_give_the_features_of_one_pass(small_detector, fusion, causal):
    detector = small_detector(fusion=fusion, audio_options={"causal": causal})
    times = np.sort(np.random.default_rng(1).uniform(0, 61, 900))
    visual = torch.randn(900, 32)
    with torch.no_grad():
        whole = detector.encode_audio(torch.from_numpy(NOISE)[None])
        expected, heard = detector.align_audio(
            visual[None], whole.features, whole.times, torch.from_numpy(times)[None], whole.mask
        )
    # Another clock: the sound starts at 100 s.
    stream = SoundStream(detector, cut_sound([NOISE], 100.0))
    aligned, masks = [], []
    for start in range(0, 900, 37):
        rows = slice(start, start + 37)
        audio, mask = stream.align(visual[rows], 100 + times[rows])
        aligned.append(audio)
        masks.append(mask)
        assert len(stream._times) < 50 * 45  # two segments, whatever the length
    torch.testing.assert_close(torch.cat(masks), heard[0])
    torch.testing.assert_close(torch.cat(aligned), expected[0], rtol=1e-4, atol=1e-5)


def test_faces_that_ask_for_the_same_frames_get_the_same_sound(small_detector):
    stream = SoundStream(small_detector(), cut_sound([NOISE]))
    for start in range(0, 60, 2):
        times = np.linspace(start, start + 2, 20)
        first, again = (stream.align(torch.zeros(20, 32), times)[0] for _ in range(2))
        torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_segments_are_taken_only_when_they_are_needed(small_detector):
    taken = []

    def segments():
        for segment in cut_sound([NOISE]):
            taken.append(segment.owned)
            yield segment

    stream = SoundStream(small_detector(), segments())
    stream.align(torch.zeros(1, 32), np.array([1.0]))
    assert len(taken) == 2  # the one that is heard, and whether it is the last
    stream.align(torch.zeros(1, 32), np.array([40.0]))
    assert len(taken) == 4


def test_before_and_after_the_sound_there_is_none(small_detector):
    stream = SoundStream(small_detector(), cut_sound([NOISE[:8000]], 0.4))
    audio, mask = stream.align(torch.zeros(4, 32), np.array([0.0, 0.3, 0.5, 2.0]))
    assert mask.tolist() == [False, False, True, False]
    assert audio[~mask].abs().max() == 0
    assert not stream.is_empty


def test_no_sound_at_all(small_detector):
    stream = SoundStream(small_detector(), [])
    assert stream.is_empty
    audio, mask = stream.align(torch.zeros(2, 32), np.array([0.0, 0.1]))
    assert audio.shape == (2, 16)
    assert not mask.any()
    # Shorter than one window: there is sound, but no feature.
    short = AudioSegment(NOISE[:10], 16000, 0.0, (0.0, 10 / 16000))
    _, mask = SoundStream(small_detector(), [short]).align(torch.zeros(1, 32), np.array([0.0]))
    assert not mask.any()


def test_a_segment_needs_a_middle():
    with pytest.raises(ValueError, match=r"more than twice `margin_seconds`; got 4.0 and 2.0"):
        next(cut_sound([NOISE], segment_seconds=4.0, margin_seconds=2.0))
