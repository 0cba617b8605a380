import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmau.data.clips import (
    ClipAugmentation,
    ClipDataset,
    clip_windows,
)
from mmau.landmarks import LANDMARK_SCHEMES, LandmarkScheme
from mmau.modules import LandmarkToPatch

many_lengths = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), max_size=5)


@given(lengths=many_lengths, clip_frames=st.integers(1, 12), data=st.data())
def test_windows_hold_every_frame_and_never_cross_a_trial(lengths, clip_frames, data):
    stride = data.draw(st.integers(1, clip_frames))
    windows = clip_windows(lengths, clip_frames, stride=stride)
    for name, length in lengths.items():
        own = [w for w in windows if w.trial == name]
        seen = [f for w in own for f in range(w.start, w.start + w.length)]
        assert set(seen) == set(range(length))
        assert all(1 <= w.length <= clip_frames for w in own)
        assert sum(w.length < clip_frames for w in own) <= 1
        if stride == clip_frames:
            assert seen == list(range(length))
        ends = [w.start + w.length for w in own]
        assert ends == sorted(set(ends))  # no window that only repeats frames


def make_trials(lengths):
    rng = np.random.default_rng(0)
    return {
        name: {
            "visual": rng.normal(size=(length, 2)).astype(np.float32),
            "labels": rng.integers(-1, 2, (length, 3)).astype(np.int8),
            "crops": torch.full((length, 2, 2, 3), 9, dtype=torch.uint8),
            "valid": np.ones(length, dtype=bool),
            "code": torch.arange(length) + 1000 * i,
        }
        for i, (name, length) in enumerate(lengths.items())
    }


def test_a_clip_carries_its_frames_and_says_what_is_padding():
    trials = make_trials({"a": 4, "b": 7})
    data = ClipDataset(trials, 4)
    assert len(data) == 3
    last = data[2]
    assert last["trial"] == "b"
    assert last["frame_ids"].tolist() == [4, 5, 6, -1]
    assert last["mask"].tolist() == [True, True, True, False]
    assert last["code"].tolist() == [1004, 1005, 1006, -1]
    assert last["labels"][:3].tolist() == trials["b"]["labels"][4:7].tolist()
    assert last["labels"][3].tolist() == [-1, -1, -1]  # unknown, not inactive
    assert last["labels"].dtype == torch.int8
    assert last["visual"][3].tolist() == [0, 0]
    assert last["crops"][3].sum() == 0
    assert last["valid"].tolist() == [True, True, True, False]


def test_padding_does_not_write_into_the_trial():
    trials = {"a": {"x": torch.arange(3.0)}}
    ClipDataset(trials, 3)[0]["x"].zero_()
    assert trials["a"]["x"].tolist() == [0, 1, 2]


@given(
    lengths=many_lengths.filter(lambda lengths: any(lengths.values())),
    clip_frames=st.integers(1, 9),
    data=st.data(),
)
def test_batches_of_clips_hold_every_row_at_its_frame(lengths, clip_frames, data):
    """In any order, in any batch size, with any overlap."""
    stride = data.draw(st.integers(1, clip_frames))
    trials = make_trials(lengths)
    clips = ClipDataset(trials, clip_frames, stride=stride)
    found = {name: set() for name in lengths}
    for batch in DataLoader(clips, batch_size=3, shuffle=True):
        names = ("trial", "frame_ids", "mask", "visual")
        for trial, ids, mask, rows in zip(*(batch[name] for name in names), strict=True):
            assert (ids[~mask] == -1).all()
            assert not rows[~mask].any()
            np.testing.assert_array_equal(rows[mask], trials[trial]["visual"][ids[mask].numpy()])
            found[trial].update(ids[mask].tolist())
    assert found == {name: set(range(length)) for name, length in lengths.items()}


