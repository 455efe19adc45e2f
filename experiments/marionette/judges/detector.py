"""Trains the keypoint detector on renders: python -m experiments.marionette.judges.detector."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from experiments.marionette.judges.data import (
    Renders,
    compose,
    degrade,
    jitter,
    make_empty,
    make_renders,
    through_autoencoder,
    uniform,
    warp,
)
from experiments.marionette.judges.training import describe, train, write_card
from experiments.marionette.trainer import mixed_precision
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command
from rg.detectors.keypoints import CROP, MARGIN, PATCH, Detection, KeypointDetector, boxes_around, crop_matrices
from rg.io.images import from_bytes
from rg.metrics.keypoints import box_side, match_people, pck
from rg.points import Size, inside, rescale


def detection_loss(cells: Tensor, absent: Tensor, keypoints: Tensor, size: Size) -> Tensor:
    """Cross-entropy to the distribution over the four nearest cells whose mean is the keypoint; outside means absent.

    A hidden keypoint can only be guessed: it counts half.

    Args:
        cells: (B, 18, h, w) and absent: (B, 18), the detector's scores.
        keypoints: (B, 18, 3) of (x, y, visible) in pixels of an image of `size`; anywhere outside it: absent.
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

    return finish(train(detector, loss, backbone, settings, deadline), backbone, settings)


@command("experiments/marionette_detector")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()


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


def is_present(keypoints: Tensor) -> Tensor:
    """Which people (..., 18, 3) there are: (...) bool."""
    return (keypoints != 0).flatten(-2).any(-1)


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


ALPHAS = (0.05, 0.1, 0.2)
CHUNK = 100


class HeldOut(NamedTuple):
    """Renders of a split, (N, 3, H, W) uint8 each, and the keypoints of the people in those with people.

    one, two, portrait: (renders, renders through the autoencoder, keypoints (N, P, 18, 3)), P people in each image.
    """

    one: tuple[Tensor, Tensor, Tensor]
    two: tuple[Tensor, Tensor, Tensor]
    portrait: tuple[Tensor, Tensor, Tensor]
    empty: Tensor


def make_held_out(backbone: DiffusionBackbone, seed: int, split: str, count: int) -> HeldOut:
    """`count` renders of each kind, the same through the autoencoder, and as many images without a person."""
    side, kinds = backbone.resolution[0], []
    for kind in ("one", "two", "portrait"):
        renders, keypoints, *_ = make_renders(seed, split, count, side=side, kinds={kind: 1.0})
        people = 2 if kind == "two" else 1
        kinds.append((renders, through_autoencoder(renders, backbone), keypoints[:, :people]))
    return HeldOut(*kinds, make_empty(seed, split, kinds[0][0], backbone, Generator().manual_seed(seed)))


def detect(detector: KeypointDetector, images: Tensor, people: int, device: str) -> Detection:
    """What the detector finds in images (N, 3, H, W) uint8."""
    found = [detector.detect(from_bytes(chunk).to(device), people) for chunk in images.split(CHUNK)]
    return Detection(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))


def choose_threshold(people: Tensor, nobody: Tensor) -> float:
    """A score half-way between 99 % of the people and 99 % of what is nobody, that 99.5 % of the people reach.

    Args:
        people: (N,) scores of people.
        nobody: (M,) scores where there is nobody.
    """
    half_way = (people.quantile(0.01) + nobody.quantile(0.99)) / 2
    return round(min(half_way.item(), people.quantile(0.005).item()), 4)


def tune(detector: KeypointDetector, held_out: HeldOut, device: str) -> float:
    """The threshold for renders through the autoencoder; nobody is also who is found beside a single person."""
    one, two, portrait = (detect(detector, kind[1], 2, device).score for kind in held_out[:3])
    nobody = detect(detector, held_out.empty, 2, device).score
    people = torch.cat([one[:, 0], two.flatten(), portrait[:, 0]])
    return choose_threshold(people, torch.cat([one[:, 1], portrait[:, 1], nobody.flatten()]))


