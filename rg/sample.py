"""Guided images from the command line: python -m rg.sample +experiment=pose_control"""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate

from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command, link_latest, load_configured_head
from rg.data.shards import read_shards
from rg.generation import generate, image_seeds, set_scheduler
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import FixedTarget
from rg.heads.base import ReadoutHead
from rg.io.figures import image_grid, save_figure
from rg.io.images import load_control, save_image

log = logging.getLogger(__name__)


def read_controls(cfg: DictConfig, backbone: DiffusionBackbone, head: ReadoutHead) -> tuple[FixedTarget, list[str]]:
    """The control file that `cfg.control` names, else the labels of held-out images; and a prompt for each image.

    Raises:
        ValueError: the head cannot take such a control.
    """
    if cfg.control is not None:
        target, prompts = FixedTarget(load_control(cfg.control, backbone.resolution)), [cfg.prompt or ""] * cfg.images
    else:
        instantiate(cfg.data.builder)(split="test", n=cfg.pose + cfg.images)
        samples = read_shards(Path(cfg.data.root) / "test", cfg.pose + cfg.images)
        batch = default_collate([samples[i] for i in range(cfg.pose, len(samples))])
        target, prompts = FixedTarget(head.control(batch)), [cfg.prompt or prompt for prompt in batch["prompt"]]
    # What does not fit is refused here, not at the first guided step; the size of the readout does not matter.
    head.encode_target(target.control, readout_size=(8, 8), image_size=backbone.resolution)
    return target, prompts


def sample(cfg: DictConfig, run_dir: Path) -> Tensor:
    """Writes guided images and grid.png into run_dir; returns the images (B, 3, H, W) in [-1, 1]."""
    if cfg.images < 1:
        raise ValueError(f"images: expected at least 1, got {cfg.images}")
    head = load_configured_head(cfg.head, cfg.world.family)
    backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
    head.check_taps(backbone.tap_channels, backbone.time_embed_dim, backbone.condition_dim)
    head.to(backbone.device)
    set_scheduler(backbone.pipeline, cfg.scheduler)
    target, prompts = read_controls(cfg, backbone, head)
    guidance = instantiate(cfg.guidance)(terms=[GuidanceTerm(head, target)])
    backbone.pipeline.set_progress_bar_config(disable=False)
    arguments = {"seeds": image_seeds(cfg.seed, range(cfg.images)), **cfg.sampling}
    unguided = generate(backbone.pipeline, prompts, **arguments)
    guided = generate(backbone.pipeline, prompts, guidance=guidance, **arguments)
    readouts = guidance.trace[-1].readouts[0] if guidance.trace else None
    rows = {"unguided": (unguided + 1) / 2, "guided": (guided + 1) / 2}
    if readouts is not None:
        size = (readouts.shape[-2], readouts.shape[-1])
        wanted = target.encode(head, readout_size=size, image_size=backbone.resolution, device=readouts.device)
        rows = {"control": head.preview(wanted), **rows, "readout": head.preview(readouts)}
    for number, image in enumerate(guided):
        save_image(image, run_dir / f"{number:05d}.png")
    save_figure(image_grid(rows, side=128), run_dir / "grid.png")
    link_latest(run_dir)
    energies = [float(step.energy.mean()) for step in guidance.trace]
    if energies:
        log.info("mean energy: %.4f at the first guided step, %.4f at the last", energies[0], energies[-1])
    print(f"{run_dir}/grid.png")
    return guided


@command("sample", stopped="nothing is kept; the same command begins again")
def main(cfg: DictConfig) -> None:
    """Samples into Hydra's run folder."""
    sample(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
