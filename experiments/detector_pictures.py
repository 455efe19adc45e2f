"""Batches for the keypoint detector: whole pictures with the boxes of their people, and crops with keypoints."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from experiments.augmentation import compose, degrade, jitter, uniform, warp
from experiments.judge_pictures import Pictures, from_bytes
from experiments.judge_pictures import to_bytes as to_bytes
from rg.detectors import CROP
from rg.finder import MARGIN, boxes_around, crop_matrices

JITTER = {"turn": 0.15, "zoom": 0.15, "shift": 0.2}
CROP_JITTER = {"turn": 0.15, "zoom": 0.15, "shift": 0.12}  # more than the finder's own errors
WORSE = {"blur": 1.0, "light": 0.2, "offset": 0.15, "noise": 0.1}
OUTSIDE = -1e4  # where the keypoints of nobody are


class Batch(NamedTuple):
    """What both parts of the detector learn from in one step.

    images: (B, 3, H, W) in [-1, 1]. boxes: (B, P, 4) of their people in pixels. present: (B, P) bool, whose box counts.
    crops: (B, 3, CROP, CROP), one person each or nobody. keypoints: (B, 18, 3) in pixels of the crops.
    """

    images: Tensor
    boxes: Tensor
    present: Tensor
    crops: Tensor
    keypoints: Tensor


def is_present(keypoints: Tensor) -> Tensor:
    """Which people (..., 18, 3) there are: (...) bool."""
    return (keypoints != 0).flatten(-2).any(-1)


def draw_batch(pictures: Pictures, empty: Tensor, size: int, generator: Generator) -> Batch:
    """A batch of `size` pictures, an eighth of them of `empty` (M, 3, H, W) uint8, where nobody is."""
    chosen = torch.randint(len(pictures.image), (size - size // 8,), generator=generator)
    nobody = torch.randint(len(empty), (size // 8,), generator=generator)
    images = from_bytes(torch.cat([pictures.image[chosen], empty[nobody]]))
    keypoints = pictures.keypoints[chosen]
    keypoints = torch.cat([keypoints, keypoints.new_zeros(len(nobody), *keypoints.shape[1:])])
    present, side = is_present(keypoints), images.shape[-1]

    # Of each picture one person is cut out; where nobody is, any square.
    person = (torch.rand(present.shape, generator=generator) * present).argmax(1)
    single = keypoints[torch.arange(size), person]
    boxes = boxes_around(single, (side, side))
    place = torch.stack([uniform(size, 0, side, generator) for _ in range(2)], -1)
    sides = uniform(size, 0.4, 1.0, generator) * side / MARGIN
    anywhere = torch.cat([place, sides[:, None].expand(-1, 2)], -1)
    boxes = torch.where(present.any(1)[:, None], boxes, anywhere)
    matrices = compose(crop_matrices(boxes, (side, side)), jitter(size, generator, **CROP_JITTER))
    crops, joints = warp(images, single[:, None], matrices, CROP)
    joints[~present.any(1)] = OUTSIDE

    whole, moved = warp(images, keypoints, jitter(size, generator, **JITTER), side)
    return Batch(
        degrade(whole, generator, **WORSE),
        boxes_around(moved, (side, side)),
        present,
        degrade(crops, generator, **WORSE),
        joints[:, 0],
    )
