"""How well a keypoint detector does on pictures that it has not seen, from which score on a person is there."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from experiments.judge_pictures import from_bytes, make_empty, render_pictures, through_autoencoder
from experiments.judge_training import describe, write_card
from rg.backbone import DiffusionBackbone
from rg.detectors import Detection, KeypointDetector
from rg.metrics import box_side, match_people, pck

ALPHAS = (0.05, 0.1, 0.2)
CHUNK = 100


class HeldOut(NamedTuple):
    """Pictures of a split, (N, 3, H, W) uint8 each, and the keypoints of the people in those with people.

    one, two, portrait: (renders, renders through the autoencoder, keypoints (N, P, 18, 3)), P people in each picture.
    """

    one: tuple[Tensor, Tensor, Tensor]
    two: tuple[Tensor, Tensor, Tensor]
    portrait: tuple[Tensor, Tensor, Tensor]
    empty: Tensor


def make_held_out(backbone: DiffusionBackbone, seed: int, split: str, count: int) -> HeldOut:
    """`count` renders of each kind, the same through the autoencoder, and as many pictures without a person."""
    side, kinds = backbone.resolution[0], []
    for kind in ("one", "two", "portrait"):
        renders, keypoints, *_ = render_pictures(seed, split, count, side=side, kinds={kind: 1.0})
        people = 2 if kind == "two" else 1
        kinds.append((renders, through_autoencoder(renders, backbone), keypoints[:, :people]))
    return HeldOut(*kinds, make_empty(seed, split, kinds[0][0], backbone, Generator().manual_seed(seed)))


def detect(detector: KeypointDetector, images: Tensor, people: int, device: str) -> Detection:
    """The detector's word on images (N, 3, H, W) uint8."""
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
    return [pck(points, target, counted, box_side(target, counted), alpha).mean().item() for alpha in ALPHAS]


def accuracy_rows(detector: KeypointDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: PCK of one person's visible and all keypoints, and of two people's and portraits' visible."""
    lines = []
    kinds = (("one person", held_out.one), ("two people", held_out.two), ("portrait", held_out.portrait))
    for kind, (*pictures, keypoints) in kinds:
        for made, images in zip(("renders", "through the autoencoder"), pictures, strict=True):
            found = detect(detector, images, keypoints.shape[1], device)
            for counted in ("visible", "all") if kind == "one person" else ("visible",):
                cells = " | ".join(f"{value:.3f}" for value in accuracy(found, keypoints, counted == "all"))
                lines.append(f"| {kind}, {made} | {counted} | {cells} |")
    return "\n".join(lines)


def count_rows(detector: KeypointDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: how often as many people are found as there are, in renders and through the autoencoder."""
    lines = []
    kinds = (("one person", 1, held_out.one), ("two people", 2, held_out.two), ("portrait", 1, held_out.portrait))
    for name, people, pictures in (*kinds, ("nobody", 0, (held_out.empty,))):
        found = [detect(detector, images, 2, device).present.sum(1) == people for images in pictures[:2]]
        cells = [f"{right.float().mean():.1%}" for right in found]
        lines.append(f"| {name} | {' | '.join([*cells, '-'][:2])} |")
    return "\n".join(lines)


def model_card(detector: KeypointDetector, held_out: HeldOut, settings: dict[str, Any]) -> str:
    """The text beside the weights: what they are, the command that made them, and their measured quality."""
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return f"""# Keypoint detector

Finds people in a small picture, and the 18 OpenPose keypoints of each: {parameters:,} parameters, half
precision. A first network gives boxes, a second one reads a pose from the crop around each. It judges the pictures of
an evaluation and is independent of the readout heads. Made by

    python -m experiments.train_detector {describe(settings)}

Measured on {len(held_out.empty)} pictures of each kind that neither training nor the threshold has seen. The box of
PCK is that of the counted keypoints; a hidden keypoint can only be guessed. Two people are matched by distance.

| pictures | keypoints | {" | ".join(f"PCK@{alpha}" for alpha in ALPHAS)} |
|---|---|---|---|---|
{accuracy_rows(detector, held_out, settings["device"])}

A person of a score of {detector.threshold} or more counts as present. How often as many people are found as there
are; the pictures of nobody are backgrounds, shuffled tiles and noise:

| pictures | renders | through the autoencoder |
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
