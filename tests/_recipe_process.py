"""Run by `test_recipe_resume` in a forked process: the recipe, as one rank would start it."""

import os
import resource
import runpy
import sys
from pathlib import Path


def start(job):
    """Take the place of a fresh `python recipe.py words`, with its output in a file."""
    with Path(job["said"]).open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.update(job["environment"])
    if job["largest_file"] is not None:  # what a full disk does, for this process alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
    sys.argv = [job["script"], *job["words"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    runpy.run_path(job["script"], run_name="__main__")


if "JOB" in globals():  # given through `runpy`; absent where pytest looks for doctests
    start(globals()["JOB"])
