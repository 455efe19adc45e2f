"""Means over images of several scores: what the metrics of this package share."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMeans(Metric):
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
        """For each name the mean over images and its standard error "sem", 0 for one image (its spread is unknown).

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
