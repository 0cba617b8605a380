import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmau.data.clips import (
    ClipAugmentation,
    ClipDataset,
    ClipSampler,
    ClipStitcher,
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
    overlap=st.sampled_from(["mean", "owns"]),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_cut_and_stitched_is_the_same(lengths, clip_frames, overlap, seed, data):
    """In any order, in any batch size, with any overlap."""
    stride = data.draw(st.integers(1, clip_frames))
    trials = make_trials(lengths)
    clips = ClipDataset(trials, clip_frames, stride=stride)
    loader = DataLoader(clips, batch_size=3, sampler=ClipSampler(len(clips), seed=seed))
    stitcher = ClipStitcher(lengths, overlap=overlap)
    for batch in loader:
        # What a window says in its padding must not matter.
        outputs = torch.where(batch["mask"][..., None], batch["visual"].double(), 99.0)
        stitcher.add(batch["trial"], batch["frame_ids"], outputs)
    stitched = stitcher.result()
    assert list(stitched) == [name for name, length in lengths.items() if length]
    for name, values in stitched.items():
        expected = torch.from_numpy(trials[name]["visual"]).double()
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [("mean", [1, 1, 1.5, 1.5, 2, 2]), ("owns", [1, 1, 1, 2, 2, 2])],
)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_where_windows_overlap(overlap, expected, order):
    stitcher = ClipStitcher({"a": 6}, overlap=overlap)
    ids = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    outputs = torch.tensor([[1.0] * 4, [2.0] * 4])
    for i in order:
        stitcher.add(["a"], ids[[i]], outputs[[i]])
    assert stitcher.result()["a"].tolist() == expected


@given(num=st.integers(0, 50), seed=st.integers(0, 100), epoch=st.integers(0, 100))
def test_order_depends_on_seed_and_epoch_alone(num, seed, epoch):
    first = ClipSampler(num, seed=seed)
    for passed in range(3):  # a run that started from the beginning
        first.set_epoch(passed)
        list(first)
    first.set_epoch(epoch)
    torch.manual_seed(epoch)
    resumed = ClipSampler(num, seed=seed)
    resumed.set_epoch(epoch)
    assert list(first) == list(resumed)
    assert sorted(resumed) == list(range(num))
    assert len(resumed) == num