# ------------------------------------------------------------------------------------ augmentation
def test_draws_depend_on_seed_epoch_and_index_alone():
    augment = ClipAugmentation(seed=3, flip=0.5, drop_audio=0.3, drop_visual=0.2)
    draws = [augment.draw(epoch, index) for epoch in range(20) for index in range(100)]
    torch.manual_seed(1)
    again = ClipAugmentation(seed=3, flip=0.5, drop_audio=0.3, drop_visual=0.2)
    assert [again.draw(e, i) for e in reversed(range(20)) for i in range(100)] == [
        draw for e in reversed(range(20)) for draw in draws[e * 100 : e * 100 + 100]
    ]
    other = ClipAugmentation(seed=4, flip=0.5, drop_audio=0.3, drop_visual=0.2)
    assert [other.draw(0, i) for i in range(100)] != draws[:100]
    assert draws[:100] != draws[100:200]
    shares = np.array([[d.flip, not d.keep_visual, not d.keep_audio] for d in draws]).mean(0)
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.04)
    assert all(draw.keep_visual or draw.keep_audio for draw in draws)
    # Which modality goes does not depend on whether the clip is mirrored.
    flipped = np.array([not d.keep_audio for d in draws if d.flip]).mean()
    assert abs(flipped - 0.3) < 0.05


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flip": 0.0}, (False, True, True)),
        ({"flip": 1.0}, (True, True, True)),
        ({"flip": 0.0, "drop_audio": 1.0}, (False, True, False)),
        ({"flip": 0.0, "drop_visual": 1.0}, (False, False, True)),
    ],
)
def test_what_is_certain_always_happens(options, expected):
    augment = ClipAugmentation(**options)
    assert {tuple(augment.draw(e, i)) for e in range(5) for i in range(20)} == {expected}


