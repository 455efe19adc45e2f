"""Guided images from the command line: python -m rg.sample +experiment=pose_control"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate

from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command, link_latest, load_configured_head
from rg.data.shards import read_shards
from rg.generation import (
    Watch,
    check_sampling,
    fit_image,
    generate_in_batches,
    image_seeds,
    image_size,
    set_scheduler,
    show_progress,
    watched,
)
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.step import StepTrace
from rg.guidance.targets import FixedTarget
from rg.heads.base import ReadoutHead
from rg.io.figures import image_grid, save_figure
from rg.io.images import load_control, save_image
from rg.points import Size, rescale

log = logging.getLogger(__name__)


def read_controls(cfg: DictConfig, backbone: DiffusionBackbone, head: ReadoutHead) -> tuple[FixedTarget, list[str]]:
    """The control file that `cfg.control` names, else the labels of held-out images; and a prompt for each image.

    Both are moved to the size of the images that `cfg.sampling` asks for.

    Raises:
        ValueError: the head cannot take such a control.
    """
    size = image_size(backbone, cfg.sampling)
    if cfg.control is not None:
        control = load_control(cfg.control, size)
        if isinstance(control, Image.Image) and (control.height, control.width) != size:
            found, control = f"{control.width}x{control.height}", fit_image(control, size)
            log.info("control: %s is %s: its centre, resized to %dx%d", cfg.control, found, size[1], size[0])
        target, prompts = FixedTarget(control), [cfg.prompt or ""] * cfg.images
    else:
        instantiate(cfg.data.builder)(split="test", n=cfg.pose + cfg.images)
        samples = read_shards(Path(cfg.data.root) / "test", cfg.pose + cfg.images)
        batch = default_collate([samples[i] for i in range(cfg.pose, len(samples))])
        target = FixedTarget(resized(head.control(batch), tuple(batch["image"].shape[-2:]), size))
        prompts = batch["prompt"] if cfg.prompt is None else [cfg.prompt] * cfg.images
    # What does not fit is refused here, not at the first guided step; the size of the readout does not matter.
    head.encode_target(target.control, readout_size=(8, 8), image_size=size)
    return target, prompts


def resized(control: Tensor, from_size: Size, to_size: Size) -> Tensor:
    """Images (B, 3, H, W) or keypoints (B, P, 18, 3) of images of `from_size`, for images of `to_size`."""
    if from_size == to_size:
        return control
    if control.shape[-2:] == from_size:
        return interpolate(control, to_size, mode="area")
    return torch.cat([rescale(control[..., :2], from_size, to_size), control[..., 2:]], -1)


@dataclass(frozen=True)
class Sampled:
    """What one command makes: B images, unguided and guided, (B, 3, H, W) in [-1, 1], and what guided them.

    control, readout: as images (1 or B, 3, h, w) in [0, 1]; None where no readouts were kept.
    target: the control itself.
    trace: of the guided images, step by step.
    """

    unguided: Tensor
    guided: Tensor
    control: Tensor | None
    readout: Tensor | None
    target: FixedTarget
    trace: list[StepTrace]

    def write(self, run_dir: Path) -> None:
        """Writes the guided images and grid.png, whole or not at all."""
        rows = {"unguided": (self.unguided + 1) / 2, "guided": (self.guided + 1) / 2}
        if self.readout is not None:
            rows = {"control": self.control, **rows, "readout": self.readout}
        for number, image in enumerate(self.guided):
            save_image(image, run_dir / f"{number:05d}.png")
        save_figure(image_grid(rows, side=128), run_dir / "grid.png")
        link_latest(run_dir)


def make_images(cfg: DictConfig, backbone: DiffusionBackbone | None = None, watch: Watch | None = None) -> Sampled:
    """The images of a configuration of conf/sample.yaml; nothing is written.

    Args:
        backbone: the one of `cfg.world` where it is loaded already.
        watch: see rg.generation.watched.
    """
    for name in ("images", "batch_size"):
        if cfg[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {cfg[name]}")
    head = load_configured_head(cfg.head, cfg.world.family)
    if backbone is None:
        backbone = instantiate(cfg.world.backbone)
    head.check_taps(backbone.tap_channels, backbone.time_embed_dim, backbone.condition_dim)
    head.to(backbone.device)
    set_scheduler(backbone.pipeline, cfg.scheduler)
    arguments = {"seeds": image_seeds(cfg.seed, range(cfg.images)), **check_sampling(backbone, cfg.sampling)}
    arguments["batch_size"] = cfg.batch_size
    # A bad setting is said before labels are made.
    instantiate(cfg.guidance)(terms=[GuidanceTerm(head)]).check_noise(cfg.sampling.get("eta"))
    target, prompts = read_controls(cfg, backbone, head)

    def guide(part: slice) -> ReadoutGuidance:
        control = target.control if len(target.control) == 1 else target.control[part]
        return instantiate(cfg.guidance)(terms=[GuidanceTerm(head, FixedTarget(control))])

    show_progress(backbone.pipeline, "unguided")
    with watched(backbone.pipeline, watch, "unguided"):
        unguided, _ = generate_in_batches(backbone.pipeline, prompts, **arguments)
    show_progress(backbone.pipeline, "guided")
    with watched(backbone.pipeline, watch, "guided"):
        guided, trace = generate_in_batches(backbone.pipeline, prompts, guide=guide, **arguments)
    control = readout = None
    if trace and trace[-1].readouts:  # none without guidance.keep_readouts
        readouts = trace[-1].readouts[0]
        size = (readouts.shape[-2], readouts.shape[-1])
        wanted = target.encode(head, readout_size=size, image_size=tuple(guided.shape[-2:]), device=readouts.device)
        control, readout = head.preview(wanted), head.preview(readouts)
    return Sampled(unguided, guided, control, readout, target, trace)


def sample(cfg: DictConfig, run_dir: Path) -> Tensor:
    """Writes guided images and grid.png into run_dir; returns the images (B, 3, H, W) in [-1, 1]."""
    made = make_images(cfg)
    made.write(run_dir)
    energies = [float(step.energy.mean()) for step in made.trace]
    if energies:
        log.info("mean energy: %.4f at the first guided step, %.4f at the last", energies[0], energies[-1])
    print(f"{run_dir}/grid.png")
    return made.guided


@command("sample", stopped="nothing is kept; the same command begins again")
def main(cfg: DictConfig) -> None:
    """Samples into Hydra's run folder."""
    sample(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
