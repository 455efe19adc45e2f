"""Scores of keypoints and of sets of images. Points are (x, y) in pixels of one image; see rg.points."""

from collections.abc import Sequence
from math import isnan, nan
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rg.metrics.statistics import MeanPerImage


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises ValueError where there is no tolerance, or one outside (0, 1)."""
    if not alphas or any(not 0 < alpha < 1 for alpha in alphas):
        raise ValueError(f"alphas: expected values in (0, 1), at least one, got {list(alphas)}")


def box_sides(points: Tensor, visible: Tensor) -> Tensor:
    """Width and height of the box around the visible ones of points, 0 where there are none.

    Args:
        points: (B, K, 2) in pixels.
        visible: (B, K) bool.

    Returns:
        (B, 2) in pixels.
    """
    low = torch.where(visible[..., None], points, torch.inf).amin(1)
    high = torch.where(visible[..., None], points, -torch.inf).amax(1)
    return (high - low).clamp_min(0)


def box_side(points: Tensor, visible: Tensor) -> Tensor:
    """Larger side of the box around the visible ones of points (B, K, 2): (B,) in pixels, 0 where fewer than two are.

    Args:
        points: (B, K, 2).
        visible: (B, K) bool.
    """
    return box_sides(points, visible).amax(-1)


def measurable(target: Tensor, visible: Tensor) -> Tensor:
    """Whose keypoints have a size to measure by, two visible ones in different places at least: bool (...).

    Args:
        target: (..., K, 2).
        visible: (..., K) bool.
    """
    side = box_side(target.flatten(0, -3), visible.flatten(0, -2))
    return (side > 0).unflatten(0, visible.shape[:-1])


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
    _check_poses("PCK", predicted, target, visible, size)
    correct = is_correct(predicted, target, size, alphas)
    return (correct & visible[..., None]).sum(1) / visible.sum(1)[:, None]


def is_correct(predicted: Tensor, target: Tensor, size: Tensor, alphas: Sequence[float]) -> Tensor:
    """Which keypoints lie within alpha * size of their target, see `pck`: bool (B, K, A)."""
    reach = torch.stack([alpha * size for alpha in alphas], -1)
    return (predicted - target).norm(dim=-1)[..., None] <= reach[:, None]


def _check_poses(metric: str, predicted: Tensor, target: Tensor, visible: Tensor, size: Tensor) -> None:
    b, k = visible.shape
    shapes = [tuple(x.shape) for x in (predicted, target, size)]
    if shapes != [(b, k, 2), (b, k, 2), (b,)]:
        raise ValueError(f"expected predicted, target, size {[(b, k, 2), (b, k, 2), (b,)]}, got {shapes}")
    empty = (~visible.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{metric} counts visible keypoints only, and these samples of the batch have none: {empty}")


# Standard deviations of annotators, as shares of the square root of a person's area, for the 18 keypoints of
# rg.points.KEYPOINTS; COCO has no neck, which does not count.
SIGMAS = (
    *(0.026, nan),
    *(0.079, 0.072, 0.062, 0.079, 0.072, 0.062),
    *(0.107, 0.087, 0.089, 0.107, 0.087, 0.089),
    *(0.025, 0.025, 0.035, 0.035),
)
IN_COCO = tuple(not isnan(sigma) for sigma in SIGMAS)


def oks(predicted: Tensor, target: Tensor, visible: Tensor, area: Tensor) -> Tensor:
    """COCO's object keypoint similarity, the mean over visible keypoints of exp(-d^2 / (2 area (2 sigma)^2)).

    COCO's 17 keypoints are those of OpenPose without the neck; its sigmas are SIGMAS. COCO takes the area of the
    person's mask, which a pose alone does not have: give that of the box around the visible keypoints.

    Args:
        predicted: (B, 18, 2) in pixels.
        target: (B, 18, 2) in pixels.
        visible: (B, 18) bool, which keypoints count; one per person at least beside the neck.
        area: (B,) in pixels, positive.

    Returns:
        (B,) in [0, 1].

    Raises:
        ValueError: tensors that do not fit together, or a person without a visible keypoint beside the neck.
    """
    counted = visible & torch.tensor(IN_COCO, device=visible.device)
    _check_poses("OKS", predicted, target, counted, area)
    spread = 2 * torch.tensor(SIGMAS, dtype=target.dtype, device=target.device).nan_to_num(1.0)
    similar = (-((predicted - target) ** 2).sum(-1) / (2 * area[:, None] * spread**2)).exp()
    return torch.where(counted, similar, 0.0).sum(1) / counted.sum(1)


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
    # Not a product: what is hidden is not read, and may be nan.
    cost = torch.where(counted, distances, 0.0).sum(-1) / counted.sum(-1).clamp_min(1)
    cost = cost + 1e6 * (counted.any(-1) & ~present[:, None])
    orders = [_assign(*image) for image in zip(cost.cpu(), visible.any(-1).cpu(), strict=True)]
    return torch.stack(orders).to(cost.device)


def _assign(cost: Tensor, asked: Tensor) -> Tensor:
    """The cheapest assignment (P,) for costs (P targets, P predictions); who is not asked for gets what is left."""
    order = torch.full((len(cost),), -1)
    order[asked] = torch.from_numpy(linear_sum_assignment(cost[asked].double().numpy())[1])
    left = sorted(set(range(len(cost))) - set(order.tolist()))
    order[~asked] = torch.tensor(left, dtype=order.dtype)
    return order


class PCK(MeanPerImage):
    """Mean share of correct keypoints over images, at several tolerances, which are the keys of what `compute` returns.

    An image without two visible keypoints in different places has no size to measure by: it does not count, and
    `left_out` says how many there were.

    Args:
        alphas: tolerances in (0, 1), shares of the larger side of a box.
        box: "target" is the box around the target's visible keypoints, "predicted" the box around the prediction of the
            same keypoints (the paper's wording).
    """

    higher_is_better = True
    left_out: Tensor

    def __init__(
        self, *, alphas: Sequence[float] = (0.05, 0.1, 0.2), box: Literal["target", "predicted"] = "target"
    ) -> None:
        check_alphas(alphas)
        if box not in ("target", "predicted"):
            raise ValueError(f"expected box 'target' or 'predicted', got {box!r}: change `box`")
        super().__init__(alphas)
        self.add_state("left_out", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
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
        counted = measurable(target, visible) | ~visible.any(-1)  # `pck` refuses the latter
        self.left_out += (~counted).sum()
        size = box_side(target if self.box == "target" else predicted, visible)
        shares = pck(predicted, target, visible, size, self.names)
        if present is not None:
            shares = shares * present[:, None]
        self.add_images(shares[counted])

    def compute(self) -> dict[Any, dict[str, float]]:
        """See MeanPerImage; nan where every image was left out."""
        if int(self.images) == 0 and int(self.left_out):
            return {name: {"mean": nan, "sem": nan} for name in self.names}
        return super().compute()
