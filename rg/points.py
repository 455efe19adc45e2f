"""The one owner of coordinates: keypoint names, limbs, and the maps between points, heatmaps and skeletons.

A point is (x, y) in pixels of the image it is named with; pixel centres lie at integers, so an image of
width W covers x in [-0.5, W - 0.5]. Sizes are (height, width). A keypoint is (x, y, visible).
"""

import torch
from torch import Tensor

Size = tuple[int, int]
# The 18 keypoints of OpenPose's COCO model, in its order (Cao et al., 2017).
KEYPOINTS = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
# The keypoint that each one becomes when an image is mirrored: left and right change places.
_SIDES = {"left": "right", "right": "left"}
MIRROR = tuple(KEYPOINTS.index("_".join(_SIDES.get(word, word) for word in name.split("_"))) for name in KEYPOINTS)
# Pairs of keypoints that a skeleton joins, in OpenPose's drawing order.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
# OpenPose's eighteen hues, 0..255 RGB: keypoint k has COLORS[k], limb l the same hue at 60 % brightness.
COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip


def rescale(points: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """Moves points (..., 2) from an image of `from_size` to the same image resized to `to_size`.

    Pixel centres are at integers, so the half pixel at the border is kept: x' = (x + 0.5) * w' / w - 0.5.
    """
    factor = points.new_tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]])
    return (points + 0.5) * factor - 0.5


def cells(points: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """(column, row) of the cell of a map of `to_size` in which points (..., 2) of an image lie: integers (..., 2)."""
    return (rescale(points, from_size, to_size) + 0.5).floor().long()


def box_cells(boxes: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """The cells of a map of `to_size` that boxes of an image touch, as boxes in cells.

    Boxes are (..., 4) of (left, top, right, bottom) counted from the corner, right and bottom exclusive, as PIL crops.
    """
    factor = torch.tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]], device=boxes.device)
    start, stop = boxes[..., :2] * factor, boxes[..., 2:] * factor
    return torch.cat([start.floor(), stop.ceil()], -1).long()


def inside(points: Tensor, size: Size) -> Tensor:
    """Whether each of points (..., 2) lies in an image of `size`: bool (...)."""
    x, y = points.unbind(-1)
    return (x >= -0.5) & (x < size[1] - 0.5) & (y >= -0.5) & (y < size[0] - 0.5)


def check_visible(keypoints: Tensor, name: str) -> None:
    """Raises ValueError where a visible one of keypoints (..., 3) is not finite; the error calls them `name`."""
    bad = ~(keypoints[..., 2] <= 0) & ~keypoints.isfinite().all(-1)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        found = f"{keypoints[tuple(place)].tolist()} at {place}"
        raise ValueError(f"{name}: expected visible keypoints of finite numbers, found {found}")


def heatmaps(keypoints: Tensor, from_size: Size, to_size: Size, sigma: float) -> Tensor:
    """Draws keypoints as Gaussian bumps of height 1, people combined by maximum.

    Args:
        keypoints: (B, P, K, 3) of (x, y, visible) in pixels of an image of `from_size`; an invisible one is not drawn.
        from_size: (height, width) of the image that the keypoints are measured in.
        to_size: (height, width) of the maps.
        sigma: standard deviation of a bump, in cells of the maps.

    Returns:
        (B, K, height, width) in [0, 1].
    """
    centre = rescale(keypoints[..., :2], from_size, to_size)
    columns = torch.arange(to_size[1], device=keypoints.device, dtype=keypoints.dtype)
    rows = torch.arange(to_size[0], device=keypoints.device, dtype=keypoints.dtype)
    dx = torch.exp(-((columns - centre[..., 0:1]) ** 2) / (2 * sigma**2))
    dy = torch.exp(-((rows - centre[..., 1:2]) ** 2) / (2 * sigma**2))
    visible = (keypoints[..., 2] > 0)[..., None, None]
    # Not a product: what is hidden is not read, and may be nan.
    return torch.where(visible, dy[..., :, None] * dx[..., None, :], 0.0).amax(dim=1)


