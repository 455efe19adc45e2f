"""How far drags bring a point and what they leave alone: python -m experiments.applications.drags

Held-out renders are inverted; a hand or foot of each is dragged around its shoulder or hip. Where it ends is what
detectors find that know nothing of heads and features, and beside it what the usual matcher says, the nearest
neighbour in the backbone's own features. Every method starts from the same noise; what it made is kept, and the same
command goes on.
"""

import math
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Generator, Tensor

from experiments.applications.bench import Bench, Heads, check_methods, publish
from experiments.applications.drawing import draw_arrows
from experiments.quality.relative import RawFeatures
from rg.cli import claimed, command
from rg.data.samples import Samples
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import ReferenceTarget
from rg.heads.correspondence import CorrespondenceHead, nearest
from rg.heads.relative import pick
from rg.points import KEYPOINTS, MIRROR, Size, cells, inside

# What is dragged, and the joint that it turns around.
ENDS = {
    "right_wrist": "right_shoulder",
    "left_wrist": "left_shoulder",
    "right_ankle": "right_hip",
    "left_ankle": "left_hip",
}
REACH = 8.0  # pixels around the dragged limb that may change
MATCHED_AT = 50  # timestep whose features the usual matcher reads


BENDS = {"wrist": "elbow", "ankle": "knee"}


@dataclass(frozen=True)
class Drags:
    """One drag for each of B images: which keypoint (B,), from where and to where (B, 2), the joint it turns around
    (B, 2), in pixels; and where the elbow or knee between the two is (B, 2), or halfway where that is hidden."""

    keypoint: Tensor
    source: Tensor
    destination: Tensor
    pivot: Tensor
    bend: Tensor

    def along(self, count: int) -> tuple[Tensor, Tensor]:
        """Sources and destinations (B, count, 2) of points of the limb that turns as a whole, from its end inwards.

        They are evenly apart along end, bend and joint, the joint itself left out; one point is the end alone.
        """
        share = (torch.arange(count) / count)[None, :, None]
        ends, bend, pivot = self.source[:, None], self.bend[:, None], self.pivot[:, None]
        outer, inner = ends.lerp(bend, (2 * share).clamp(max=1)), bend.lerp(pivot, (2 * share - 1).clamp(min=0))
        points = torch.where(share < 0.5, outer, inner)
        start, goal = self.source - self.pivot, self.destination - self.pivot
        angle = torch.atan2(goal[:, 1], goal[:, 0]) - torch.atan2(start[:, 1], start[:, 0])
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
        return points, pivot + (points - pivot) @ turn.mT


def draw_drag(keypoints: Tensor, length: float, size: Size, generator: Generator) -> tuple[int, Tensor, Tensor] | None:
    """A visible hand or foot of keypoints (18, 3), where it comes to, and the joint that it turns around.

    Around that joint it turns by a chord of `length` pixels, to the one side or the other, inside the image. None
    where no limb can.
    """
    choices = []
    for end, joint in ENDS.items():
        index, pivot = KEYPOINTS.index(end), keypoints[KEYPOINTS.index(joint)]
        arm = keypoints[index, :2] - pivot[:2]
        if keypoints[index, 2] <= 0 or pivot[2] <= 0 or arm.norm() < length:
            continue
        for side in (-1, 1):
            angle = side * 2 * math.asin(length / 2 / float(arm.norm()))
            turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            goal = pivot[:2] + turn @ arm
            if inside(goal, size):
                choices.append((index, goal, pivot[:2]))
    if not choices:
        return None
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def draw_drags(samples: Samples, length: float, seed: int) -> tuple[list[int], Drags]:
    """The positions of the samples of one person that can be dragged, and their drags; the same at every call."""
    kept, drawn = [], []
    for position in range(len(samples)):
        generator = Generator().manual_seed(seed * 1_000_003 + int(samples.index[position]))
        found = draw_drag(samples.keypoints[position, 0], length, samples.size, generator)
        if found is not None:
            index, goal, pivot = found
            person = samples.keypoints[position, 0]
            side, end = KEYPOINTS[index].split("_")
            bend = person[KEYPOINTS.index(f"{side}_{BENDS[end]}")]
            bend = bend[:2] if bend[2] > 0 else (person[index, :2] + pivot) / 2
            kept.append(position)
            drawn.append((torch.tensor(index), person[index, :2], goal, pivot, bend))
    if not kept:
        raise ValueError(f"length: expected people with a limb to drag by {length} pixels, found none")
    return kept, Drags(*(torch.stack(values) for values in zip(*drawn, strict=True)))


def moved_part(drags: Drags, size: Size, reach: float = REACH) -> Tensor:
    """Pixels (B, H, W) bool within `reach` of the sector that the limb sweeps: what a drag may change."""
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in size)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    near = torch.zeros(len(drags.source), *size, dtype=torch.bool)
    for share in torch.linspace(0, 1, 9):
        start, end = drags.pivot, drags.source + share * (drags.destination - drags.source)
        along = (end - start)[:, None, None]
        offset = grid - start[:, None, None]
        part = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)[..., None]
        near |= (offset - part * along).norm(dim=-1) <= reach
    return near


