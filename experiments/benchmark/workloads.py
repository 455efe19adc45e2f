"""What the benchmark runs on a model: sampling plainly, guided, as the authors' code does, and the floor."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor

from experiments.benchmark.architectures import build_backbone
from experiments.benchmark.released import Compare, both_branches, sample_as_released
from rg.backbone.features import predict, select_rows
from rg.cli import compose_config
from rg.guidance.energy import gradient_at
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget, ReferenceTarget
from rg.heads.base import ReadoutHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import pick

TASKS = ("spatial", "drag")
# Modes that do not depend on the task, and those that do. "record" is the reference's run, for a drag alone.
UNGUIDED_MODES = ("plain", "floor")
GUIDED: dict[str, dict[str, Any]] = {
    "score": {"update": "score"},
    "score_checkpointing": {"update": "score", "checkpointing": True},
    "adam": {"update": "adam"},
}
PROMPT, TEXT_GUIDANCE = "a person", 7.5


@dataclass(frozen=True)
class Settings:
    """One model to be measured: the size of its latents, images per batch, steps per run."""

    model: str
    latent_side: int
    precision: str
    images: int
    steps: int
    seed: int
    device: str


@dataclass(frozen=True)
class Task:
    """A term of our guidance, and the same energy as the authors' schedule computes it."""

    term: GuidanceTerm
    compare: Compare


def modes_of(task: str) -> tuple[str, ...]:
    """Names of what is measured for a task."""
    return (*UNGUIDED_MODES, *GUIDED, *(["record"] if task == "drag" else []), "released")


class Bench:
    """A model with frozen heads of random weights, and everything that is run on it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        where = {"latent_side": settings.latent_side, "precision": settings.precision, "device": settings.device}
        self.backbone = build_backbone(settings.model, **where, seed=settings.seed)
        self.pipe = self.backbone.pipeline
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.images, self.backbone.latent_channels, *self.backbone.latent_size)
        unet = self.pipe.unet
        self.latents, self.reference = (
            torch.randn(shape, generator=generator).to(unet.device, unet.dtype) for _ in range(2)
        )
        self.pipe.scheduler.set_timesteps(settings.steps)
        self.timesteps = self.pipe.scheduler.timesteps
        torch.manual_seed(settings.seed)
        self.config = compose_config("train", [f"world={settings.model}", "head=pose"])
        self.tasks = {"spatial": self._spatial(generator), "drag": self._drag(generator)}

    def _frozen(self, build: Callable[..., ReadoutHead], **arguments: Any) -> ReadoutHead:
        widths = {name: getattr(self.backbone, name) for name in ("tap_channels", "time_embed_dim", "condition_dim")}
        return build(**widths, **arguments).to(self.backbone.device).eval().requires_grad_(False)

    def new_head(self) -> ReadoutHead:
        """The world's pose head with random weights."""
        return self._frozen(lambda **widths: instantiate(self.config.head, **widths, _convert_="all"))

    def _spatial(self, generator: torch.Generator) -> Task:
        head, size = self.new_head(), self.backbone.resolution
        keypoints = torch.rand(self.settings.images, 1, 18, 3, generator=generator) * size[0]
        target = FixedTarget(keypoints)

        def compare(readout: Tensor, reference: Tensor) -> Tensor:
            sizes = {"readout_size": tuple(readout.shape[-2:]), "image_size": size}
            return head.energy(readout, target.encode(head, **sizes, device=readout.device))

        return Task(GuidanceTerm(head, target), compare)

    def _drag(self, generator: torch.Generator) -> Task:
        world, images = self.config.world, self.settings.images
        widths = {name: world[name] for name in ("projection_dim", "norm_groups", "output_scale")}
        head = self._frozen(CorrespondenceHead, **widths, repulsion=0.5, time_convention="none")
        side = self.settings.latent_side * world.output_scale
        device = self.backbone.device
        points = {
            name: torch.randint(side, (images, 8, 2), generator=generator).to(device)
            for name in ("source", "destination")
        }
        target = ReferenceTarget(keep=lambda readout: pick(readout, points["source"]), device=device)
        # As if recorded: the memory of a guided run is measured without that of a run before it.
        for step, timestep in enumerate(self.timesteps):
            readout = torch.rand(1, images, world.projection_dim, side, side, generator=generator)
            target.store(step, timestep.item(), readout.to(device))

        def compare(readout: Tensor, reference: Tensor) -> Tensor:
            return head.energy(readout, pick(reference, points["source"]), **points)

        return Task(GuidanceTerm(head, target, arguments=points), compare)

    def run(self, mode: str, task: str) -> None:
        """Samples one batch with `settings.steps` steps.

        Args:
            mode: one of `modes_of(task)`.
        """
        if mode == "plain":
            self._sample()
        elif mode == "floor":
            self._floor()
        elif mode == "released":
            given = self.tasks[task]
            sample_as_released(
                self.pipe,
                torch.cat([self.reference, self.latents]),
                PROMPT,
                head=given.term.head,
                compare=given.compare,
                num_inference_steps=self.settings.steps,
                guidance_scale=TEXT_GUIDANCE,
            )
        elif mode == "record":
            with ReadoutGuidance([self.tasks[task].term]).record(self.pipe):
                self._sample()
        else:
            with ReadoutGuidance([self.tasks[task].term], **GUIDED[mode]).attach(self.pipe):
                self._sample()

    def _sample(self) -> None:
        # The empty negative prompt is what the heads read under, and what the authors' code gives SDXL too.
        self.pipe(
            [PROMPT] * self.settings.images,
            negative_prompt=[""] * self.settings.images,
            num_inference_steps=self.settings.steps,
            guidance_scale=TEXT_GUIDANCE,
            latents=self.latents,
            output_type="latent",
        )

    def _floor(self) -> None:
        """What no guidance of one branch can do without: two forwards and a backward per step."""
        inputs, images = both_branches(self.pipe, PROMPT, self.latents), self.settings.images
        empty, given = (select_rows(inputs, rows, 2 * images) for rows in (slice(0, images), slice(images, 2 * images)))
        for timestep in self.timesteps:
            x = self.latents.detach().requires_grad_()
            features = predict(self.pipe.unet, x, timestep, **empty).features
            gradient_at(x, features, [torch.ones_like(feature, dtype=torch.float32) for feature in features])
            del features
            with torch.no_grad():
                self.pipe.unet(self.latents, timestep, return_dict=False, **given)


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
    """Samples per second of the whole training step: "cached" latents, and "encoding" the images every time."""
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
        drawn = {**batch, "epoch": batch["index"] * 0 + number}
        if encode:
            drawn["latent_mean"], drawn["latent_std"] = backbone.encode(batch["image"])
        optimizer.zero_grad()
        head.loss(head.readout(*head.sample_noise(drawn)), drawn).backward()
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
