"""Trains the second keypoint detector, a transformer: python -m experiments.marionette.judges.transformer."""

import math
from itertools import permutations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from experiments.marionette.judges.data import Renders, degrade, is_present, jitter, uniform, warp
from experiments.marionette.judges.detector import keypoint_targets
from experiments.marionette.judges.measure import About, finish
from experiments.marionette.judges.training import train
from experiments.marionette.trainer import mixed_precision
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command
from rg.detectors.transformer import PoseTransformer
from rg.io.images import from_bytes
from rg.points import Size

ABOUT = About(
    title="Pose transformer",
    module="experiments.marionette.judges.transformer",
    how="It sees the image at once and answers with a set of people, a query for each of their keypoints.",
)
JITTER = {"turn": 0.2, "zoom": 0.2, "shift": 0.2}
DEGRADATION = {"blur": 1.0, "light": 0.15, "offset": 0.15, "noise": 0.12}
COLOURS = 0.15  # standard deviation of what each channel takes of each
SMEAR = 0.8  # largest weight of the mean of 5x5 pixels, in half of the images
PRESENCE_WEIGHT = 1.0


class Batch(NamedTuple):
    """images: (B, 3, H, W) in [-1, 1]. keypoints: (B, P, 18, 3) in their pixels. present: (B, P) bool, who is there."""

    images: Tensor
    keypoints: Tensor
    present: Tensor


def recolour(images: Tensor, generator: Generator) -> Tensor:
    """Mixes the channels of images (N, 3, H, W) in [-1, 1] at random: no colour can be relied upon."""
    mixing = torch.eye(3) + COLOURS * torch.randn(len(images), 3, 3, generator=generator)
    return (mixing @ images.flatten(2)).view_as(images)


def smear(images: Tensor, generator: Generator) -> Tensor:
    """Blurs half of the images (N, 3, H, W) more than a pixel's neighbours can, as badly generated ones are."""
    weight = uniform(len(images), -SMEAR, SMEAR, generator).clamp_min(0).view(-1, 1, 1, 1)
    return images.lerp(F.avg_pool2d(images, 5, 1, 2, count_include_pad=False), weight)


def draw_batch(renders: Renders, empty: Tensor, size: int, generator: Generator) -> Batch:
    """A batch of `size` varied images, an eighth of them without a person."""
    people = size - size // 8
    chosen = torch.randint(len(renders.image), (people,), generator=generator)
    none = torch.randint(len(empty), (size - people,), generator=generator)
    images = from_bytes(torch.cat([renders.image[chosen], empty[none]]))
    keypoints = renders.keypoints[chosen]
    keypoints = torch.cat([keypoints, keypoints.new_zeros(size - people, *keypoints.shape[1:])])
    present = is_present(keypoints)
    images, keypoints = warp(images, keypoints, jitter(size, generator, **JITTER), images.shape[-1])
    return Batch(degrade(smear(recolour(images, generator), generator), generator, **DEGRADATION), keypoints, present)


def set_loss(cells: Tensor, absent: Tensor, present: Tensor, batch: Batch, size: Size) -> Tensor:
    """Cross-entropy of the people's keypoints and of the queries' presence, under the matching that makes it smallest.

    Args:
        cells: (B, Q, 18, h, w), absent: (B, Q, 18) and present: (B, Q), the network's logits.
        batch: P <= Q people in each image.
        size: of the images.
    """
    device = cells.device
    target, weight = (x.to(device) for x in keypoint_targets(batch.keypoints, size, tuple(cells.shape[-2:])))
    there = batch.present.to(device)
    logs = torch.cat([cells.flatten(3), absent[..., None]], -1).float().log_softmax(-1)
    weighted = (target * weight[..., None]).flatten(2) / target.shape[2]
    poses = -(weighted @ logs.flatten(2).mT) * there[..., None]  # (B, P, Q)
    found, missed = F.softplus(-present.float()), F.softplus(present.float())
    costs = poses + PRESENCE_WEIGHT * (found - missed)[:, None] * there[..., None]
    orders = torch.tensor(list(permutations(range(cells.shape[1]), there.shape[1])), device=device)
    rows = torch.arange(there.shape[1], device=device)
    best = costs.detach()[:, rows, orders].sum(-1).argmin(-1)
    order = orders[best]  # (B, P)
    taken = torch.zeros_like(found).scatter_add_(1, order, there.float())
    pose = poses.gather(2, order[..., None]).sum() / there.sum().clamp_min(1)
    return pose + PRESENCE_WEIGHT * torch.where(taken > 0, found, missed).mean()


def run(settings: dict[str, Any], deadline: float = math.inf) -> str:
    """Trains, measures, writes weights and model card and returns the card.

    Args:
        settings: as of conf/experiments/marionette_transformer.yaml.
        deadline: see experiments.marionette.judges.training.train; the same call without it takes the training up.
    """
    device = torch.device(settings["device"])
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    torch.manual_seed(settings["seed"])
    architecture = {name: settings[name] for name in ("widths", "encoder_layers", "decoder_layers", "people")}
    network = PoseTransformer(**architecture, threshold=0.5).to(device)

    def loss(network: PoseTransformer, renders: Renders, empty: Tensor, generator: Generator) -> Tensor:
        batch = draw_batch(renders, empty, settings["batch_size"], generator)
        with mixed_precision(device):
            cells, absent, present = network(batch.images.to(device))
        return set_loss(cells, absent, present, batch, (batch.images.shape[-2], batch.images.shape[-1]))

    return finish(train(network, loss, backbone, settings, deadline), ABOUT, backbone, settings)


@command("experiments/marionette_transformer")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()
