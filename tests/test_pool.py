"""Jobs in processes: a job that kills its process fails alone, and what is wrong is said."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau._pool import ProcessDiedError, run_in_processes, share_longest_first


def start(factor):
    """Runs in each process."""
    if factor is None:
        raise ValueError("no such model")

    def work(job, progress):
        progress(1, 2)
        if job == "kill":
            os._exit(1)
        if job == "fail":
            raise OSError("a broken file")
        return factor * job

    return work


def test_a_job_that_kills_its_process_and_one_that_fails_leave_the_others():
    jobs = {"one": 1, "dead": "kill", "two": 2, "broken": "fail", "three": 3}
    futures = dict(run_in_processes(jobs, start, 10, processes=2))
    assert set(futures) == set(jobs)
    assert [futures[name].result() for name in ("one", "two", "three")] == [10, 20, 30]
    assert isinstance(futures["dead"].exception(), ProcessDiedError)
    with pytest.raises(OSError, match="a broken file"):
        futures["broken"].result()


def test_a_process_that_cannot_start_says_why():
    ((name, future),) = run_in_processes({"one": 1}, start, None, processes=1)
    assert name == "one"
    with pytest.raises(RuntimeError, match="no such model"):
        future.result()


def test_progress_within_a_job_reaches_the_caller(monkeypatch):
    seen = []
    run = run_in_processes({"one": 1}, slow_start, 0, 1, lambda *share: seen.append(share))
    assert [future.result() for _, future in run] == [None]
    assert seen == [("one", 0.5)]


def slow_start(_):
    import time

    def work(job, progress):
        time.sleep(0.6)  # shares are sent at most twice a second
        progress(1, 2)
        time.sleep(1.2)

    return work


@given(
    lengths=st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(0, 50)),
    world_size=st.integers(1, 6),
)
def test_every_job_is_in_one_share_and_shares_are_even(lengths, world_size):
    shares = share_longest_first(lengths, world_size)
    assert sorted(name for share in shares for name in share) == sorted(lengths)
    assert shares == share_longest_first(dict(reversed(lengths.items())), world_size)
    loads = [sum(lengths[name] for name in share) for share in shares]
    # Longest first: no share exceeds the least by more than one trial.
    assert max(loads) - min(loads) <= max(lengths.values(), default=0)
    for share in shares:
        assert [lengths[n] for n in share] == sorted((lengths[n] for n in share), reverse=True)
