"""Two processes learn what one would, and share work without talking."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmau.training import share_longest_first

SCRIPT = Path(__file__).with_name("_ranks.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of two processes found out."""
    folder = tmp_path_factory.mktemp("ranks")
    common = {**os.environ, "FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT)], env={**common, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return [torch.load(folder / f"report-{rank}.pt") for rank in range(2)]


def test_two_ranks_have_the_gradients_of_one(reports):
    """With unequal numbers of labels, and a last step of which one rank has no share."""
    expected = runpy.run_path(str(SCRIPT))["gradients"](1, 0, 1)
    assert len(expected) == 3
    for rank in range(2):
        for found, wanted in zip(reports[rank]["gradients"], expected, strict=True):
            for name, gradient in wanted.items():
                # Relative to the size of the whole tensor; fp64, so 1e-6 leaves nothing to chance.
                error = (found[name] - gradient).norm() / gradient.norm()
                assert error <= 1e-6, f"{name}: {error}"


def test_accumulated_micro_batches_have_the_gradients_of_one_batch():
    gradients = runpy.run_path(str(SCRIPT))["gradients"]
    assert_close(gradients(1, 0, 2), gradients(1, 0, 1))


def test_sums_and_gathering(reports):
    for report in reports:
        assert report["sum"].item() == 3.0
        assert report["gathered"] == {"video0": 0, "video1": 1}
        assert report["twice"] == "two processes have 'same'; each must have its own share."


def test_shares_are_even_and_complete():
    sizes = {f"video{i}": (i * 7919) % 101 for i in range(60)}
    shares = share_longest_first(sizes, 7)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert share_longest_first({"a": 1}, 3) == [["a"], [], []]
    with pytest.raises(ValueError, match=r"`num_ranks` must be in \[1, inf\); got 0"):
        share_longest_first(sizes, 0)
    with pytest.raises(ValueError, match=r"`sizes\['a'\]`"):
        share_longest_first({"a": -1}, 2)
