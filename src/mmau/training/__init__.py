"""Small functions that a training loop calls; the loop itself is in the recipe."""

from __future__ import annotations

from mmau.training.averaging import SubmoduleAverage
from mmau.training.best_so_far import BestSoFar
from mmau.training.distributed import (
    gather_by_name,
    rank_and_size,
    share_longest_first,
    sum_over_ranks,
)
from mmau.training.finite import NotFiniteError, check_finite
from mmau.training.metrics_log import MetricsLog, read_metrics
from mmau.training.parameter_groups import parameter_groups
from mmau.training.planner import Cost, StepPlan, measure_cost, plan_step
from mmau.training.randomness import seed_everything
from mmau.training.resumable import Resumable
from mmau.training.same_run import differing_settings
from mmau.training.schedule import set_learning_rates, warmup_cosine, warmup_cosine_factor
from mmau.training.state_files import StateFileError, StateFiles
from mmau.training.step_bar import StepBar, step_bar
from mmau.training.step_order import ItemKey, MicroBatchSampler, StepOrder
from mmau.training.tensorboard import tensorboard_writer
from mmau.training.trainable_tensors import restore_tensors, trainable_tensors

__all__ = [
    "BestSoFar",
    "Cost",
    "ItemKey",
    "MetricsLog",
    "MicroBatchSampler",
    "NotFiniteError",
    "Resumable",
    "StateFileError",
    "StateFiles",
    "StepBar",
    "StepOrder",
    "StepPlan",
    "SubmoduleAverage",
    "check_finite",
    "differing_settings",
    "gather_by_name",
    "measure_cost",
    "parameter_groups",
    "plan_step",
    "rank_and_size",
    "read_metrics",
    "restore_tensors",
    "seed_everything",
    "set_learning_rates",
    "share_longest_first",
    "step_bar",
    "sum_over_ranks",
    "tensorboard_writer",
    "trainable_tensors",
    "warmup_cosine",
    "warmup_cosine_factor",
]
