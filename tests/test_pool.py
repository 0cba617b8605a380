"""Jobs in processes: a job that kills its process fails alone, and what is wrong is said."""

import os

import pytest

from mmau._pool import ProcessDiedError, run_in_processes


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
