"""Images cropped to their centre square, and what goes with them moved alike."""

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rg.points import Size, inside, rescale


def crop_box(size: Size) -> tuple[int, int, int]:
    """Left, top and side of the centre square of an image of `size`, whole pixels; side = min(height, width)."""
    side = min(size)
    return (size[1] - side) // 2, (size[0] - side) // 2, side


def crop_image(image: Image.Image, resolution: int) -> Tensor:
    """The centre square, resized by area: (3, resolution, resolution) uint8."""
    left, top, side = crop_box((image.height, image.width))
    square = np.asarray(image)[top : top + side, left : left + side]
    resized = cv2.resize(square, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(resized).permute(2, 0, 1)


def crop_points(keypoints: Tensor, size: Size, resolution: int) -> Tensor:
    """Moves keypoints (P, K, 3) of an image of `size` as `crop_image` moves it; outside, they are not visible."""
    left, top, side = crop_box(size)
    points = rescale(keypoints[..., :2] - keypoints.new_tensor([left, top]), (side, side), (resolution, resolution))
    visible = keypoints[..., 2] * inside(points, (resolution, resolution))
    return torch.cat([points, visible[..., None]], -1)
