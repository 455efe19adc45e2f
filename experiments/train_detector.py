"""Trains the keypoint detector on renders, plain and through the autoencoder: python -m experiments.train_detector."""

import math
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor
from tqdm import trange

from experiments.detector_pictures import Pictures, draw_batch, make_training_pictures
from experiments.detector_quality import finish
from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.points import Size, inside, rescale

SAVE_EVERY = 500  # steps


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


class Training:
    """A detector on its way: network, AdamW, a cosine schedule after a short warm-up, and the generator of all chance.

    Args:
        settings: as of conf/train_detector.yaml. A state found at settings["checkpoint"] and written under the same
            settings is taken up.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.step = settings, 0
        self.checkpoint = Path(settings["checkpoint"])
        torch.manual_seed(settings["seed"])
        self.detector = KeypointDetector(widths=settings["widths"], threshold=0.5).to(settings["device"])
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), settings["learning_rate"], weight_decay=0.01)
        steps = settings["steps"]
        warm = max(1, steps // 50)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        self.generator = Generator().manual_seed(settings["seed"])
        if self.checkpoint.is_file():
            self._take_up(torch.load(self.checkpoint, weights_only=True))

    def _take_up(self, state: dict[str, Any]) -> None:
        if state["settings"] != self.settings:
            return
        for name in ("detector", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save(self) -> None:
        """Writes the state under a temporary name, then puts it in place."""
        state = {name: getattr(self, name).state_dict() for name in ("detector", "optimizer", "schedule")}
        state |= {"settings": self.settings, "generator": self.generator.get_state(), "step": self.step}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def advance(self, pictures: Pictures) -> float:
        """One step on one batch, convolutions in bfloat16; returns the loss."""
        images, keypoints = draw_batch(pictures, self.settings["batch_size"], self.generator)
        device = torch.device(self.settings["device"])
        with torch.autocast(device.type, torch.bfloat16):
            cells, absent = self.detector(images.to(device))
        loss = detection_loss(cells, absent, keypoints, (images.shape[-2], images.shape[-1]))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.item()


def run(settings: dict[str, Any]) -> str:
    """Trains, measures, writes weights and model card and returns the card; settings as of conf/train_detector.yaml."""
    backbone = DiffusionBackbone.from_pretrained(settings["backbone"], device=settings["device"])
    training = Training(settings)
    if training.step < settings["steps"]:
        pictures = make_training_pictures(backbone, settings["seed"], settings["pictures"])
        progress = trange(training.step, settings["steps"], initial=training.step, desc="training")
        for _ in progress:
            loss = training.advance(pictures)
            if training.step % SAVE_EVERY == 0 or training.step == settings["steps"]:
                training.save()
                progress.set_postfix(loss=f"{loss:.3f}")
    return finish(training.detector.eval(), backbone, settings)


@hydra.main(config_path="../conf", config_name="train_detector", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line and prints the model card."""
    print(run(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    main()
