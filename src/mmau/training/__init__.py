"""Small functions that a training loop calls; the loop itself is in the recipe."""

from __future__ import annotations

from mmau.training.log import MetricsLog, StepBar, read_metrics, step_bar, tensorboard_writer
from mmau.training.optim import (
    SubmoduleAverage,
    parameter_groups,
    set_learning_rates,
    warmup_cosine,
    warmup_cosine_factor,
)
from mmau.training.planner import Cost, StepPlan, measure_cost, plan_step
from mmau.training.sampler import (
    ItemKey,
    MicroBatchSampler,
    StepOrder,
    gather_by_name,
    rank_and_size,
    share_longest_first,
    sum_over_ranks,
)
from mmau.training.state import (
    BestSoFar,
    NotFiniteError,
    Resumable,
    StateFileError,
    StateFiles,
    check_finite,
    differing_settings,
    restore_tensors,
    seed_everything,
    trainable_tensors,
)

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