def peaks(maps: Tensor, to_size: Size, radius: int = 2) -> tuple[Tensor, Tensor]:
    """Finds the highest point of each map, refined by the centre of mass of the positive values around it.

    Args:
        maps: (B, K, h, w), any range.
        to_size: (height, width) of the image in whose pixels the points are returned.
        radius: cells on each side of the highest one that enter the centre of mass.

    Returns:
        points (B, K, 2) in pixels of `to_size`, and the maxima (B, K).
    """
    b, k, h, w = maps.shape
    height, index = maps.flatten(2).max(-1)
    columns, rows = torch.arange(w, device=maps.device), torch.arange(h, device=maps.device)
    near_x = (columns - (index % w)[..., None]).abs() <= radius
    near_y = (rows - (index // w)[..., None]).abs() <= radius
    mass = maps.clamp_min(0) * near_y[..., :, None] * near_x[..., None, :]
    # A map without a positive value has no centre of mass: its first maximum stands.
    peak = torch.zeros_like(mass).flatten(2).scatter_(2, index[..., None], 1.0).view_as(mass)
    mass = torch.where(mass.sum((2, 3), keepdim=True) > 0, mass, peak)
    total = mass.sum((2, 3))
    x = (mass.sum(2) * columns).sum(-1) / total
    y = (mass.sum(3) * rows).sum(-1) / total
    return rescale(torch.stack([x, y], -1), (h, w), to_size), height


def draw_skeletons(keypoints: Tensor, from_size: Size, to_size: Size, width: float) -> Tensor:
    """Draws OpenPose skeletons on black: limbs at 60 % brightness, keypoints as discs over them.

    Edges are hard and the background is exactly 0, so that a sparse loss can tell the two apart.

    Args:
        keypoints: (B, P, 18, 3) of (x, y, visible) in pixels of an image of `from_size`.
        to_size: (height, width) of the drawing.
        width: thickness of a limb and diameter of a disc, in pixels of the drawing.

    Returns:
        (B, 3, height, width) in [0, 1].
    """
    points = rescale(keypoints[..., :2], from_size, to_size)
    visible = keypoints[..., 2] > 0
    rows = torch.arange(to_size[0], device=points.device, dtype=points.dtype)
    columns = torch.arange(to_size[1], device=points.device, dtype=points.dtype)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
    canvas = points.new_zeros(len(points), 3, *to_size)
    colors = points.new_tensor(COLORS) / 255
    strokes = [(a, b, 0.6 * colors[i]) for i, (a, b) in enumerate(LIMBS)] + [(k, k, colors[k]) for k in range(18)]
    for person in range(points.shape[1]):
        for a, b, color in strokes:
            shown = visible[:, person, a] & visible[:, person, b]
            if not shown.any():
                continue
            place = _reach(points[:, person, [a, b]][shown], width, to_size)
            start, end = points[:, person, a, None, None], points[:, person, b, None, None]
            along = end - start
            share = ((grid[place] - start) * along).sum(-1) / (along**2).sum(-1).clamp_min(1e-12)
            distance = (grid[place] - start - share.clamp(0, 1)[..., None] * along).norm(dim=-1)
            drawn = (distance <= width / 2) & shown[:, None, None]
            part = canvas[..., place[0], place[1]]
            part.copy_(torch.where(drawn[:, None], color[:, None, None], part))
    return canvas


def _reach(points: Tensor, width: float, size: Size) -> tuple[slice, slice]:
    """Rows and columns of an image of `size` that lie within `width` of any of points (..., 2) or between two."""
    least, most = points.flatten(0, -2).aminmax(dim=0)
    least, most = (least - width).floor().long().tolist(), (most + width).ceil().long().tolist()
    spans = (slice(max(low, 0), max(high + 1, 0)) for low, high in zip(least, most, strict=True))
    columns, rows = spans
    return rows, columns