def fidelity(edited: Tensor, reference: Tensor, outside: Tensor) -> Tensor:
    """PSNR in dB (B,) of images (B, 3, H, W) in [-1, 1] on the pixels `outside` (B, H, W) of what may change."""
    error = (edited - reference).square().mean(1)
    mean = (error * outside).sum((1, 2)) / outside.sum((1, 2)).clamp_min(1)
    return 10 * torch.log10(4 / mean.clamp_min(1e-10))


class DragBench(Bench):
    """The references with their drags."""

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        drawn: list[Drags] = []

        def choose(samples: Samples) -> list[int]:
            kept, drags = draw_drags(samples, cfg.length, cfg.seed)
            drawn.append(drags)
            return kept

        super().__init__(cfg, run_dir, choose)
        self.drags = drawn[0]
        self.outside = ~moved_part(self.drags, self.samples.size)
        self.raw = RawFeatures(**self.widths()).attach_backbone(self.backbone).eval()

    def terms(
        self, heads: Heads, rows: slice, *, points: int = 1, repulsion: float | None = None
    ) -> list[GuidanceTerm]:
        """The energies of the drags of a slice.

        Args:
            points: of the limb that are dragged; 1: its end alone.
            repulsion: of the correspondence heads; None: their own.
        """
        terms, ends = [], [values[rows] for values in self.drags.along(points)]
        for head, weight in heads:
            if not isinstance(head, CorrespondenceHead):
                terms.append(GuidanceTerm(head, ReferenceTarget(), weight))
                continue
            if repulsion is not None:
                head.hparams.repulsion = repulsion
            size = self.readout_size(head)
            source, destination = (cells(places, self.samples.size, size) for places in ends)
            reference = ReferenceTarget(keep=partial(pick, points=source.to(head.device)))
            terms.append(GuidanceTerm(head, reference, weight, {"source": source, "destination": destination}))
        return terms

    def score(self, images: Tensor) -> dict[str, list[float]]:
        """Of each image (B, 3, H, W): pixels from the goal by every detector, of the keypoint and of the nearer of it
        and its mirrored one, and whether that is less than half the way; pixels by the usual matcher; PSNR of what
        should stay; the share of attributes that the classifier reads as in the reference."""
        scores = {}
        for name, detector in self.detectors.items():
            points = detector.detect(images).points[:, 0]
            found = points[torch.arange(len(points)), self.drags.keypoint]
            other = points[torch.arange(len(points)), torch.tensor(MIRROR)[self.drags.keypoint]]
            far = torch.stack([(place - self.drags.destination).norm(dim=-1) for place in (found, other)])
            scores[f"distance, {name}"], scores[f"distance, {name}, either side"] = far[0], far.amin(0)
            scores[f"arrived, {name}"] = (far.amin(0) < self.cfg.length / 2).float()
        scores["distance, matcher"] = (self.match(images) - self.drags.destination).norm(dim=-1)
        scores["PSNR outside"] = fidelity(images, self.given, self.outside)
        scores["attributes kept"] = self.attributes_kept(images)
        return {name: values.tolist() for name, values in scores.items()}

    @torch.no_grad()
    def match(self, images: Tensor) -> Tensor:
        """Where the references' dragged points are in `images` by the nearest raw features: (B, 2) pixels."""
        found = []
        for rows in self.batches("matching"):
            index = self.samples.index[rows]
            maps = [
                self.raw.readout_at(
                    {"latent_mean": x, "latent_std": x * 0, "index": index, "epoch": index * 0}, MATCHED_AT
                )
                for x in (self.latents[rows], self.backbone.encode(images[rows])[0].cpu())
            ]
            found.append(nearest(*maps, self.drags.source[rows, None].to(maps[0]), self.samples.size)[:, 0].cpu())
        return torch.cat(found)


def run(cfg: DictConfig, run_dir: Path, command_line: str) -> str:
    """Makes and scores what is missing of all methods; writes results.json, table.md, grid.png; returns the table."""
    methods = check_methods(cfg.methods)
    with claimed(run_dir):
        bench = DragBench(cfg, run_dir)
        images = {
            name: bench.make(name, m, partial(bench.terms, **m.get("pull", {})), prompts=bench.samples.prompt)
            for name, m in methods.items()
        }
        scores = {name: bench.score(made) for name, made in {"reference": bench.given, **images}.items()}
        shown = {name: made[:GRID] for name, made in {"reference": bench.given, **images}.items()}
        ends = bench.drags.source, bench.drags.destination
        grid = {name: draw_arrows((made + 1) / 2, *ends) for name, made in shown.items()}
        arrows = torch.cat(ends, 1).tolist()
        return publish(bench, scores, "unguided", ["distance", "arrived"], grid, command_line, {"arrows": arrows})


GRID = 8


@command("experiments/drags")
def main(cfg: DictConfig) -> None:
    """Measures every method of the configuration and prints the table."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    print(run(cfg, run_dir, shlex.join(["python", "-m", "experiments.applications.drags", *sys.argv[1:]])))
    print(f"{run_dir}/grid.png")


if __name__ == "__main__":
    main()
