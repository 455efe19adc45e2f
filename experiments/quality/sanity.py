"""Two checks that a gain is due to the head: python -m experiments.quality.sanity

A head with random weights must not help; four images of one batch with four targets must each end nearest to their own.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from rg.cli import CONF, OUTPUTS, clear_errors
from rg.data.shards import read_shards
from rg.generation import generate, set_scheduler
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import FixedTarget
from rg.heads import load_head
from rg.io.files import write_json
from rg.metrics.keypoints import box_side, pck
from rg.metrics.statistics import paired_gain


class Controls:
    """The world's model, detector and held-out poses, as the evaluation's configuration names them."""

    def __init__(self, overrides: list[str], images: int) -> None:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            self.cfg = compose(config_name="evaluate", overrides=[*overrides, "run_dir=."])
        self.backbone = instantiate(self.cfg.world.backbone)
        self.detector = instantiate(self.cfg.world.detector)
        self.head = load_head(self.cfg.head.path).to(self.backbone.device)
        instantiate(self.cfg.data.builder)(split=self.cfg.split, n=images)
        self.samples = read_shards(Path(self.cfg.data.root) / self.cfg.split, images)

    def poses(self, head: Any, keypoints: Tensor | None) -> Tensor:
        """Detected poses (B, 18, 2) of images guided towards keypoints (B, 1, 18, 3); None samples plainly."""
        guidance = None
        if keypoints is not None:
            guidance = instantiate(self.cfg.guidance)(terms=[GuidanceTerm(head, FixedTarget(keypoints))])
        count = len(self.samples)
        prompts = self.samples.prompt[count // 2 :] + self.samples.prompt[: count // 2]
        arguments = {"seeds": range(count), **self.cfg.sampling}
        images = generate(self.backbone.pipeline, prompts, guidance=guidance, **arguments)
        return self.detector.detect(images).points[:, 0]

    def random_head(self, alpha: float = 0.1) -> dict[str, Any]:
        """Gain in PCK@alpha by a head of the same shape that was never trained."""
        torch.manual_seed(self.cfg.seed)
        head = type(self.head)(**self.head.hparams).to(self.backbone.device).eval().requires_grad_(False)
        keypoints = self.samples.keypoints[:, 0]
        target, visible = keypoints[..., :2], keypoints[..., 2] > 0
        side = box_side(target, visible)
        plain, guided = (self.poses(head, k) for k in (None, self.samples.keypoints))
        before, after = (pck(found, target, visible, side, [alpha])[:, 0] for found in (plain, guided))
        return {"alpha": alpha, "images": len(keypoints), "gain": paired_gain(before, after)}

    def own_target(self, scheduler: str = "euler") -> dict[str, Any]:
        """Mean distance in pixels of each guided image's pose (row) to each target (column), one batch."""
        set_scheduler(self.backbone.pipeline, scheduler)
        keypoints = self.samples.keypoints[:, 0]
        found = self.poses(self.head, self.samples.keypoints)
        offsets = (found[:, None] - keypoints[None, ..., :2]).norm(dim=-1)
        visible = keypoints[..., 2] > 0
        distance = (offsets * visible).sum(-1) / visible.sum(-1)
        nearest = distance.argmin(1).tolist()
        own = nearest == list(range(len(nearest)))
        return {"scheduler": scheduler, "distance": distance.tolist(), "nearest": nearest, "all_own": own}


@clear_errors
def main() -> None:
    """Runs both checks and writes outputs/controls/results.json."""
    overrides = sys.argv[1:]
    results = {
        "random_head": Controls(overrides, 64).random_head(),
        "own_target": Controls(overrides, 4).own_target(),
        "command": " ".join(["python -m experiments.quality.sanity", *overrides]),
    }
    write_json(Path(OUTPUTS) / "controls" / "results.json", results)
    print(results)


if __name__ == "__main__":
    main()
