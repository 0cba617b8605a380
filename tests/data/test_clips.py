import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmau.data.clips import ClipDataset, ClipSampler, ClipStitcher, clip_windows

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
