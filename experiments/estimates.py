"""A number from N held-out samples with its 95 % interval, beside a baseline's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rg.metrics import student_quantile

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """ours lies in [low, high] with 95 % confidence over n samples; baseline is what something simpler scores."""

    ours: float
    low: float
    high: float
    baseline: float
    n: int


def around(mean: float, sem: float, n: int, baseline: float) -> Estimate:
    """The interval of a mean with standard error `sem` over n samples (Student's t), all of the line for n = 1."""
    half = student_quantile(n - 1) * sem if n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, baseline, n)


def of_mean(values: Tensor, baseline: float) -> Estimate:
    """The mean of values (N,); nan ones do not count.

    Raises:
        ValueError: none counts.
    """
    values = values[~values.isnan()].double()
    if not len(values):
        raise ValueError("expected at least one held-out sample to which the score applies, found none")
    sem = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return around(float(values.mean()), sem, len(values), baseline)


def by_resampling(score: Callable[[Tensor], float], n: int, baseline: float, seed: int = 0) -> Estimate:
    """A score of n samples that is no mean: the percentile interval of a seeded bootstrap (Efron, 1979).

    Args:
        score: of the samples with indices (n,) int64, which may repeat.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [score(torch.randint(n, (n,), generator=generator)) for _ in range(RESAMPLES)]
    low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Estimate(score(torch.arange(n)), low, high, baseline, n)
