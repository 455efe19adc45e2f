"""Two checks that a gain is due to the head: python -m experiments.quality.sanity

A head with random weights must not help; four images of one batch with four targets must each end nearest to their own.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from rg.cli import command, load_configured_head
from rg.data.shards import read_shards
from rg.evaluate import load_judges
from rg.generation import generate, set_scheduler
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import FixedTarget
from rg.heads.base import ReadoutHead
from rg.io.files import write_json
from rg.metrics.keypoints import box_side, pck
from rg.metrics.statistics import paired_gain


class Checks:
    """The world's model, judges and held-out poses, as the evaluation's configuration names them."""

    def __init__(self, cfg: DictConfig, images: int) -> None:
        self.cfg = cfg
        self.backbone = instantiate(self.cfg.world.backbone)
        self.head = load_configured_head(cfg.head, cfg.world.family).to(self.backbone.device)
        self.judges = load_judges(cfg, self.head.labelled_by)
        instantiate(self.cfg.data.builder)(split=self.cfg.split, n=images)
        self.samples = read_shards(Path(self.cfg.data.root) / self.cfg.split, images)

    def poses(self, head: ReadoutHead, keypoints: Tensor | None) -> dict[str, Tensor]:
        """Every judge's poses (B, 18, 2) of images guided towards keypoints (B, 1, 18, 3); None samples plainly."""
        guidance = None
        if keypoints is not None:
            guidance = instantiate(self.cfg.guidance)(terms=[GuidanceTerm(head, FixedTarget(keypoints))])
        count = len(self.samples)
        prompts = self.samples.prompt[count // 2 :] + self.samples.prompt[: count // 2]
        arguments = {"seeds": range(count), **self.cfg.sampling}
        images = generate(self.backbone.pipeline, prompts, guidance=guidance, **arguments)
        return {name: judge.detect(images).points[:, 0] for name, judge in self.judges.items()}

    def random_head(self, alpha: float = 0.1) -> dict[str, Any]:
        """Gain in PCK@alpha, by every judge, by a head of the same shape that was never trained."""
        torch.manual_seed(self.cfg.seed)
        head = type(self.head)(**self.head.hparams).to(self.backbone.device).eval().requires_grad_(False)
        keypoints = self.samples.keypoints[:, 0]
        target, visible = keypoints[..., :2], keypoints[..., 2] > 0
        side = box_side(target, visible)
        plain, guided = (self.poses(head, k) for k in (None, self.samples.keypoints))
        gains = {}
        for judge in self.judges:
            shares = (pck(found[judge], target, visible, side, [alpha])[:, 0] for found in (plain, guided))
            gains[judge] = paired_gain(*shares)
        return {"alpha": alpha, "images": len(keypoints), "gain": gains}

    def own_target(self, scheduler: str = "euler") -> dict[str, Any]:
        """Mean distance in pixels of each guided image's pose (row) to each target (column), one batch, every judge."""
        set_scheduler(self.backbone.pipeline, scheduler)
        keypoints = self.samples.keypoints[:, 0]
        found = self.poses(self.head, self.samples.keypoints)
        visible, results = keypoints[..., 2] > 0, {}
        for judge, points in found.items():
            offsets = (points[:, None] - keypoints[None, ..., :2]).norm(dim=-1)
            distance = (offsets * visible).sum(-1) / visible.sum(-1)
            nearest = distance.argmin(1).tolist()
            own = nearest == list(range(len(nearest)))
            results[judge] = {"distance": distance.tolist(), "nearest": nearest, "all_own": own}
        return {"scheduler": scheduler, "judges": results}


@command("sanity")
def main(cfg: DictConfig) -> None:
    """Runs both checks and writes outputs/sanity/results.json."""
    results = {
        "random_head": Checks(cfg, cfg.images).random_head(),
        "own_target": Checks(cfg, cfg.together).own_target(),
        "command": shlex.join(["python", "-m", "experiments.quality.sanity", *sys.argv[1:]]),
    }
    write_json(Path(cfg.run_dir) / "results.json", results)
    print(results)


if __name__ == "__main__":
    main()
