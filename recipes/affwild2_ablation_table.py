"""The tables of the ablation: every way to decide, intervals over videos, differences per seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from affwild2_ablation_settings import SETTINGS, AblationConfig, Variant, config_of
from affwild2_data import Video
from affwild2_presets import ROWS
from affwild2_report import scored_trials

from mmau.evaluation import (
    AUCounts,
    BootstrapOptions,
    FitOptions,
    Interval,
    bootstrap_by_video,
    evaluate_trials,
    paired_bootstrap_by_video,
)
from mmau.modules import LOSSES

# ------------------------------------------------------------------ the tables
WAYS = ("raw at 0.5", "posterior at 0.5", "cross-validated thresholds")


@dataclass(frozen=True)
class Line:
    """One line of a table, over all seeds."""

    variant: Variant
    counts: Mapping[tuple[str, str], Mapping[str, AUCounts]]
    """(way to decide, subset of the frames) to video to counts, added up over the seeds."""
    per_seed: Mapping[str, list[float]]
    """Way to decide to mean F1 on all frames, seed by seed."""
    precision: float
    """Mean average precision, mean over the seeds."""
    parameters: int
    seconds: float
    """Mean over the seeds: teaching the encoder, encoding and training."""


def line_of(name: str, key: str, videos: Sequence[Video], ablation: AblationConfig) -> Line:
    """Read what the seeds of one line said, and decide in every way."""
    variant = SETTINGS[name].variants[key]
    config = config_of(name, variant, 0, ablation)
    loss = LOSSES.create(config.loss.name, **config.loss.options)
    counts: dict[tuple[str, str], dict[str, AUCounts]] = {}
    per_seed: dict[str, list[float]] = {way: [] for way in WAYS}
    precisions, seconds, parameters = [], [], 0
    for seed in range(ablation.seeds):
        record = torch.load(ablation.out / name / f"seed-{seed}" / f"{key}.pt")
        report = evaluate_trials(
            scored_trials(videos, record["logits"]),
            au_names=config.model.au_names,
            posterior=loss.posterior,
            options=FitOptions(smoothing=False),
            bootstrap=BootstrapOptions(100),  # the intervals of a single seed are not shown
        )
        for way in WAYS:
            row = report.row(way)
            per_seed[way].append(row.pooled().mean_f1())
            for subset, of_videos in row.counts.items():
                pooled = counts.setdefault((way, subset), {})
                for video, one in of_videos.items():
                    pooled.setdefault(video, AUCounts(config.model.au_names)).merge(one)
        precisions.append(float(report.average_precision["all"].nanmean()))
        seconds.append(sum(record["seconds"].values()))
        parameters = record["parameters"]
    return Line(variant, counts, per_seed, mean(precisions), parameters, mean(seconds))


def table_of(name: str, lines: Mapping[str, Line]) -> tuple[str, dict[str, Any]]:
    """Return a table as Markdown and as JSON."""
    setting = SETTINGS[name]
    subsets = [s for s in ("hidden",) if (WAYS[0], s) in next(iter(lines.values())).counts]
    heads = ["", *("raw", "posterior", "cross-fitted"), *(["no face seen"] if subsets else [])]
    heads += ["mAP", "minus", "raw: difference", "cross-fitted: difference", "by seed"]
    heads += ["weights", "s"]
    rows, record = [], {}
    for key, line in lines.items():
        scores = {way: bootstrap_by_video(line.counts[way, "all"]) for way in WAYS}
        cells = [line.variant.title, *map(str, scores.values())]
        cells += [str(bootstrap_by_video(line.counts[WAYS[2], subset])) for subset in subsets]
        steps = {}
        if line.variant.against is not None:
            other = lines[line.variant.against]
            steps = {
                f"{way}, {subset}": paired_bootstrap_by_video(
                    line.counts[way, subset], other.counts[way, subset]
                )
                for way, subset in line.counts
            }
            by_seed = [
                mine - theirs
                for mine, theirs in zip(
                    line.per_seed[WAYS[2]], other.per_seed[WAYS[2]], strict=True
                )
            ]
        cells.append(f"{line.precision:.3f}")
        if steps:
            cells += [other.variant.title, *(str(steps[f"{way}, all"]) for way in WAYS[::2])]
            cells.append(" ".join(f"{one:+.3f}" for one in by_seed))
        else:
            cells += ["-"] * 4
        cells += [f"{line.parameters:,}", f"{line.seconds:.0f}"]
        rows.append(cells)
        record[key] = {
            "title": line.variant.title,
            "against": line.variant.against,
            "mean_f1": {
                f"{way}, {subset}": numbers_of(bootstrap_by_video(of_videos))
                for (way, subset), of_videos in line.counts.items()
            },
            "difference": {what: numbers_of(step) for what, step in steps.items()},
            "mean_f1_per_seed": dict(line.per_seed),
            "f1_per_au": {way: pooled_f1(line.counts[way, "all"]) for way in WAYS},
            "mean_average_precision": line.precision,
            "parameters": line.parameters,
            "seconds": line.seconds,
            "paper_validation_f1_percent": ROWS[line.variant.row].paper
            if name == "table1"
            else None,
        }
    text = [f"### {name}: {setting.question}", ""]
    text += ["| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(text), record


def numbers_of(interval: Interval) -> dict[str, float | None]:
    """Return an interval for JSON, which knows no NaN."""
    numbers = dataclasses.asdict(interval)
    return {name: None if value != value else value for name, value in numbers.items()}


def pooled_f1(of_videos: Mapping[str, AUCounts]) -> dict[str, float | None]:
    """Return the F1 of each Action Unit over all videos and seeds; `None` without positives."""
    total = AUCounts(next(iter(of_videos.values())).au_names)
    for one in of_videos.values():
        total.merge(one)
    values = zip(total.au_names, total.f1().tolist(), strict=True)
    return {name: None if value != value else value for name, value in values}
