import math

import pytest
import torch

from rg.metrics.statistics import around, by_resampling, of_mean


def test_the_interval_of_a_mean_is_students():
    values = torch.tensor([1.0, 2.0, 3.0, float("nan"), 6.0])
    found = of_mean(values, 2.5)
    # t with 3 degrees of freedom is 3.182; the deviation of 1, 2, 3, 6 is sqrt(14 / 3).
    half = 3.182 * math.sqrt(14 / 3) / 2
    assert (found.ours, found.n, found.baseline) == (3.0, 4, 2.5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=2e-3)


def test_one_sample_says_nothing_of_the_deviation_and_none_nothing_at_all():
    assert around(0.5, 0.0, 1, 0.1).high == math.inf
    with pytest.raises(ValueError, match="at least one .* none"):
        of_mean(torch.full((3,), float("nan")), 0.0)


def test_resampling_agrees_with_the_normal_interval_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = by_resampling(lambda chosen: float(values[chosen].mean()), len(values), 0.0)
    assert found.ours == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found == by_resampling(lambda chosen: float(values[chosen].mean()), len(values), 0.0)
