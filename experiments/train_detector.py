"""Trains the keypoint detector on renders, plain and through the autoencoder: python -m experiments.train_detector."""

from typing import Any

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from experiments.detector_pictures import draw_batch
from experiments.detector_quality import finish
from experiments.judge_pictures import Pictures
from experiments.judge_training import train
from experiments.marionette.mixed_precision import mixed_precision
from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.finder import PATCH
from rg.points import Size, inside, rescale


def detection_loss(cells: Tensor, absent: Tensor, keypoints: Tensor, size: Size) -> Tensor:
    """Cross-entropy to the distribution over the four nearest cells whose mean is the keypoint; outside means absent.

    A hidden keypoint can only be guessed: it counts half.

    Args:
        cells: (B, 18, h, w) and absent: (B, 18), the detector's scores.
        keypoints: (B, 18, 3) of (x, y, visible) in pixels of a picture of `size`; anywhere outside it: absent.
    """
    h, w = cells.shape[-2:]
    here = inside(keypoints[..., :2], size)
    x, y = rescale(keypoints[..., :2], size, (h, w)).unbind(-1)
    columns = (1 - (torch.arange(w) - x.clamp(0, w - 1)[..., None]).abs()).clamp_min(0)
    rows = (1 - (torch.arange(h) - y.clamp(0, h - 1)[..., None]).abs()).clamp_min(0)
    target = (rows[..., :, None] * columns[..., None, :]).flatten(2) * here[..., None]
    target = torch.cat([target, 1 - here[..., None].float()], -1).to(cells.device)
    logs = torch.cat([cells.flatten(2), absent[..., None]], -1).float().log_softmax(-1)
    weight = torch.where(here & (keypoints[..., 2] == 0), 0.5, 1.0).to(cells.device)
    return (weight * -(target * logs).sum(-1)).mean()


def finder_loss(scores: Tensor, boxes: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """The losses of Zhou et al. (2019): a focal loss of the centres, eq. 1, and errors of the boxes near them.

    Args:
        scores: (B, h, w) logits and boxes: (B, h, w, 4) in pixels, of the finder's cells.
        target: (B, P, 4) boxes in pixels. present: (B, P) bool, which of them there are.
    """
    h, w = scores.shape[1:]
    cells = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1)
    centre = rescale(target[..., :2], (h * PATCH, w * PATCH), (h, w))
    centre = torch.minimum(centre.round(), torch.tensor([w - 1, h - 1])).clamp_min(0)
    offset = cells - centre[:, :, None, None]  # (B, P, h, w, 2)
    spread = (target[..., 2:] / PATCH / 6).clamp_min(0.7)[:, :, None, None]
    bumps = (-((offset / spread) ** 2).sum(-1) / 2).exp() * present[..., None, None]
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


def run(settings: dict[str, Any]) -> str:
    """Trains, measures, writes weights and model card and returns the card; settings as of conf/train_detector.yaml."""
    device = torch.device(settings["device"])
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    torch.manual_seed(settings["seed"])
    detector = KeypointDetector(widths=settings["widths"], finder_widths=settings["finder_widths"], threshold=0.5).to(
        device
    )

    def loss(network: KeypointDetector, pictures: Pictures, empty: Tensor, generator: Generator) -> Tensor:
        batch = draw_batch(pictures, empty, settings["batch_size"], generator)
        with mixed_precision(device):
            cells, absent = network(batch.crops.to(device))
            scores, boxes = network.finder(batch.images.to(device))
        size = (batch.crops.shape[-2], batch.crops.shape[-1])
        poses = detection_loss(cells, absent, batch.keypoints, size)
        return poses + finder_loss(scores, boxes, batch.boxes, batch.present)

    return finish(train(detector, loss, backbone, settings), backbone, settings)


@hydra.main(config_path="../conf", config_name="train_detector", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()
