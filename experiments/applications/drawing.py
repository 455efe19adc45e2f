"""Arrows and boxes on enlarged images: what was asked for is seen in what came out."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rg.io.images import from_bytes, to_bytes
from rg.points import rescale

SCALE = 4
INK = (255, 255, 0)


def _canvases(images: Tensor) -> list[np.ndarray]:
    """Images (N, 3, H, W) in [0, 1] as (4 H, 4 W, 3) bytes, every pixel as large as four by four."""
    large = F.interpolate(images, scale_factor=SCALE, mode="nearest")
    return [np.ascontiguousarray(to_bytes(image * 2 - 1).permute(1, 2, 0).numpy()) for image in large]


def _images(canvases: list[np.ndarray]) -> Tensor:
    return (torch.stack([from_bytes(torch.from_numpy(one).permute(2, 0, 1)) for one in canvases]) + 1) / 2


def draw_arrows(images: Tensor, sources: Tensor, destinations: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], four times as large, with arrows between places (N or more, 2) in pixels."""
    size, canvases = images.shape[-2:], _canvases(images)
    large = (SCALE * size[0], SCALE * size[1])
    for canvas, *ends in zip(canvases, sources, destinations, strict=False):
        start, end = (tuple(int(v) for v in rescale(p, size, large).round().tolist()) for p in ends)
        for ink, width in (((0, 0, 0), 4), (INK, 2)):
            cv2.arrowedLine(canvas, start, end, ink, width, cv2.LINE_AA, tipLength=0.3)
    return _images(canvases)


def draw_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], four times as large, with boxes (N or more, 4) in pixels, ends exclusive."""
    canvases = _canvases(images)
    for canvas, box in zip(canvases, boxes, strict=False):
        left, top, right, bottom = (round(SCALE * value) for value in box.tolist())
        for ink, width in (((0, 0, 0), 4), (INK, 2)):
            cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), ink, width)
    return _images(canvases)
