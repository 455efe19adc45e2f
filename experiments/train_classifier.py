"""Trains the attribute classifier, on renders as the detector: python -m experiments.train_classifier."""

from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from data_prep.marionette import ATTRIBUTES, KINDS
from experiments.augmentation import degrade, is_mirrored, jitter, warp
from experiments.judge_pictures import Pictures, from_bytes, render_pictures, through_autoencoder
from experiments.judge_training import describe, train, write_card
from rg.backbone import DiffusionBackbone
from rg.classifier import SECOND, AttributeClassifier

JITTER = {"turn": 0.1, "zoom": 0.1, "shift": 0.1}
WORSE = {"blur": 0.5, "light": 0.1, "offset": 0.05, "noise": 0.06}
CHUNK = 100
NAMES = list(ATTRIBUTES)
# The attribute that each one becomes when a picture of two people is mirrored: they change places.
_PARTNERS = [name.removeprefix(SECOND) if name.startswith(SECOND) else SECOND + name for name in NAMES]
MIRROR = [NAMES.index(partner if partner in NAMES else name) for name, partner in zip(NAMES, _PARTNERS, strict=True)]


def draw_batch(pictures: Pictures, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A batch of `size` varied images in [-1, 1] and the numbers of their classes (size, A), see Pictures."""
    chosen = torch.randint(len(pictures.image), (size,), generator=generator)
    images, classes = from_bytes(pictures.image[chosen]), pictures.classes[chosen]
    matrices = jitter(size, generator, **JITTER)
    images, _ = warp(images, pictures.keypoints[chosen], matrices, images.shape[-1])
    exchanged = is_mirrored(matrices) & (classes[:, NAMES.index("people")] == 1)
    return degrade(images, generator, **WORSE), torch.where(exchanged[:, None], classes[:, MIRROR], classes)


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


def model_card(classifier: AttributeClassifier, held_out: Pictures, decoded: Tensor, settings: dict[str, Any]) -> str:
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

Reads from a small picture whatever its prompt can name: {parameters:,} parameters, half precision. The attributes of
the right one of two people begin with `{SECOND}`. Made by

    python -m experiments.train_classifier {describe(settings)}

Shares read right of {len(held_out.image)} pictures that training has not seen, where the attribute applies; one picture
in eight has colours that the embedded model never sees together.

| attribute | classes | renders | through the autoencoder | pictures |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def run(settings: dict[str, Any]) -> str:
    """Trains, measures, writes weights and model card, returns the card; settings as of conf/train_classifier.yaml."""
    device = torch.device(settings["device"])
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    torch.manual_seed(settings["seed"])
    classifier = AttributeClassifier(attributes=ATTRIBUTES, widths=settings["widths"]).to(device)

    def loss(network: AttributeClassifier, pictures: Pictures, empty: Tensor, generator: Generator) -> Tensor:
        images, classes = draw_batch(pictures, settings["batch_size"], generator)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(images.to(device))
        return classification_loss(logits, classes)

    folder = Path(settings["output"])
    train(classifier, loss, backbone, settings).save_pretrained(folder)
    # The stored, half-precise weights are judged, not those in memory.
    stored = AttributeClassifier.from_pretrained(folder, device=settings["device"])
    side = backbone.resolution[0]
    held_out = render_pictures(settings["seed"], "quality", settings["held_out"], side=side, kinds=KINDS)
    card = model_card(stored, held_out, through_autoencoder(held_out.image, backbone), settings)
    write_card(folder, card)
    return card


@hydra.main(config_path="../conf", config_name="train_classifier", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()
