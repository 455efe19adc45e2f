"""Trains the keypoint detector on renders and on renders through the autoencoder: python -m experiments.train_detector."""

import math
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor
from tqdm import trange

from experiments.detector_pictures import (
    Pictures,
    draw_batch,
    from_bytes,
    make_empty,
    make_training_pictures,
    render_people,
    through_autoencoder,
)
from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.metrics import box_side, pck
from rg.points import Size, inside, rescale

ALPHAS = (0.05, 0.1, 0.2)


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


def fit(
    detector: KeypointDetector, pictures: Pictures, *, steps: int, batch_size: int, learning_rate: float, seed: int,
    device: str, checkpoint: Path | None = None, settings: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Trains the detector in place: AdamW, a cosine schedule after a short warm-up, bfloat16 where it is faster.

    With a checkpoint path the state is written there every 500 steps and taken up from there, if it was written under the
    same settings.
    """
    optimizer = torch.optim.AdamW(detector.parameters(), learning_rate, weight_decay=0.01)
    warm = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, done = Generator().manual_seed(seed), 0
    if checkpoint and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] == settings:
            detector.load_state_dict(state["detector"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"])
            done = state["step"]
    detector.train()
    if checkpoint:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    smooth = math.nan
    progress = trange(done, steps, initial=done, total=steps, desc="training")
    for step in progress:
        images, keypoints = draw_batch(pictures, batch_size, generator)
        size = (images.shape[-2], images.shape[-1])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            cells, absent = detector(images.to(device))
        loss = detection_loss(cells, absent, keypoints, size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{smooth:.3f}")
        if checkpoint and ((step + 1) % 500 == 0 or step + 1 == steps):
            state = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings}
            state |= {"schedule": schedule.state_dict(), "generator": generator.get_state(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    detector.eval()


def confidences(detector: KeypointDetector, images: Tensor, device: str) -> Tensor:
    """Mean confidence over the keypoints of images (N, 3, H, W) uint8: (N,)."""
    return torch.cat([detector.detect(from_bytes(c).to(device)).confidence.mean(1).cpu() for c in images.split(250)])


def choose_threshold(people: Tensor, empty: Tensor) -> float:
    """A confidence half-way between nearly all (99 %) people and nearly all empty pictures, that 99.5 % of people reach."""
    half_way = (people.quantile(0.01) + empty.quantile(0.99)) / 2
    return round(min(half_way.item(), people.quantile(0.005).item()), 4)


def accuracy(detector: KeypointDetector, images: Tensor, keypoints: Tensor, device: str) -> dict[str, list[float]]:
    """PCK at ALPHAS over visible and over all keypoints of images (N, 3, H, W) uint8 with keypoints (N, 18, 3)."""
    found = torch.cat([detector.detect(from_bytes(chunk).to(device)).points.cpu() for chunk in images.split(250)])
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    counted = {"visible keypoints": visible, "all keypoints": torch.ones_like(visible)}
    return {
        name: [pck(found, target, which, box_side(target, which), alpha).mean().item() for alpha in ALPHAS]
        for name, which in counted.items()
    }


def model_card(config: dict[str, Any], parameters: int, rows: dict[str, list[float]], detected: dict[str, float]) -> str:
    """The README beside the weights: command, settings and measured quality."""
    settings = (f"{key}={value}".replace(" ", "") for key, value in config.items() if key not in ("output", "checkpoint"))
    lines = [
        "# Keypoint detector",
        "",
        f"Finds the 18 OpenPose keypoints of one person in a small picture ({parameters:,} parameters, half precision).",
        "It judges pictures in the evaluation, and has nothing to do with the readout heads. Written by",
        "",
        "    " + " ".join(["python -m experiments.train_detector", *settings]),
        "",
        f"Measured on {config['held_out']} renders of one person that neither training nor the threshold has seen; the box",
        "of PCK is that of the counted keypoints.",
        "",
        "| pictures | " + " | ".join(f"PCK@{alpha}" for alpha in ALPHAS) + " |",
        "|---" * (len(ALPHAS) + 1) + "|",
        *(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in rows.items()),
        "",
        *(f"- {name}: a person is found in {share:.1%}" for name, share in detected.items()),
    ]
    return "\n".join(lines) + "\n"


def run(config: dict[str, Any]) -> None:
    """Trains, chooses the threshold, measures and writes weights and model card; see conf/train_detector.yaml."""
    seed, device, count = config["seed"], config["device"], config["held_out"]
    backbone = DiffusionBackbone.from_pretrained(config["backbone"], device=device)
    torch.manual_seed(seed)
    detector = KeypointDetector(widths=config["widths"], threshold=0.5).to(device)
    fit(
        detector, make_training_pictures(backbone, seed, config["pictures"]), steps=config["steps"],
        batch_size=config["batch_size"], learning_rate=config["learning_rate"], seed=seed, device=device,
        checkpoint=Path(config["checkpoint"]), settings=config,
    )  # fmt: skip
    # The stored weights are judged, not the more precise ones in memory.
    detector.save_pretrained(config["output"])
    detector = KeypointDetector.from_pretrained(config["output"], device=device)

    decoded, confidence = {}, {}
    for split in ("threshold", "quality"):
        generator = Generator().manual_seed(seed)
        image, keypoints = render_people(seed, split, count, side=backbone.resolution[0], kinds={"one": 1.0})
        decoded[split] = through_autoencoder(image, backbone, generator)
        empty = make_empty(seed, split, image, backbone, generator)
        confidence[split] = [confidences(detector, images, device) for images in (image, decoded[split], empty)]
    detector.threshold = choose_threshold(*confidence["threshold"][1:])
    detector.save_pretrained(config["output"])

    pictures = {"renders": image, "renders through the autoencoder": decoded["quality"]}
    rows = {
        f"{name}, {which}": values
        for name, images in pictures.items()
        for which, values in accuracy(detector, images, keypoints, device).items()
    }
    detected = {
        name: (values >= detector.threshold).float().mean().item()
        for name, values in zip((*pictures, "pictures without a person"), confidence["quality"], strict=True)
    }
    card = model_card(config, sum(p.numel() for p in detector.parameters()), rows, detected)
    partial = Path(config["output"]) / "README.md.partial"
    partial.write_text(card)
    partial.replace(partial.with_suffix(""))
    print(card)


@hydra.main(config_path="../conf", config_name="train_detector", version_base=None)
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line."""
    run(OmegaConf.to_container(config, resolve=True))


if __name__ == "__main__":
    main()
