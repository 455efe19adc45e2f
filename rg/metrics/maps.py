"""Scores of maps that lie on an image: depth and edges. A map is (B, H, W) in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rg.metrics.statistics import MeanPerImage

FARTHEST = 0.1  # inverse depth relative to the image's nearest point: what is farther away has no depth
DELTA = 1.25
THRESHOLD = 0.5  # half-way between black and white: above it lies an edge
TOLERANCE = 1  # pixels, along each axis


class DepthScores(MeanPerImage):
    """Scale-invariant error "si_log" (lower is better) and share of good pixels "delta1.25", means over images.

    A readout of relative inverse depth is first aligned with the truth, see `align`, then both are turned into depth,
    as Ranftl et al. (2022) do. Only pixels whose truth is above FARTHEST count, and an aligned value below it is set to
    it. With e = log depth read - log depth, of the pixels of one image:
    si_log is the standard deviation of e, the root of eq. 1 of Eigen et al. (2014);
    delta1.25 the share of |e| < log 1.25, their "threshold". An image without a pixel that counts is left out.
    """

    def __init__(self) -> None:
        super().__init__(("si_log", f"delta{DELTA}"))

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Adds B images: maps (B, H, W) of relative inverse depth in [0, 1], larger is nearer.

        Raises:
            ValueError: the two differ in shape.
        """
        _check(predicted, target)
        predicted, target = predicted.flatten(1).double(), target.flatten(1).double()
        counted = target > FARTHEST
        known = counted.any(1)
        predicted, target, counted = predicted[known], target[known], counted[known]
        aligned = align(predicted, target, counted)
        error = target.clamp_min(FARTHEST).log() - aligned.clamp_min(FARTHEST).log()
        std = _mean((error - _mean(error, counted)) ** 2, counted).sqrt()
        good = _mean((error.abs() < math.log(DELTA)).double(), counted)
        self.add_images(torch.cat([std, good], 1))


class EdgeScores(MeanPerImage):
    """F-score "f@1px" of edges at a tolerance of one pixel, mean over images.

    Both maps are cut at THRESHOLD. Precision is the share of the edge pixels read that have a true one among the nine
    pixels around them, recall the reverse, and F their harmonic mean, as for boundaries in Perazzi et al. (2016): many
    may be near one, lines are not thinned. Without a true edge F is 1 where none is read, else 0.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__((f"f@{TOLERANCE}px",))

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Adds B images: maps (B, H, W) in [0, 1], edges white.

        Raises:
            ValueError: the two differ in shape.
        """
        _check(predicted, target)
        edges, truth = predicted > THRESHOLD, target > THRESHOLD
        precision, recall = _share_near(edges, truth), _share_near(truth, edges)
        score = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        nothing = ~(edges | truth).flatten(1).any(1)
        self.add_images((score + nothing)[:, None])


def align(predicted: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Least-squares scale and shift of each row to its target (Ranftl et al., 2022, eq. 4): (B, N).

    The scale is at least 0: a readout that takes near for far becomes a constant, and earns nothing for it.

    Args:
        predicted, target: (B, N) inverse depths.
        counted: (B, N) bool, which of them count, at least one per row.
    """
    centred, goal = predicted - _mean(predicted, counted), _mean(target, counted)
    scale = _mean(centred * (target - goal), counted) / _mean(centred**2, counted).clamp_min(1e-12)
    return scale.clamp_min(0) * centred + goal


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted of values (B, N): (B, 1)."""
    return (values * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)


def _share_near(mask: Tensor, other: Tensor) -> Tensor:
    """Share of the pixels in masks (B, H, W) that have one of `other` within TOLERANCE: (B,), 0 for an empty mask."""
    near = F.max_pool2d(other.double()[:, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0]
    return (mask * near).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)


def _check(predicted: Tensor, target: Tensor) -> None:
    if predicted.ndim != 3 or predicted.shape != target.shape:
        raise ValueError(f"expected two maps (B, H, W), got {tuple(predicted.shape)} and {tuple(target.shape)}")
