"""How training pictures of the judges are varied: turned, scaled, shifted, mirrored, and made worse."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rg.detectors import MIRROR
from rg.finder import crop, to_crops


def uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """(count,) numbers in [low, high)."""
    return torch.rand(count, generator=generator) * (high - low) + low


def jitter(count: int, generator: Generator, *, turn: float, zoom: float, shift: float) -> Tensor:
    """Random similarities, half of them mirrored, as matrices from output to input (see rg.finder.crop_matrices).

    Args:
        turn: largest angle. zoom: largest change of scale. shift: along each axis, in halves of the picture.
    """
    angle, scale = uniform(count, -turn, turn, generator), uniform(count, 1 - zoom, 1 + zoom, generator)
    side = 1 - 2 * (uniform(count, -1, 1, generator) < 0).float()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    x, y = (uniform(count, -shift, shift, generator) for _ in range(2))
    rows = (torch.stack([side * cosine, -side * sine, x], -1), torch.stack([sine, cosine, y], -1))
    return torch.stack(rows, 1)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that first does `inner`, then `outer`: (N, 2, 3) each."""
    product = outer[..., :2] @ inner
    product[..., 2] += outer[..., 2]
    return product


def is_mirrored(matrices: Tensor) -> Tensor:
    """Which of matrices (N, 2, 3) exchange left and right: (N,) bool."""
    return torch.linalg.det(matrices[..., :2]) < 0


def warp(images: Tensor, keypoints: Tensor, matrices: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Moves images (N, 3, H, W) and keypoints (N, P, 18, 3) to squares of `side` pixels, by matrices (N, 2, 3)."""
    size = (images.shape[-2], images.shape[-1])
    points = to_crops(keypoints[..., :2].flatten(1, 2), matrices, size, side).view_as(keypoints[..., :2])
    keypoints = torch.cat([points, keypoints[..., 2:]], -1)
    mirrored = is_mirrored(matrices)[:, None, None, None]
    return crop(images, matrices, side), torch.where(mirrored, keypoints[:, :, list(MIRROR)], keypoints)


def degrade(images: Tensor, generator: Generator, *, blur: float, light: float, offset: float, noise: float) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] with random sharpness, brightness and noise.

    Args:
        blur: largest weight of the mean of 3x3 pixels. light: largest change of contrast. offset: of brightness.
        noise: largest standard deviation.
    """
    weight, gain, shift, grain = (
        uniform(len(images), low, high, generator).view(-1, 1, 1, 1)
        for low, high in ((0, blur), (1 - light, 1 + light), (-offset, offset), (0, noise))
    )
    smooth = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(smooth, weight) * gain + shift
    return (images + grain * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
