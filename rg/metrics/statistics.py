"""Means over images of several scores: what the metrics of this package share."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class MeanPerImage(Metric):
    """Mean over images of N scores each, and its standard error. A subclass gives `update`, which ends in `add_images`.

    Args:
        names: of the scores, the keys of what `compute` returns.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, names: Sequence[Hashable]) -> None:
        super().__init__()
        self.names = tuple(names)
        # Sums alone, so that adding them over processes is exact.
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add_images(self, scores: Tensor) -> None:
        """Counts B images with their scores (B, N)."""
        scores = scores.double()
        self.total += scores.sum(0)
        self.squares += (scores**2).sum(0)
        self.images += len(scores)

    def compute(self) -> dict[Hashable, dict[str, float]]:
        """For each name the mean over images and its standard error "sem", 0 for one image (it cannot be estimated).

        Raises:
            ValueError: no image was counted.
        """
        count = int(self.images)
        if count == 0:
            raise ValueError(f"{type(self).__name__} of no images: expected at least one that counts")
        mean = self.total / count
        variance = (self.squares - count * mean**2).clamp_min(0) / max(count - 1, 1)
        sem = (variance / count).sqrt()
        return {n: {"mean": m, "sem": s} for n, m, s in zip(self.names, mean.tolist(), sem.tolist(), strict=True)}


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


def paired_gain(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean of after - before over the same N images and its 95 % interval (paired Student's t): "mean", "low", "high".

    Raises:
        ValueError: not two vectors of one length N >= 2.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(f"expected two vectors (N,) with N >= 2, got {tuple(before.shape)} and {tuple(after.shape)}")
    gain = after.double() - before.double()
    half = student_quantile(len(gain) - 1) * float(gain.std()) / math.sqrt(len(gain))
    mean = float(gain.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def student_quantile(freedom: int, coverage: float = 0.95) -> float:
    """The t with P(|T| <= t) = coverage for Student's T with `freedom` >= 1 degrees of freedom.

    With T = sqrt(freedom) tan(a) the density of the angle a is proportional to cos(a)^(freedom - 1), which is summed up
    on a grid: right to 4 digits.
    """
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    mass = F.pad(torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle), (1, 0))
    goal = coverage * mass[-1]
    above = int(torch.searchsorted(mass, goal))
    share = (goal - mass[above - 1]) / (mass[above] - mass[above - 1])
    return math.sqrt(freedom) * math.tan(float(torch.lerp(angle[above - 1], angle[above], share)))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with kernel (x . y / D + 1)^3, the KID of Binkowski et al. (2018), of features of two sets.

    Its mean over draws from one distribution is 0, so single values may be negative. Below 256 samples per set the
    its standard deviation hides most differences.

    Args:
        a: (N, D), N >= 2.
        b: (M, D), M >= 2.

    Raises:
        ValueError: other shapes.
    """
    _check_features(a, b)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


CMMD_SIGMA, CMMD_FACTOR = 10.0, 1000.0


def cmmd(a: Tensor, b: Tensor) -> float:
    """1000 times the squared MMD with kernel exp(-|x - y|^2 / (2 * 10^2)), of CLIP features (Jayasumana et al., 2024).

    As they do it counts each image with itself: it is never negative, and larger for few images.

    Args:
        a: (N, D) of length 1, N >= 2.
        b: (M, D) of length 1, M >= 2.

    Raises:
        ValueError: other shapes.
    """
    _check_features(a, b)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
        return (-squares / (2 * CMMD_SIGMA**2)).exp().mean()

    return CMMD_FACTOR * float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def _check_features(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected (N, D) and (M, D) with N, M >= 2, got {tuple(a.shape)} and {tuple(b.shape)}")
