"""Scores of keypoints and of sets of images. Points are (x, y) in pixels of one image; see rg.points."""

from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from rg.metrics.statistics import MeanPerImage


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises ValueError where there is no tolerance, or one outside (0, 1)."""
    if not alphas or any(not 0 < alpha < 1 for alpha in alphas):
        raise ValueError(f"alphas: expected values in (0, 1), at least one, got {list(alphas)}")


def box_side(points: Tensor, visible: Tensor) -> Tensor:
    """Larger side of the box around the visible ones of points (B, K, 2): (B,) in pixels, 0 where fewer than two are.

    Args:
        points: (B, K, 2).
        visible: (B, K) bool.
    """
    low = torch.where(visible[..., None], points, torch.inf).amin(1)
    high = torch.where(visible[..., None], points, -torch.inf).amax(1)
    return (high - low).amax(-1).clamp_min(0)


def pck(predicted: Tensor, target: Tensor, visible: Tensor, size: Tensor, alphas: Sequence[float]) -> Tensor:
    """Share of each image's visible keypoints that lie within alpha * size of their target (Yang & Ramanan, 2013).

    Args:
        predicted: (B, K, 2) in pixels.
        target: (B, K, 2) in pixels.
        visible: (B, K) bool, which keypoints count; at least one per image.
        size: (B,) side of a box in pixels, see `box_side`.
        alphas: A tolerances as shares of the box, in (0, 1).

    Returns:
        (B, A) in [0, 1].

    Raises:
        ValueError: no alpha or one outside (0, 1), tensors that do not fit together, or an image without a visible
            keypoint (it has no score: leave it out, or do not draw such targets).
    """
    check_alphas(alphas)
    b, k = visible.shape
    shapes = [tuple(x.shape) for x in (predicted, target, size)]
    if shapes != [(b, k, 2), (b, k, 2), (b,)]:
        raise ValueError(f"expected predicted, target, size {[(b, k, 2), (b, k, 2), (b,)]}, got {shapes}")
    empty = (~visible.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"PCK counts visible keypoints only, and these samples of the batch have none: {empty}")
    reach = torch.stack([alpha * size for alpha in alphas], -1)
    correct = (predicted - target).norm(dim=-1)[..., None] <= reach[:, None]
    return (correct & visible[..., None]).sum(1) / visible.sum(1)[:, None]


def match_people(predicted: Tensor, target: Tensor, visible: Tensor, present: Tensor) -> Tensor:
    """Which prediction is which person: the assignment with the smallest sum of mean distances of visible keypoints.

    Args:
        predicted: (B, P, K, 2) in pixels.
        target: (B, P, K, 2) in pixels.
        visible: (B, P, K) bool, which keypoints of the targets count; a person without any may get whoever is left.
        present: (B, P) bool, which predictions are people at all: these are given away first.

    Returns:
        (B, P) int64, for each target the index of its prediction.
    """
    distances = (predicted[:, None] - target[:, :, None]).norm(dim=-1)  # (B, targets, predictions, K)
    counted = visible[:, :, None]
    cost = (distances * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    cost = cost + 1e6 * (counted.any(-1) & ~present[:, None])
    orders = torch.tensor(list(permutations(range(target.shape[1]))), device=cost.device)  # (orders, P)
    sums = torch.stack([cost[:, range(len(order)), order].sum(1) for order in orders.tolist()], 1)
    return orders[sums.argmin(1)]


class PCK(MeanPerImage):
    """Mean share of correct keypoints over images, at several tolerances, which are the keys of what `compute` returns.

    Args:
        alphas: tolerances in (0, 1), shares of the larger side of a box.
        box: "target" is the box around the target's visible keypoints, "predicted" the box around the prediction of the
            same keypoints (the paper's wording).
    """

    higher_is_better = True

    def __init__(
        self, *, alphas: Sequence[float] = (0.05, 0.1, 0.2), box: Literal["target", "predicted"] = "target"
    ) -> None:
        check_alphas(alphas)
        if box not in ("target", "predicted"):
            raise ValueError(f"expected box 'target' or 'predicted', got {box!r}: change `box`")
        super().__init__(alphas)
        self.box = box

    def update(self, predicted: Tensor, target: Tensor, visible: Tensor, present: Tensor | None = None) -> None:
        """Adds B images.

        Args:
            predicted, target: (B, K, 2) in pixels.
            visible: (B, K) bool, which keypoints of the target count.
            present: (B,) bool, whether a person was found; where not, every keypoint is wrong. None: everywhere.

        Raises:
            ValueError: see `pck`.
        """
        size = box_side(target if self.box == "target" else predicted, visible)
        shares = pck(predicted, target, visible, size, self.names)
        if present is not None:
            shares = shares * present[:, None]
        self.add_images(shares)
