"""Trains the attribute classifier, on renders as the detector: python -m experiments.marionette.judges.classifier."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from data_prep.marionette.scene import KINDS
from data_prep.marionette.stage import LABELS
from data_prep.marionette.vocabulary import ATTRIBUTES
from experiments.marionette.judges.data import (
    SECOND_PERSON,
    Renders,
    degrade,
    is_mirrored,
    jitter,
    make_renders,
    through_autoencoder,
    warp,
)
from experiments.marionette.judges.training import describe, train, write_card
from experiments.marionette.trainer import mixed_precision
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command
from rg.detectors.attributes import PATCH, SECOND, AttributeClassifier
from rg.detectors.keypoints import crop
from rg.io.images import from_bytes

JITTER = {"turn": 0.1, "zoom": 0.1, "shift": 0.1}
DEGRADATION = {"blur": 0.5, "light": 0.1, "offset": 0.05, "noise": 0.06}
CHUNK = 100
NAMES = list(ATTRIBUTES)
# The attribute that each one becomes when an image of two people is mirrored: they change places.
_PARTNERS = [name.removeprefix(SECOND) if name.startswith(SECOND) else SECOND + name for name in NAMES]
MIRROR = [NAMES.index(partner if partner in NAMES else name) for name, partner in zip(NAMES, _PARTNERS, strict=True)]
# The parts that an attribute can be read from; one that is not named here the whole image tells.
SEEN_ON: dict[str, tuple[str, ...]] = {
    "sky": ("sky",),
    "ground": ("ground",),
    "shirt": ("trunk", "right_upper_arm", "left_upper_arm"),
    "trousers": ("hips", "right_thigh", "left_thigh", "right_shin", "left_shin"),
    **dict.fromkeys(("hat", "glasses", "hair", "hair_length"), ("face", "hair", "hat", "glasses")),
}
ATTENTION_WEIGHT = 0.2  # of the loss of attention that looks elsewhere


def attribute_masks(parts: Tensor) -> Tensor:
    """Where each attribute can be read: parts (N, H, W) uint8, see Renders, -> (N, A, H, W) bool."""
    table = torch.zeros(2 * SECOND_PERSON, len(NAMES), dtype=torch.bool)
    for i, name in enumerate(NAMES):
        first = SECOND_PERSON if name.startswith(SECOND) else 0
        table[[first + LABELS.index(part) for part in SEEN_ON.get(name.removeprefix(SECOND), ())], i] = True
    return table[parts.int()].movedim(-1, 1)


def draw_batch(renders: Renders, size: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of `size` varied images in [-1, 1], the numbers of their classes (size, A), see Renders, and masks.

    Masks (size, A, H / PATCH, W / PATCH) in [0, 1] say where the classifier's cells show each attribute.
    """
    chosen = torch.randint(len(renders.image), (size,), generator=generator)
    images, classes = from_bytes(renders.image[chosen]), renders.classes[chosen]
    matrices, side = jitter(size, generator, **JITTER), images.shape[-1]
    images, _ = warp(images, renders.keypoints[chosen], matrices, side)
    masks = crop(attribute_masks(renders.parts[chosen]).float(), matrices, side // PATCH)
    exchanged = is_mirrored(matrices) & (classes[:, NAMES.index("people")] == 1)
    classes = torch.where(exchanged[:, None], classes[:, MIRROR], classes)
    masks = torch.where(exchanged[:, None, None, None], masks[:, MIRROR], masks)
    return degrade(images, generator, **DEGRADATION), classes, masks


def attention_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of the negative logarithm of how much of each attribute's attention (B, A, h, w) its mask holds.

    What an image does not show has an empty mask, and does not count.
    """
    masks = masks.to(maps.device)
    shown = masks.flatten(2).amax(-1) > 0.5
    held = (maps * masks).sum((2, 3)).clamp_min(1e-6)
    return -(held.log() * shown).sum() / shown.sum().clamp_min(1)


def classification_loss(logits: dict[str, Tensor], classes: Tensor) -> Tensor:
    """Cross-entropy, a mean over everything that applies in a batch: classes (B, A), -1 for what does not."""
    applies = classes >= 0
    classes = classes.to(next(iter(logits.values())).device)
    losses = [
        F.cross_entropy(scores, classes[:, i], ignore_index=-1, reduction="sum")
        for i, scores in enumerate(logits.values())
    ]
    return torch.stack(losses).sum() / applies.sum().clamp_min(1)


def accuracy(classifier: AttributeClassifier, images: Tensor, classes: Tensor, device: str) -> dict[str, float]:
    """Share of images (N, 3, H, W) uint8 whose attribute is read right, over those where it applies; nan for none."""
    found = [classifier.probabilities(from_bytes(chunk).to(device)) for chunk in images.split(CHUNK)]
    right = {
        name: torch.cat([chunk[name] for chunk in found]).argmax(-1).cpu() == classes[:, i]
        for i, name in enumerate(NAMES)
    }
    return {name: right[name][classes[:, i] >= 0].float().mean().item() for i, name in enumerate(NAMES)}


def model_card(classifier: AttributeClassifier, held_out: Renders, decoded: Tensor, settings: dict[str, Any]) -> str:
    """The text beside the weights: what they are, the command that made them, and their measured quality."""
    columns = [
        accuracy(classifier, images, held_out.classes, settings["device"]) for images in (held_out.image, decoded)
    ]
    counts = dict(zip(NAMES, (held_out.classes >= 0).sum(0).tolist(), strict=True))
    lines = [
        f"| {name.replace('_', ' ')} | {len(ATTRIBUTES[name])} | {columns[0][name]:.1%} | {columns[1][name]:.1%} | "
        f"{counts[name]} |"
        for name in NAMES
    ]
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    return f"""# Attribute classifier

Reads from a small image whatever its prompt can name: {parameters:,} parameters, half precision. The attributes of
the right one of two people begin with `{SECOND}`. Made by

    python -m experiments.marionette.judges.classifier {describe(settings)}

Shares read right of {len(held_out.image)} images that training has not seen, where the attribute applies; one image
in eight has colours that the embedded model never sees together.

| attribute | classes | renders | through the autoencoder | images |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def run(settings: dict[str, Any]) -> str:
    """Trains, measures, writes weights and model card, returns the card; settings of its config."""
    device = torch.device(settings["device"])
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    torch.manual_seed(settings["seed"])
    classifier = AttributeClassifier(attributes=ATTRIBUTES, widths=settings["widths"]).to(device)

    def loss(network: AttributeClassifier, renders: Renders, empty: Tensor, generator: Generator) -> Tensor:
        images, classes, masks = draw_batch(renders, settings["batch_size"], generator)
        with mixed_precision(device):
            maps, values, overview = network.attention(images.to(device))
            logits = network.answer(maps, values, overview)
        return classification_loss(logits, classes) + ATTENTION_WEIGHT * attention_loss(maps, masks)

    folder = Path(settings["output"])
    train(classifier, loss, backbone, settings).save_pretrained(folder)
    # The stored, half-precise weights are judged, not those in memory.
    stored = AttributeClassifier.from_pretrained(folder, device=settings["device"])
    side = backbone.resolution[0]
    held_out = make_renders(settings["seed"], "quality", settings["held_out"], side=side, kinds=KINDS)
    card = model_card(stored, held_out, through_autoencoder(held_out.image, backbone), settings)
    write_card(folder, card)
    return card


@command("experiments/marionette_classifier")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()