def accuracy(found: Detection, keypoints: Tensor, everything: bool) -> list[float]:
    """PCK at ALPHAS over the visible or all keypoints (N, P, 18, 3), a mean over people whatever their score."""
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    order = match_people(found.points, target, visible, torch.ones_like(found.present))
    points = found.points[torch.arange(len(order))[:, None], order]
    people = visible.any(-1)
    points, target, counted = points[people], target[people], (visible | everything)[people]
    shares = pck(points, target, counted, box_side(target, counted), ALPHAS)
    return [share.mean().item() for share in shares.T.contiguous()]


def accuracy_rows(detector: KeypointDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: PCK of one person's visible and all keypoints, and of two people's and portraits' visible."""
    lines = []
    kinds = (("one person", held_out.one), ("two people", held_out.two), ("portrait", held_out.portrait))
    for kind, (*versions, keypoints) in kinds:
        for made, images in zip(("renders", "through the autoencoder"), versions, strict=True):
            found = detect(detector, images, keypoints.shape[1], device)
            for counted in ("visible", "all") if kind == "one person" else ("visible",):
                cells = " | ".join(f"{value:.3f}" for value in accuracy(found, keypoints, counted == "all"))
                lines.append(f"| {kind}, {made} | {counted} | {cells} |")
    return "\n".join(lines)


def count_rows(detector: KeypointDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: how often as many people are found as there are, in renders and through the autoencoder."""
    lines = []
    kinds = (("one person", 1, held_out.one), ("two people", 2, held_out.two), ("portrait", 1, held_out.portrait))
    for name, people, versions in (*kinds, ("nobody", 0, (held_out.empty,))):
        found = [detect(detector, images, 2, device).present.sum(1) == people for images in versions[:2]]
        cells = [f"{right.float().mean():.1%}" for right in found]
        lines.append(f"| {name} | {' | '.join([*cells, '-'][:2])} |")
    return "\n".join(lines)


def model_card(detector: KeypointDetector, held_out: HeldOut, settings: dict[str, Any]) -> str:
    """The text beside the weights: what they are, the command that made them, and their measured quality."""
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return f"""# Keypoint detector

Finds people in a small image, and the 18 OpenPose keypoints of each: {parameters:,} parameters, half
precision. A first network gives boxes, a second one reads a pose from the crop around each. It judges the images of
an evaluation and is independent of the readout heads. Made by

    python -m experiments.marionette.judges.detector {describe(settings)}

Measured on {len(held_out.empty)} images of each kind that neither training nor the threshold has seen. The box of
PCK is that of the counted keypoints; a hidden keypoint can only be guessed. Two people are matched by distance.

| images | keypoints | {" | ".join(f"PCK@{alpha}" for alpha in ALPHAS)} |
|---|---|---|---|---|
{accuracy_rows(detector, held_out, settings["device"])}

A person of a score of {detector.threshold} or more counts as present. How often as many people are found as there
are; the images of nobody are backgrounds, shuffled tiles and noise:

| images | renders | through the autoencoder |
|---|---|---|
{count_rows(detector, held_out, settings["device"])}
"""


def finish(detector: KeypointDetector, backbone: DiffusionBackbone, settings: dict[str, Any]) -> str:
    """Chooses the threshold, writes weights and model card to settings["output"], and returns the card.

    The stored, half-precise weights are judged, not those in memory.
    """
    folder, device, seed = Path(settings["output"]), settings["device"], settings["seed"]
    detector.save_pretrained(folder)
    stored = KeypointDetector.from_pretrained(folder, device=device)
    stored.threshold = tune(stored, make_held_out(backbone, seed, "threshold", settings["held_out"]), device)
    card = model_card(stored, make_held_out(backbone, seed, "quality", settings["held_out"]), settings)
    stored.save_pretrained(folder)
    write_card(folder, card)
    return card
