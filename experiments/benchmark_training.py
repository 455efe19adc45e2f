"""Speed of training a head, with latents from the shards or encoded at every step, and of the head's own forward."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from experiments.benchmark_modes import Bench
from rg.readout import ReadoutHead


def clock(device: torch.device) -> float:
    """Seconds, after all that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def per_call(call: Callable[[int], Any], count: int, device: torch.device) -> float:
    """Mean seconds of call(1), ..., call(count), after a first one that does not count."""
    call(0)
    begin = clock(device)
    for number in range(1, count + 1):
        call(number)
    return (clock(device) - begin) / count


def training_speed(bench: Bench, *, batch_size: int, steps: int) -> dict[str, float]:
    """Samples per second of the whole training step: "cached" latents, and "encoding" the pictures every time."""
    backbone, head = bench.backbone, bench.new_head().train().requires_grad_(True)
    head.attach_backbone(backbone)
    size, shape = backbone.resolution, (batch_size, backbone.latent_channels, *backbone.latent_size)
    batch = {
        "latent_mean": torch.randn(shape),
        "latent_std": torch.full(shape, 0.03),
        "keypoints": torch.rand(batch_size, 1, 18, 3) * size[0],
        "image": torch.rand(batch_size, 3, *size) * 2 - 1,
        "label": torch.full((batch_size, 3, *size), -1.0),
        "index": torch.arange(batch_size),
    }
    batch = {name: value.to(backbone.device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)

    def step(number: int, encode: bool) -> None:
        drawn = {**batch, "draw": batch["index"] * 0 + number}
        if encode:
            drawn["latent_mean"], drawn["latent_std"] = backbone.encode(batch["image"])
        optimizer.zero_grad()
        head.loss(head.read(*head.draw(drawn)), drawn).backward()
        optimizer.step()

    return {
        name: batch_size / per_call(lambda number, encode=encode: step(number, encode), steps, backbone.device)
        for name, encode in (("cached", False), ("encoding", True))
    }


def upsampled_first(head: ReadoutHead) -> Callable[..., torch.Tensor]:
    """The same head with every tap resized before its 1x1 convolutions, as the authors' runs."""
    other = copy.deepcopy(head)
    other.aggregation.output_scale = 1

    def forward(features: list[torch.Tensor], time_embedding: torch.Tensor | None) -> torch.Tensor:
        size = [side * head.aggregation.output_scale for side in features[-1].shape[-2:]]
        resized = [F.interpolate(each, size, mode="bilinear", align_corners=False) for each in features]
        return other(resized, time_embedding)

    return forward


@torch.no_grad()
def head_speed(bench: Bench, *, batch_size: int, repeats: int) -> dict[str, float]:
    """Seconds of one forward of the head, its 1x1 convolutions before or after the upsampling; the two agree."""
    backbone, head = bench.backbone, bench.new_head()
    x = torch.randn(batch_size, backbone.latent_channels, *backbone.latent_size, device=backbone.device)
    timesteps = torch.full((batch_size,), 500, device=backbone.device)
    features, embedding = backbone.predict(x, timesteps).features, backbone.embed_time(timesteps)
    ways = {"projected_first": head, "upsampled_first": upsampled_first(head)}
    seconds = {
        name: per_call(lambda _, way=way: way(features, embedding), repeats, backbone.device)
        for name, way in ways.items()
    }
    difference = (head(features, embedding) - ways["upsampled_first"](features, embedding)).abs().max()
    return {**seconds, "largest_difference": difference.item()}
