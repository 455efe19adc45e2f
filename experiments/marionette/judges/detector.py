"""Trains the keypoint detector on renders: python -m experiments.marionette.judges.detector."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from experiments.marionette.judges.data import (
    Renders,
    compose,
    degrade,
    is_present,
    jitter,
    uniform,
    warp,
)
from experiments.marionette.judges.measure import About, finish
from experiments.marionette.judges.training import train
from experiments.marionette.trainer import mixed_precision
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command
from rg.detectors.keypoints import CROP, MARGIN, PATCH, KeypointDetector, boxes_around, crop_matrices
from rg.io.images import from_bytes
from rg.points import Size, inside, rescale


def keypoint_targets(keypoints: Tensor, size: Size, grid: Size) -> tuple[Tensor, Tensor]:
    """Distributions over the four nearest cells whose mean is the keypoint, the last entry for absence, and weights.

    A hidden keypoint can only be guessed: it counts half.

    Args:
        keypoints: (..., 18, 3) of (x, y, visible) in pixels of an image of `size`; anywhere outside it: absent.
        grid: rows and columns of cells, h and w.

    Returns:
        (..., 18, h * w + 1) that sum to 1, and (..., 18).
    """
    h, w = grid
    here = inside(keypoints[..., :2], size)
    x, y = rescale(keypoints[..., :2], size, grid).unbind(-1)
    columns = (1 - (torch.arange(w) - x.clamp(0, w - 1)[..., None]).abs()).clamp_min(0)
    rows = (1 - (torch.arange(h) - y.clamp(0, h - 1)[..., None]).abs()).clamp_min(0)
    target = (rows[..., :, None] * columns[..., None, :]).flatten(-2) * here[..., None]
    target = torch.cat([target, 1 - here[..., None].float()], -1)
    return target, torch.where(here & (keypoints[..., 2] == 0), 0.5, 1.0)


def detection_loss(cells: Tensor, absent: Tensor, keypoints: Tensor, size: Size) -> Tensor:
    """Cross-entropy to `keypoint_targets`.

    Args:
        cells: (B, 18, h, w) and absent: (B, 18), the detector's scores.
        keypoints: (B, 18, 3) of (x, y, visible) in pixels of an image of `size`; anywhere outside it: absent.
    """
    targets = keypoint_targets(keypoints, size, (cells.shape[-2], cells.shape[-1]))
    target, weight = (x.to(cells.device) for x in targets)
    logs = torch.cat([cells.flatten(2), absent[..., None]], -1).float().log_softmax(-1)
    return (weight * -(target * logs).sum(-1)).mean()


def person_loss(scores: Tensor, boxes: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """The losses of Zhou et al. (2019): a focal loss of the centres, eq. 1, and errors of the boxes near them.

    Args:
        scores: (B, h, w) logits and boxes: (B, h, w, 4) in pixels, of the cells of the person detector.
        target: (B, P, 4) boxes in pixels. present: (B, P) bool, which of them there are.
    """
    h, w = scores.shape[1:]
    cells = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1)
    centre = rescale(target[..., :2], (h * PATCH, w * PATCH), (h, w))
    centre = torch.minimum(centre.round(), torch.tensor([w - 1, h - 1])).clamp_min(0)
    offset = cells - centre[:, :, None, None]  # (B, P, h, w, 2)
    std = (target[..., 2:] / PATCH / 6).clamp_min(0.7)[:, :, None, None]
    bumps = (-((offset / std) ** 2).sum(-1) / 2).exp() * present[..., None, None]
    heat, owner = (x.to(scores.device) for x in bumps.max(1))
    hit = heat == 1
    found, missed = F.logsigmoid(scores), F.logsigmoid(-scores)
    sure = scores.sigmoid()
    focal = torch.where(hit, (1 - sure) ** 2 * found, (1 - heat) ** 4 * sure**2 * missed)

    near = ((offset.abs().amax(-1) <= 1) & present[..., None, None]).to(scores.device)
    near = near.gather(1, owner[:, None])[:, 0]
    target = torch.cat([target[..., :2], target[..., 2:].clamp_min(2)], -1).to(scores.device)
    goal = target.gather(1, owner.flatten(1)[..., None].expand(-1, -1, 4)).unflatten(1, (h, w))
    error = (boxes[..., :2] - goal[..., :2]).abs() / goal[..., 2:].amax(-1, keepdim=True)
    error = (error + (boxes[..., 2:] / goal[..., 2:]).log().abs()).sum(-1)
    return -focal.sum() / hit.sum().clamp_min(1) + (error * near).sum() / near.sum().clamp_min(1)


def run(settings: dict[str, Any], deadline: float = math.inf) -> str:
    """Trains, measures, writes weights and model card and returns the card.

    Args:
        settings: as of conf/experiments/marionette_detector.yaml.
        deadline: see experiments.marionette.judges.training.train; the same call without it takes the training up.
    """
    device = torch.device(settings["device"])
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    torch.manual_seed(settings["seed"])
    detector = KeypointDetector(widths=settings["widths"], finder_widths=settings["finder_widths"], threshold=0.5).to(
        device
    )

    def loss(network: KeypointDetector, images: Renders, empty: Tensor, generator: Generator) -> Tensor:
        batch = draw_batch(images, empty, settings["batch_size"], generator)
        with mixed_precision(device):
            cells, absent = network(batch.crops.to(device))
            scores, boxes = network.finder(batch.images.to(device))
        size = (batch.crops.shape[-2], batch.crops.shape[-1])
        poses = detection_loss(cells, absent, batch.keypoints, size)
        return poses + person_loss(scores, boxes, batch.boxes, batch.present)

    return finish(train(detector, loss, backbone, settings, deadline), ABOUT, backbone, settings)


@command("experiments/marionette_detector")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()


ABOUT = About(
    title="Keypoint detector",
    module="experiments.marionette.judges.detector",
    how="A first network gives boxes, a second one reads a pose from the crop around each.",
)
JITTER = {"turn": 0.15, "zoom": 0.15, "shift": 0.2}
CROP_JITTER = {"turn": 0.15, "zoom": 0.15, "shift": 0.12}  # more than the errors of the found boxes
DEGRADATION = {"blur": 1.0, "light": 0.2, "offset": 0.15, "noise": 0.1}
OUTSIDE = -1e4  # coordinates of the keypoints of an absent person


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


def draw_batch(renders: Renders, empty: Tensor, size: int, generator: Generator) -> Batch:
    """A batch of `size` renders, an eighth of them of `empty` (M, 3, H, W) uint8, where nobody is."""
    chosen = torch.randint(len(renders.image), (size - size // 8,), generator=generator)
    nobody = torch.randint(len(empty), (size // 8,), generator=generator)
    images = from_bytes(torch.cat([renders.image[chosen], empty[nobody]]))
    keypoints = renders.keypoints[chosen]
    keypoints = torch.cat([keypoints, keypoints.new_zeros(len(nobody), *keypoints.shape[1:])])
    present, side = is_present(keypoints), images.shape[-1]

    # Of each image one person is cut out; where nobody is, any square.
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
        degrade(whole, generator, **DEGRADATION),
        boxes_around(moved, (side, side)),
        present,
        degrade(crops, generator, **DEGRADATION),
        joints[:, 0],
    )
