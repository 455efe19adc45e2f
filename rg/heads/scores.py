"""What validation measures of a spatial readout, by the name that its head has in `scores`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rg.image_means import ImageMeans
from rg.map_metrics import DepthScores, EdgeScores
from rg.metrics import PCK


@dataclass(frozen=True)
class Score:
    """metric: makes the metric of one noise level. prefix: of its names in the log. read: what its `update` takes, of a
    head, a readout and its batch; None where the batch has nothing to score."""

    metric: Callable[[], ImageMeans]
    prefix: str
    read: Callable[[Any, Tensor, dict[str, Any]], tuple[Tensor, ...] | None]


def read_poses(head: Any, readout: Tensor, batch: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Points read and true (N, 18, 2) and which are visible (N, 18), of the pictures of one person."""
    people = (batch["keypoints"][..., 2] > 0).any(-1)
    single = people.sum(1) == 1
    if not single.any():
        return None
    truth = batch["keypoints"][single][people[single]]
    found = head.keypoints(readout[single], tuple(batch["label"].shape[-2:]))
    return found, truth[..., :2], truth[..., 2] > 0


def read_maps(head: Any, readout: Tensor, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Readout and label as grey pictures of the label's size: (B, H, W) in [0, 1]."""
    label = batch["label"]
    read = F.interpolate(head.preview(readout), label.shape[-2:], mode="bilinear", align_corners=False)
    return read.mean(1), (label.mean(1) + 1) / 2


SCORES = {
    "pose": Score(partial(PCK, alphas=(0.05, 0.1)), "pck@", read_poses),
    "depth": Score(DepthScores, "", read_maps),
    "edges": Score(EdgeScores, "", read_maps),
}
