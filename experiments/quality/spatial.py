"""What a spatial head reads on held-out images, beside the best that can be said without looking at them."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rg.data.samples import Samples
from rg.heads.spatial import SCORES, SpatialHead
from rg.metrics.statistics import Estimate, around

LOWER_IS_BETTER = ("si_log",)


def guesses(truth: tuple[Tensor, ...]) -> list[Tensor]:
    """Readouts that are the same for every image, as a score takes them.

    Args:
        truth: maps (N, H, W); or keypoints (N, K, 2) and which are visible (N, K).

    Returns:
        The mean map and a white one; or the mean place of every keypoint, where it is visible.
    """
    if len(truth) == 1:
        return [truth[0].mean(0).expand_as(truth[0]), torch.ones_like(truth[0])]
    points, visible = truth
    mean = (points * visible[..., None]).sum(0) / visible.sum(0).clamp_min(1)[:, None]
    return [mean.expand_as(points)]


def spatial_estimates(head: SpatialHead, samples: Samples, batch_size: int = 16) -> dict[str, Estimate]:
    """Every score of the head at each of its noise levels. The baseline is the best of `guesses`, chosen on the
    scored samples themselves: it is optimistic."""
    score = SCORES[head.hparams.scores]
    estimates = {}
    for timestep in head.hparams.val_timesteps:
        parts = []
        with torch.no_grad():
            for batch in DataLoader(samples, batch_size=batch_size):
                parts.append(score.read(head, head.readout_at(batch, timestep), batch))
        found, *truth = (torch.cat(values) for values in zip(*filter(None, parts), strict=True))
        results = []
        for readout in [found, *guesses(tuple(truth))]:
            metric = score.metric()
            metric.update(readout, *truth)
            results.append(metric.compute())
        ours, *others = results
        for name, value in ours.items():
            baseline = (min if name in LOWER_IS_BETTER else max)(other[name]["mean"] for other in others)
            count = int(metric.images)
            estimates[f"{score.prefix}{name}, t={timestep}"] = around(value["mean"], value["sem"], count, baseline)
    return estimates
