"""How well a keypoint detector does on pictures that it has not seen, from which confidence on a person is there."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from experiments.detector_pictures import from_bytes, make_empty, render_people, through_autoencoder
from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.metrics import box_side, pck

ALPHAS = (0.05, 0.1, 0.2)
CHUNK = 250


class HeldOut(NamedTuple):
    """Pictures of a split, (N, 3, H, W) uint8 each, and the keypoints (N, 18, 3) of the one person in the first two."""

    renders: Tensor
    decoded: Tensor
    empty: Tensor
    keypoints: Tensor


def make_held_out(backbone: DiffusionBackbone, seed: int, split: str, count: int) -> HeldOut:
    """Renders of one person, the same through the autoencoder, and as many pictures without a person."""
    generator = Generator().manual_seed(seed)
    renders, keypoints = render_people(seed, split, count, side=backbone.resolution[0], kinds={"one": 1.0})
    decoded = through_autoencoder(renders, backbone, generator)
    return HeldOut(renders, decoded, make_empty(seed, split, renders, backbone, generator), keypoints)


def confidences(detector: KeypointDetector, images: Tensor, device: str) -> Tensor:
    """Mean confidence over the keypoints of images (N, 3, H, W) uint8: (N,)."""
    chunks = images.split(CHUNK)
    return torch.cat([detector.detect(from_bytes(chunk).to(device)).confidence.mean(1).cpu() for chunk in chunks])


def choose_threshold(people: Tensor, empty: Tensor) -> float:
    """A confidence half-way between 99 % of the people and 99 % of the empty pictures, that 99.5 % of the people reach.

    Args:
        people: (N,) mean confidences on pictures with a person.
        empty: (M,) the same on pictures without one.
    """
    half_way = (people.quantile(0.01) + empty.quantile(0.99)) / 2
    return round(min(half_way.item(), people.quantile(0.005).item()), 4)


def accuracy(detector: KeypointDetector, images: Tensor, keypoints: Tensor, device: str) -> dict[str, list[float]]:
    """PCK at ALPHAS over the visible and over all keypoints (N, 18, 3) of images (N, 3, H, W) uint8."""
    found = torch.cat([detector.detect(from_bytes(chunk).to(device)).points.cpu() for chunk in images.split(CHUNK)])
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    return {
        name: [pck(found, target, counted, box_side(target, counted), alpha).mean().item() for alpha in ALPHAS]
        for name, counted in (("visible", visible), ("all", torch.ones_like(visible)))
    }


def model_card(detector: KeypointDetector, held_out: HeldOut, settings: dict[str, Any]) -> str:
    """The text beside the weights: what they are, the command that made them, and their measured quality."""
    shown = {key: value for key, value in settings.items() if key not in ("output", "checkpoint")}
    command = (f"{key}={value}".replace(" ", "") for key, value in shown.items())
    device, lines = settings["device"], []
    for name, images in (("renders", held_out.renders), ("renders through the autoencoder", held_out.decoded)):
        for counted, values in accuracy(detector, images, held_out.keypoints, device).items():
            lines.append(f"| {name} | {counted} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    found = [
        (confidences(detector, images, device) >= detector.threshold).float().mean().item() for images in held_out[:3]
    ]
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return f"""# Keypoint detector

Finds the 18 OpenPose keypoints of one person in a small picture, and whether there is one: {parameters:,}
parameters, half precision. It judges the pictures of an evaluation and is independent of the readout heads. Made by

    python -m experiments.train_detector {" ".join(command)}

Measured on {len(held_out.renders)} pictures of one person that neither training nor the threshold has seen. The box
of PCK is that of the counted keypoints; a hidden keypoint can only be guessed.

| pictures | keypoints | {" | ".join(f"PCK@{alpha}" for alpha in ALPHAS)} |
|---|---|---|---|---|
{chr(10).join(lines)}

A person is found (mean confidence of {detector.threshold} or more) in {found[0]:.1%} of the renders, {found[1]:.1%} of
the renders through the autoencoder, {found[2]:.1%} of the pictures without one (backgrounds, shuffled tiles, noise).
"""


def finish(detector: KeypointDetector, backbone: DiffusionBackbone, settings: dict[str, Any]) -> str:
    """Chooses the threshold, writes weights and model card to settings["output"], and returns the card.

    The stored, half-precise weights are judged, not those in memory.
    """
    folder = Path(settings["output"])
    detector.save_pretrained(folder)
    stored = KeypointDetector.from_pretrained(folder, device=settings["device"])
    tuning = make_held_out(backbone, settings["seed"], "threshold", settings["held_out"])
    people, empty = (confidences(stored, images, settings["device"]) for images in (tuning.decoded, tuning.empty))
    stored.threshold = choose_threshold(people, empty)
    card = model_card(stored, make_held_out(backbone, settings["seed"], "quality", settings["held_out"]), settings)
    stored.save_pretrained(folder)
    partial = folder / "README.md.partial"
    partial.write_text(card)
    partial.replace(folder / "README.md")
    return card
