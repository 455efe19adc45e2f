"""Label maps of rendered pictures: majority over a pixel's samples, and edges."""

import torch
from torch import Tensor

STEP = 0.08  # relative jump of inverse depth from one pixel to the next that makes an edge
FLOOR = 0.02  # and the absolute one, 1 / world units, that keeps a level ground free of edges


def area_mean(cells: Tensor, factor: int) -> Tensor:
    """Averages blocks of `factor` x `factor` cells of (..., H, W), added one by one: a sum whose order is known."""
    return sum(_corners(cells, factor)) / factor**2


def majority(cells: Tensor, factor: int) -> Tensor:
    """The most frequent value of blocks of `factor` x `factor` cells of (..., H, W), uint8; on a tie the highest."""
    corners = [corner.int() for corner in _corners(cells, factor)]
    counts = [sum((corner == other).int() for other in corners) for corner in corners]
    best = torch.stack([count * 256 + corner for count, corner in zip(counts, corners, strict=True)]).amax(0)
    return (best % 256).to(torch.uint8)


def _corners(cells: Tensor, factor: int) -> list[Tensor]:
    return [cells[..., i::factor, j::factor] for i in range(factor) for j in range(factor)]


def edges(depth: Tensor, labels: Tensor) -> Tensor:
    """Where depth or labels jump, one pixel wide: of two neighbours that differ, the nearer one is the edge.

    Args:
        depth: (B,H,W) inverse depth, LARGER IS NEARER. labels: (B,H,W), equal within one part of one instance.

    Returns:
        (B,H,W) bool.
    """
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (1, 2):
        size = depth.shape[axis] - 1
        first, second = depth.narrow(axis, 0, size), depth.narrow(axis, 1, size)
        jump = (first - second).abs() > STEP * torch.maximum(first, second) + FLOOR
        jump |= labels.narrow(axis, 0, size) != labels.narrow(axis, 1, size)
        marked.narrow(axis, 0, size).logical_or_(jump & (first >= second))
        marked.narrow(axis, 1, size).logical_or_(jump & (first < second))
    return marked