def make_clip(t=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return {
        "crops": torch.randint(0, 256, (t, size, size, 3), dtype=torch.uint8, generator=generator),
        "landmarks": torch.rand(t, 68, 2, generator=generator) * size,
        "tokens": torch.rand(t, 13, 4, generator=generator),
        "valid": torch.tensor([True, False, True]),
        "audio_mask": torch.tensor([True, True, False]),
        "labels": torch.randint(0, 2, (t, 12), dtype=torch.int8, generator=generator),
        "trial": "a",
    }


def test_a_mirrored_clip_is_the_clip_of_the_mirrored_face():
    """Pixels under a landmark stay under it; regions change sides; twice is nothing."""
    clip = make_clip()
    clip["landmarks"][1] = torch.nan
    mirrored = ClipAugmentation(flip=1.0)(clip, epoch=0, index=0)
    scheme = LANDMARK_SCHEMES.get("ibug68")
    for frame in (0, 2):
        for point in range(68):
            x, y = clip["landmarks"][frame, point].tolist()
            there = mirrored["landmarks"][frame, scheme.mirror[point]].tolist()
            assert there == pytest.approx([32 - x, y], abs=1e-5)
            pixel = clip["crops"][frame, int(y), int(x)]
            # Pixel column i covers [i, i + 1): its mirror image is column 31 - i.
            assert torch.equal(mirrored["crops"][frame, int(y), 31 - int(x)], pixel)
    assert mirrored["landmarks"][1].isnan().all()
    for name, image in scheme.region_mirror.items():
        one, other = scheme.region_names.index(name), scheme.region_names.index(image)
        assert torch.equal(mirrored["tokens"][:, other], clip["tokens"][:, one])
    assert torch.equal(mirrored["labels"], clip["labels"])
    assert torch.equal(mirrored["valid"], clip["valid"])
    assert mirrored["flipped"].item() is True
    twice = ClipAugmentation(flip=1.0)(mirrored, epoch=0, index=0)
    for name in ("crops", "tokens", "labels"):
        assert torch.equal(twice[name], clip[name])
    torch.testing.assert_close(twice["landmarks"], clip["landmarks"], equal_nan=True)


def test_the_mapper_sees_mirrored_regions():
    """The patches of the right brow of the mirror image mirror those of the left brow."""
    clip = make_clip(size=64)
    mirrored = ClipAugmentation(flip=1.0)(clip, epoch=0, index=0)
    mapper = LandmarkToPatch()
    plain = mapper(clip["landmarks"], (8, 8), (64, 64)).weights.unflatten(-1, (8, 8))
    swapped = mapper(mirrored["landmarks"], (8, 8), (64, 64)).weights.unflatten(-1, (8, 8))
    order = list(mapper.scheme.region_permutation)
    torch.testing.assert_close(swapped, plain[:, order].flip(-1))


def test_a_dropped_modality_is_masked_and_nothing_is_filled_in():
    clip = make_clip()
    without_audio = ClipAugmentation(flip=0, drop_audio=1.0)(clip, epoch=0, index=0)
    assert without_audio["audio_mask"].tolist() == [False] * 3
    assert without_audio["valid"].tolist() == [True, False, True]
    assert (without_audio["keep_audio"].item(), without_audio["keep_visual"].item()) == (
        False,
        True,
    )
    without_visual = ClipAugmentation(flip=0, drop_visual=1.0)(clip, epoch=0, index=0)
    assert without_visual["valid"].tolist() == [False] * 3
    assert without_visual["audio_mask"].tolist() == [True, True, False]
    for changed in (without_audio, without_visual):
        for name in ("crops", "landmarks", "tokens", "labels"):
            assert changed[name] is clip[name]
    assert clip["valid"].tolist() == [True, False, True]  # the clip itself is as it was
    assert "flipped" not in clip


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_draws_anew_also_in_workers_that_stay(num_workers):
    trials = make_trials({"a": 9, "b": 7})
    augment = ClipAugmentation(seed=1, drop_audio=0.4, arrays={})
    data = ClipDataset(trials, 2, augment=augment)
    loader = DataLoader(
        data, batch_size=1, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    for epoch in (0, 1, 7):
        data.set_epoch(epoch)
        assert data.epoch == epoch
        flips = [(b["flipped"].item(), b["keep_audio"].item()) for b in loader]
        drawn = [augment.draw(epoch, index) for index in range(len(data))]
        assert flips == [(draw.flip, draw.keep_audio) for draw in drawn]
    assert data[-1]["flipped"] == data[len(data) - 1]["flipped"]
    with pytest.raises(ValueError, match=r"`epoch` must be in \[0, inf\); got -1"):
        data.set_epoch(-1)


def test_padding_stays_padding_when_mirrored():
    trials = {"a": {"landmarks": torch.ones(1, 68, 2), "valid": torch.ones(1, dtype=torch.bool)}}
    data = ClipDataset(trials, 2, augment=ClipAugmentation(flip=1.0, width=8))
    assert data[0]["landmarks"][:, 0].tolist() == [[7, 1], [0, 0]]
    assert data[0]["mask"].tolist() == [True, False]
    assert data[0]["valid"].tolist() == [True, False]


def mirror(clip, **options):
    return ClipAugmentation(flip=1.0, **options)(clip, epoch=0, index=0)


def test_with_lengths_no_trial_is_read_before_its_clips():
    class Lazy(dict):
        reads = 0

        def __getitem__(self, name):
            Lazy.reads += 1
            return super().__getitem__(name)

    lengths = {"a": 4, "b": 7}
    data = ClipDataset(Lazy(make_trials(lengths)), 4, lengths=lengths)
    assert Lazy.reads == 0
    assert len(data[0]["mask"]) == 4
    assert Lazy.reads == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_windows({"a": 3}, 0), r"`clip_frames` must be in \[1, inf\); got 0"),
        (lambda: clip_windows({"a": 3}, 4, stride=5), "`stride` must be 1 to `clip_frames`, 4"),
        (lambda: clip_windows({"a": 3}, 4, stride=0), "`stride` must be 1 to"),
        (lambda: clip_windows({"a": -1}, 4), r"`lengths\['a'\]` must be in \[0, inf\)"),
        (
            lambda: ClipDataset({"a": {"x": torch.ones(3), "y": torch.ones(2)}}, 2),
            "arrays of trial 'a' must have one row per frame; got x 3, y 2",
        ),
        (lambda: ClipDataset({"a": {}}, 2), "must have one row per frame; got none"),
        (
            lambda: ClipDataset({"a": {"x": torch.ones(3)}}, 2, lengths={"a": 4})[0],
            "trial 'a' has 3 frames, but `lengths` says 4",
        ),
        (lambda: ClipDataset({"a": {"mask": torch.ones(3)}}, 2)[0], "may not be called 'mask'"),
        (lambda: ClipAugmentation(flip=1.1), "`flip` must be in"),
        (lambda: ClipAugmentation(seed=-1), "`seed` must be in"),
        (
            lambda: ClipAugmentation(arrays={"sound": "waveform"}),
            r"`arrays\['sound'\]` must be one of 'images', 'landmarks', .*; got 'waveform'",
        ),
        (
            lambda: ClipAugmentation(drop_audio=0.6, drop_visual=0.6),
            "`drop_visual` and `drop_audio` must add up to 1 at most",
        ),
        (
            lambda: ClipAugmentation(scheme=LandmarkScheme("one", 1, {"nose": (0,)})),
            "the scheme 'one' has no `mirror` table, so clips cannot be mirrored; use `flip=0`",
        ),
        (
            lambda: mirror({"landmarks": torch.zeros(2, 68, 2)}),
            "`width` must be given to mirror 'landmarks': the clip holds none of the images crops",
        ),
        (lambda: mirror({"tokens": torch.zeros(2, 5, 4)}), "'tokens' must have the 13 regions of"),
        (lambda: mirror({"tokens": torch.zeros(13)}), r"'tokens' must have shape \(t, m, ...\)"),
        (lambda: mirror({"crops": torch.zeros(2, 5)}), r"'crops' must have shape \(t, h, w, ...\)"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
