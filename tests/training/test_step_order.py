"""The order of the data: a function of seed and step, whoever takes which share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmau.training import ItemKey, StepOrder

SIZES = st.integers(1, 40)


@given(num_items=SIZES, batch_size=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_epoch_takes_every_item_once_and_in_another_order(num_items, batch_size, seed):
    order = StepOrder(num_items, batch_size, seed)
    steps = range(order.steps_per_epoch)
    epochs = [[i for s in steps for i in order.batch(e * len(steps) + s)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_items))
    if num_items > 12:  # 1 in 10^9 that two shuffles agree
        assert len({tuple(epoch) for epoch in epochs}) == 3


@given(
    num_items=SIZES,
    batch_size=st.integers(1, 12),
    num_ranks=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    first=st.integers(0, 6),
)
def test_micro_batches_of_all_ranks_add_up_to_the_batch(
    num_items, batch_size, num_ranks, accumulate, first
):
    order = StepOrder(num_items, batch_size, 3)
    parts = [
        list(
            order.micro_batches(
                range(first, 8), rank=rank, num_ranks=num_ranks, accumulate=accumulate
            )
        )
        for rank in range(num_ranks)
    ]
    assert {len(p) for p in parts} == {(8 - first) * accumulate}
    for place, step in enumerate(range(first, 8)):
        taken = [
            key
            for rank in range(num_ranks)
            for part in parts[rank][place * accumulate : (place + 1) * accumulate]
            for key in part
        ]
        assert all(parts[rank][place * accumulate] for rank in range(num_ranks))
        assert sorted(k.item for k in taken if k.counts) == sorted(order.batch(step))
        assert {k.epoch for k in taken} == {step // order.steps_per_epoch}
        assert all(k.item in order.batch(step) for k in taken)


def test_a_resumed_loader_with_workers_starts_where_the_other_stopped():
    class Items(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return torch.tensor([key.epoch, key.item])

    def loaded(first, workers):
        loader = torch.utils.data.DataLoader(
            Items(),
            batch_sampler=StepOrder(7, 3, 5).micro_batches(range(first, 6)),
            num_workers=workers,
            generator=torch.Generator(),
        )
        return [batch.tolist() for batch in loader]

    before = torch.get_rng_state()
    whole = loaded(0, 0)
    assert whole[4:] == loaded(4, 2)
    assert torch.equal(before, torch.get_rng_state())  # a loader draws nothing from the run


def test_errors():
    with pytest.raises(ValueError, match=r"`num_items` must be in \[1, inf\); got 0"):
        StepOrder(0, 4)
    with pytest.raises(ValueError, match="`batch_size`"):
        StepOrder(4, 0)
    with pytest.raises(ValueError, match="`rank`"):
        StepOrder(4, 2).micro_batches(range(1), rank=2, num_ranks=2)
    with pytest.raises(ValueError, match="`num_ranks`"):
        StepOrder(4, 2).micro_batches(range(1), num_ranks=0)
    with pytest.raises(ValueError, match="`accumulate`"):
        StepOrder(4, 2).micro_batches(range(1), accumulate=0)
    assert ItemKey(0, 1).counts
