"""What a row says: two means, the paired difference with its interval, and whether a goal was met."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.report.figures import Row
from rg.metrics.statistics import paired_gain


@dataclass(frozen=True)
class Finding:
    """A row's numbers: means of baseline and ours over n images that have both, and of the paired difference its
    standard error and 95 % interval. `verdict` says in words whether the goal was met."""

    title: str
    metric: str
    baseline: float
    ours: float
    sem: float
    low: float
    high: float
    n: int
    met: bool
    verdict: str


def find(row: Row, stored: Mapping[str, Any]) -> Finding | None:
    """A row's finding; None where its run has not these methods, or fewer than two images."""
    scores = stored["scores"]
    if row.baseline not in scores or row.ours not in scores or row.metric not in scores[row.ours]:
        return None
    before, after = (
        torch.tensor([math.nan if value is None else value for value in scores[name][row.metric]])
        for name in (row.baseline, row.ours)
    )
    both = ~(before.isnan() | after.isnan())
    if both.sum() < 2:
        return None
    before, after = before[both].double(), after[both].double()
    gain, n = paired_gain(before, after), len(before)
    sem = float((after - before).std()) / math.sqrt(n)
    base, ours = float(before.mean()), float(after.mean())
    met, verdict = judge(row, base, ours, gain["mean"], sem)
    return Finding(row.title, row.metric, base, ours, sem, gain["low"], gain["high"], n, met, verdict)


def judge(row: Row, baseline: float, ours: float, gain: float, sem: float) -> tuple[bool, str]:
    """Whether a row's goal is met: a share of the baseline's mean, or a difference beyond three standard errors."""
    if row.goal is None:
        met = (-gain if row.lower else gain) > 3 * sem
        return met, "beyond three standard errors" if met else "missed: within three standard errors, or the wrong way"
    met = ours <= row.goal * baseline if row.lower else ours >= row.goal * baseline
    asked = f"at {'most' if row.lower else 'least'} {row.goal:g} times the baseline"
    return met, f"goal met: {asked}" if met else f"missed: the goal is {asked}"
