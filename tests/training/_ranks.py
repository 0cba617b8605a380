"""Run by `test_distributed` in fresh processes: what one rank does."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmau.modules import AsymmetricLoss
from mmau.training import StepOrder, gather_by_name, sum_over_ranks


def data(num_items=7, t=5, d=6, c=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_items, t, d, generator=generator)
    y = torch.randint(0, 2, (num_items, t, c), generator=generator)
    # Very unequal: the first items are nearly unlabelled, the last ones wholly labelled.
    known = (
        torch.rand(num_items, t, c, generator=generator)
        < torch.linspace(0, 1, num_items)[:, None, None]
    )
    return x, torch.where(known, y, -1)


def gradients(num_ranks, rank, accumulate):
    """Gradients of the step that holds a single item and of a full one, normalised as a whole."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    order, loss = StepOrder(len(x), 3), AsymmetricLoss()
    found = []
    for step in range(order.steps_per_epoch):
        labelled = (y[order.batch(step)] >= 0).sum()
        model.zero_grad()
        for keys in order.micro_batches(
            range(step, step + 1), rank=rank, num_ranks=num_ranks, accumulate=accumulate
        ):
            items = [key.item for key in keys]
            target = y[items] if keys[0].counts else torch.full_like(y[items], -1)
            value = loss(wrapped(x[items].double()), target, normalizer=labelled)
            (value * num_ranks).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return found


def main():
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["FOLDER"]), int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    report = {
        "sum": sum_over_ranks(torch.tensor([1.0 + rank])),
        "gathered": gather_by_name({f"video{rank}": rank}),
        "gradients": gradients(2, rank, 1),
    }
    try:
        gather_by_name({"same": rank})
    except ValueError as error:
        report["twice"] = str(error)
    torch.save(report, folder / f"report-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
