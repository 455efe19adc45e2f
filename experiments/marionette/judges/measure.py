"""How well the networks that find people do: on held-out renders, and how far they agree with each other."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from experiments.marionette.judges.data import make_empty, make_renders, through_autoencoder
from experiments.marionette.judges.training import describe, write_card
from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.detection import Detection
from rg.detectors.keypoints import KeypointDetector
from rg.detectors.transformer import PoseTransformer
from rg.io.images import from_bytes
from rg.metrics.keypoints import box_side, is_correct, match_people, pck

PoseDetector = KeypointDetector | PoseTransformer
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


def detect(detector: PoseDetector, images: Tensor, people: int, device: str) -> Detection:
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


def tune(detector: PoseDetector, held_out: HeldOut, device: str) -> float:
    """The threshold for renders through the autoencoder; nobody is also who is found beside a single person."""
    one, two, portrait = (detect(detector, kind[1], 2, device).score for kind in held_out[:3])
    nobody = detect(detector, held_out.empty, 2, device).score
    people = torch.cat([one[:, 0], two.flatten(), portrait[:, 0]])
    return choose_threshold(people, torch.cat([one[:, 1], portrait[:, 1], nobody.flatten()]))


def matched(found: Detection, keypoints: Tensor) -> Tensor:
    """The poses (N, P, 18, 2) that belong to the people of keypoints (N, P, 18, 3), whatever their score."""
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    order = match_people(found.points, target, visible, torch.ones_like(found.present))
    return found.points[torch.arange(len(order))[:, None], order]


def accuracy(found: Detection, keypoints: Tensor, everything: bool) -> list[float]:
    """PCK at ALPHAS over the visible or all keypoints (N, P, 18, 3), a mean over people whatever their score."""
    visible = keypoints[..., 2] > 0
    people = visible.any(-1)
    points, target, counted = (
        matched(found, keypoints)[people],
        keypoints[people][..., :2],
        (visible | everything)[people],
    )
    shares = pck(points, target, counted, box_side(target, counted), ALPHAS)
    return [share.mean().item() for share in shares.T.contiguous()]


def agreement(one: Detection, other: Detection, keypoints: Tensor, alpha: float) -> tuple[float, float, float, float]:
    """Of the visible keypoints: shares that both, neither, or one alone has right within alpha, and pixels apart."""
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    people = visible.any(-1)
    target, visible = target[people], visible[people]
    poses = [matched(found, keypoints)[people] for found in (one, other)]
    size = box_side(target, visible)
    first, second = (is_correct(points, target, size, [alpha])[visible][:, 0] for points in poses)
    apart = (poses[0] - poses[1]).norm(dim=-1)[visible]
    shares = (first & second, ~first & ~second, first ^ second, apart)
    return tuple(values.float().mean().item() for values in shares)


def accuracy_rows(detector: PoseDetector, held_out: HeldOut, device: str) -> str:
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


def count_rows(detector: PoseDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: how often as many people are found as there are, in renders and through the autoencoder."""
    lines = []
    kinds = (("one person", 1, held_out.one), ("two people", 2, held_out.two), ("portrait", 1, held_out.portrait))
    for name, people, versions in (*kinds, ("nobody", 0, (held_out.empty,))):
        found = [detect(detector, images, 2, device).present.sum(1) == people for images in versions[:2]]
        cells = [f"{right.float().mean():.1%}" for right in found]
        lines.append(f"| {name} | {' | '.join([*cells, '-'][:2])} |")
    return "\n".join(lines)


def agreement_rows(detector: PoseDetector, other: PoseDetector, held_out: HeldOut, device: str) -> str:
    """Rows of a table: how far two detectors agree on the people of each kind, through the autoencoder."""
    lines = []
    for kind, (_, images, keypoints) in zip(("one person", "two people", "portrait"), held_out[:3], strict=True):
        found = [detect(one, images, keypoints.shape[1], device) for one in (detector, other)]
        *shares, apart = agreement(*found, keypoints, ALPHAS[1])
        lines.append(f"| {kind} | {' | '.join(f'{share:.1%}' for share in shares)} | {apart:.2f} |")
    return "\n".join(lines)


class About(NamedTuple):
    """What a model card says of a detector: its title, the module that trains it, and in a sentence how it works."""

    title: str
    module: str
    how: str


def model_card(
    detector: PoseDetector, about: About, held_out: HeldOut, settings: dict[str, Any], other: PoseDetector | None
) -> str:
    """The text beside the weights: what they are, the command that made them, and their measured quality."""
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    device = settings["device"]
    text = f"""# {about.title}

Finds people in a small image, and the 18 OpenPose keypoints of each: {parameters:,} parameters, half
precision. {about.how}
It judges the images of an evaluation and is independent of the readout heads. Made by

    python -m {about.module} {describe(settings)}

Measured on {len(held_out.empty)} images of each kind that neither training nor the threshold has seen. The box of
PCK is that of the counted keypoints; a hidden keypoint can only be guessed. Two people are matched by distance.

| images | keypoints | {" | ".join(f"PCK@{alpha}" for alpha in ALPHAS)} |
|---|---|---|---|---|
{accuracy_rows(detector, held_out, device)}

A person of a score of {detector.threshold} or more counts as present. How often as many people are found as there
are; the images of nobody are backgrounds, shuffled tiles and noise:

| images | renders | through the autoencoder |
|---|---|---|
{count_rows(detector, held_out, device)}
"""
    if other is None:
        return text
    return f"""{text}
The detector `{settings["other"]}` saw the same images, through the autoencoder. Shares of the visible keypoints within
{ALPHAS[1]} of the box, and how far apart the two put a keypoint:

| images | both right | both wrong | one right | pixels apart |
|---|---|---|---|---|
{agreement_rows(detector, other, held_out, device)}

Its own PCK there:

| images | keypoints | {" | ".join(f"PCK@{alpha}" for alpha in ALPHAS)} |
|---|---|---|---|---|
{accuracy_rows(other, held_out, device)}
"""


def finish(detector: PoseDetector, about: About, backbone: DiffusionBackbone, settings: dict[str, Any]) -> str:
    """Chooses the threshold, writes weights and model card to settings["output"], and returns the card.

    The stored, half-precise weights are judged, not those in memory; beside them those of settings["other"], a
    KeypointDetector, where that is given.
    """
    folder, device, seed = Path(settings["output"]), settings["device"], settings["seed"]
    detector.save_pretrained(folder)
    stored = type(detector).from_pretrained(folder, device=device)
    stored.threshold = tune(stored, make_held_out(backbone, seed, "threshold", settings["held_out"]), device)
    name = settings.get("other")
    other = None if name is None else KeypointDetector.from_pretrained(name, device=device)
    held_out = make_held_out(backbone, seed, "quality", settings["held_out"])
    card = model_card(stored, about, held_out, settings, other)
    stored.save_pretrained(folder)
    write_card(folder, card)
    return card
