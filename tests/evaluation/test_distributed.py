"""Two processes that count half each equal one process that counts everything."""

import json
import subprocess
import sys

import pytest
import torch

from mmau.evaluation import AUCounts, ScoreHistogram

PROCESS = """
import json, sys, torch
import torch.distributed as dist
from mmau.evaluation import AUCounts, ScoreHistogram

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(7)
prob = torch.rand(101, 3, generator=generator)
target = torch.randint(-1, 2, (101, 3), generator=generator)
mine = slice(0, 40) if rank == 0 else slice(40, None)
counts = AUCounts(3).update(prob[mine], target[mine])
local = counts.counts.clone()
first, second = counts.all_reduce(), counts.all_reduce()
histogram = ScoreHistogram(3, num_bins=8).update(prob[mine], target[mine]).all_reduce()
try:
    AUCounts(["AU1"] if rank == 0 else ["AU2"]).all_reduce()
    refused = ""
except ValueError as error:
    refused = str(error)
found = {
    "counts": first.counts.tolist(),
    "again": second.counts.tolist(),
    "kept": torch.equal(counts.counts, local),
    "histogram": histogram.counts.tolist(),
    "refused": refused,
}
with open(out, "w") as stream:
    json.dump(found, stream)
dist.destroy_process_group()
"""


def test_two_gloo_processes_equal_one_exactly(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store, outs = tmp_path / "store", [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(store), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    generator = torch.Generator().manual_seed(7)
    prob = torch.rand(101, 3, generator=generator)
    target = torch.randint(-1, 2, (101, 3), generator=generator)
    whole = AUCounts(3).update(prob, target)
    histogram = ScoreHistogram(3, num_bins=8).update(prob, target)
    for out in outs:
        found = json.loads(out.read_text())
        assert found["counts"] == whole.counts.tolist()
        assert found["again"] == whole.counts.tolist(), "reducing twice counted twice"
        assert found["kept"]
        assert found["histogram"] == histogram.counts.tolist()
        assert "must count the same Action Units; process 0 counts" in found["refused"]


def test_without_a_process_group_the_sum_is_its_own():
    counts = AUCounts(1).update(torch.ones(2, 1), torch.ones(2, 1))
    reduced = counts.all_reduce()
    assert torch.equal(reduced.counts, counts.counts)
    reduced.update(torch.ones(1, 1), torch.ones(1, 1))
    assert counts.counts[0, 0] == 2, "the copy shares its memory"