def test_other_epochs_and_seeds_give_other_orders():
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = ClipSampler(20, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9
    assert list(ClipSampler(4, shuffle=False)) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------- ranks and resuming
def sampler_of(rank, world_size, num=20, **options):
    return ClipSampler(num, seed=5, rank=rank, world_size=world_size, **options)


@given(
    num=st.integers(0, 40),
    world_size=st.integers(1, 6),
    position=st.integers(0, 40),
    remainder=st.sampled_from(["keep", "drop", "repeat"]),
)
def test_ranks_share_what_is_left(num, world_size, position, remainder):
    position = min(position, num)
    whole = ClipSampler(num, seed=5)
    whole.set_epoch(3)
    order = list(whole)
    shares = []
    for rank in range(world_size):
        sampler = sampler_of(rank, world_size, num, remainder=remainder)
        sampler.set_epoch(3, position=position)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    # In turns, the ranks go through the order of one process.
    turns = [share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)]
    left = order[position:]
    if remainder == "keep":
        assert turns == left
    elif remainder == "drop":
        assert turns == left[: len(left) // world_size * world_size]
    else:
        assert turns[: len(left)] == left
        assert set(turns[len(left) :]) <= set(order)
    if remainder != "keep":
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("ranks", [(1, 1), (4, 4), (4, 2), (1, 3)])
@pytest.mark.parametrize("stop", [0, 8, 20])
def test_a_stopped_run_goes_on_with_the_same_clips(ranks, stop):
    """Also on another number of machines."""
    before, after = ranks
    whole = ClipSampler(20, seed=5)
    whole.set_epoch(2)
    order = list(whole)
    samplers = [sampler_of(rank, before) for rank in range(before)]
    for sampler in samplers:
        sampler.set_epoch(2)
    taken = [clip for rank in samplers for clip in list(rank)[: stop // before]]
    states = [sampler.state_dict(stop) for sampler in samplers]
    assert all(state == states[0] for state in states)
    assert states[0] == {"seed": 5, "num_clips": 20, "epoch": 2, "position": stop}
    torch.manual_seed(stop)
    for rank in range(after):
        resumed = sampler_of(rank, after)
        resumed.load_state_dict(states[0])
        taken += list(resumed)
    assert sorted(taken) == sorted(order)
    assert set(taken[:stop]) == set(order[:stop])
    resumed.set_epoch(3)
    assert resumed.position == 0


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
    deaf = ClipAugmentation(flip=0, drop_audio=1.0)(clip, epoch=0, index=0)
    assert deaf["audio_mask"].tolist() == [False] * 3
    assert deaf["valid"].tolist() == [True, False, True]
    assert (deaf["keep_audio"].item(), deaf["keep_visual"].item()) == (False, True)
    blind = ClipAugmentation(flip=0, drop_visual=1.0)(clip, epoch=0, index=0)
    assert blind["valid"].tolist() == [False] * 3
    assert blind["audio_mask"].tolist() == [True, True, False]
    for changed in (deaf, blind):
        for name in ("crops", "landmarks", "tokens", "labels"):
            assert changed[name] is clip[name]
    assert clip["valid"].tolist() == [True, False, True]  # the clip itself is as it was
    assert "flipped" not in clip


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_draws_anew_also_in_workers_that_stay(num_workers):
    trials = make_trials({"a": 9, "b": 7})
    augment = ClipAugmentation(seed=1, drop_audio=0.4, images=(), landmarks=(), regions=())
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
    with pytest.raises(ValueError, match="`epoch` must not be negative; got -1"):
        data.set_epoch(-1)


def test_padding_stays_padding_when_mirrored():
    trials = {"a": {"landmarks": torch.ones(1, 68, 2), "valid": torch.ones(1, dtype=torch.bool)}}
    data = ClipDataset(trials, 2, augment=ClipAugmentation(flip=1.0, width=8))
    assert data[0]["landmarks"][:, 0].tolist() == [[7, 1], [0, 0]]
    assert data[0]["mask"].tolist() == [True, False]
    assert data[0]["valid"].tolist() == [True, False]


def mirror(clip, **options):
    return ClipAugmentation(flip=1.0, **options)(clip, epoch=0, index=0)


def test_lengths_that_are_given_spare_reading_the_trials():
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


def stitched(lengths, trials, ids, values):
    stitcher = ClipStitcher(lengths)
    stitcher.add(trials, torch.tensor(ids), torch.tensor(values))
    return stitcher.result()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_windows({"a": 3}, 0), "`clip_frames` must be at least 1; got 0"),
        (lambda: clip_windows({"a": 3}, 4, stride=5), "`stride` must be 1 to `clip_frames`, 4"),
        (lambda: clip_windows({"a": 3}, 4, stride=0), "`stride` must be 1 to"),
        (lambda: clip_windows({"a": -1}, 4), "`lengths` of trial 'a' must not be negative"),
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
        (lambda: ClipSampler(-1), "must not be negative"),
        (lambda: ClipSampler(1).set_epoch(-1), "`epoch` must not be negative; got -1"),
        (lambda: ClipSampler(3).set_epoch(0, position=4), "`position` must be in"),
        (lambda: ClipSampler(3).state_dict(-1), "`position` must be in"),
        (lambda: ClipSampler(3, rank=2, world_size=2), "`rank` must be in"),
        (lambda: ClipSampler(3, world_size=0), "`world_size` must be in"),
        (lambda: ClipSampler(3, remainder="pad"), "`remainder` must be one of 'keep', 'drop'"),
        (
            lambda: ClipSampler(3, seed=1).load_state_dict(ClipSampler(3).state_dict(0)),
            "the run that is resumed had `seed` 0, this one has 1",
        ),
        (
            lambda: ClipSampler(3).load_state_dict(ClipSampler(4).state_dict(0)),
            "had `num_clips` 4, this one has 3: its order cannot be continued",
        ),
        (lambda: ClipAugmentation(flip=1.1), "`flip` must be in"),
        (lambda: ClipAugmentation(seed=-1), "`seed` must be in"),
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
        (lambda: ClipStitcher({}, overlap="sum"), "`overlap` must be one of 'mean', 'owns'"),
        (lambda: stitched({"a": 2}, ["a"], [[0]], [[1.0, 2.0]]), "must agree"),
        (lambda: stitched({"a": 2}, ["b"], [[0, 1]], [[1.0, 2.0]]), "`lengths` has no trial 'b'"),
        (lambda: stitched({"a": 2}, ["a"], [[0, 2]], [[1.0, 2.0]]), "has 2 frames; got frame 2"),
        (
            lambda: stitched({"a": 3}, ["a"], [[0, 2]], [[1.0, 2.0]]),
            "1 of 3 frames of trial 'a' were in no window, the first is frame 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
