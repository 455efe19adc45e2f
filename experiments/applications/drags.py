"""How far drags bring a point and what they leave alone: python -m experiments.applications.drags

Held-out renders are inverted; a hand or foot of each is dragged around its shoulder or hip. Where it ends is what
detectors find that know nothing of heads and features, and beside it what the usual matcher says, the nearest
neighbour in the backbone's own features. Every method starts from the same noise; what it made is kept, and the same
command goes on.
"""

import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Generator, Tensor

from experiments.quality.relative import RawFeatures
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.cli import claimed, command, compose_config
from rg.data.samples import Samples
from rg.data.shards import read_shards
from rg.detectors import AttributeClassifier
from rg.generation import generate, image_seeds
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import ReferenceTarget
from rg.heads import load_head
from rg.heads.correspondence import CorrespondenceHead, nearest
from rg.heads.relative import RelativeHead, pick
from rg.io.figures import image_grid, save_figure
from rg.io.files import write_json, write_text
from rg.io.images import from_bytes, open_saved, pixels, save_image, to_bytes
from rg.metrics.statistics import paired_gain
from rg.points import KEYPOINTS, Size, cells, inside, rescale

# What is dragged, and the joint that it turns around.
ENDS = {
    "right_wrist": "right_shoulder",
    "left_wrist": "left_shoulder",
    "right_ankle": "right_hip",
    "left_ankle": "left_hip",
}
REACH = 8.0  # pixels around the dragged limb that may change
MATCHED_AT = 50  # timestep whose features the usual matcher reads


class RawCorrespondence(CorrespondenceHead):
    """The correspondence energy on the backbone's own features, which DragDiffusion and DIFT compare."""

    forward = RawFeatures.forward


@dataclass(frozen=True)
class Drags:
    """One drag for each of B images: which keypoint (B,), from where and to where (B, 2), the joint it turns around
    (B, 2), in pixels."""

    keypoint: Tensor
    source: Tensor
    destination: Tensor
    pivot: Tensor


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
            kept.append(position)
            drawn.append((torch.tensor(index), samples.keypoints[position, 0, index, :2], goal, pivot))
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


class Bench:
    """The images, their drags and inverted noise, and who judges what becomes of them."""

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        edit = compose_config("edit", [f"world={cfg.world}", "+experiment=drag"])
        self.guidance = edit.guidance
        self.sampling = {**OmegaConf.to_container(edit.sampling, resolve=True), **cfg.sampling}
        self.backbone: DiffusionBackbone = instantiate(edit.world.backbone)
        self.detectors = {name: instantiate(detector) for name, detector in cfg.detectors.items()}
        self.classifier = AttributeClassifier.from_pretrained(cfg.classifier)
        builder = compose_config("train", [f"world={cfg.world}", "data=pose"]).data.builder
        instantiate(builder)(split=cfg.split, n=cfg.images)
        folder = Path(builder.root) / cfg.split
        found = read_shards(folder, cfg.images, autoencoder_id=self.backbone.autoencoder_id)
        kept, self.drags = draw_drags(found, cfg.length, cfg.seed)
        self.samples: Samples = found.take(kept)
        self.given = from_bytes(self.samples.decoded())
        self.latents = torch.stack([self.samples[i]["latent_mean"] for i in range(len(kept))])
        self.outside = ~moved_part(self.drags, self.samples.size)
        self.raw = RawFeatures(**self._widths()).attach_backbone(self.backbone).eval()
        self.noise: Tensor | None = None
        taps = self.backbone.predict(self.latents[:1].to(self.backbone.device), torch.zeros(1)).features
        self.grid = (taps[-1].shape[-2], taps[-1].shape[-1])

    def _widths(self) -> dict[str, Any]:
        widths = {"tap_channels": self.backbone.tap_channels, "time_embed_dim": self.backbone.time_embed_dim}
        return {**widths, "output_scale": 2, "projection_dim": 8, "norm_groups": 1}

    def batches(self, what: str) -> Iterator[slice]:
        """Slices of the images, with a progress bar."""
        size, count = self.cfg.batch_size, len(self.samples)
        yield from track([slice(i, min(i + size, count)) for i in range(0, count, size)], description=what)

    def invert(self) -> Tensor:
        """The noise (B, C, h, w) that deterministic sampling under each image's own description leads back from."""
        steps, parts = self.sampling["num_inference_steps"], []
        for rows in self.batches("inverting"):
            pairs = zip(self.latents[rows], self.samples.prompt[rows], strict=True)
            parts += [invert(self.backbone, x[None], num_inference_steps=steps, prompt=text) for x, text in pairs]
        return torch.cat(parts)

    def head(self, name: str) -> RelativeHead:
        """A relative head by name or folder, "raw" for none: the backbone's features."""
        head = RawCorrespondence(**self._widths()).eval() if name == "raw" else load_head(name)
        if not isinstance(head, RelativeHead):
            raise ValueError(
                f"methods: {name}: expected a head that compares with a reference, got {type(head).__name__}"
            )
        head.check_taps(self.backbone.tap_channels, self.backbone.time_embed_dim, self.backbone.condition_dim)
        return head.to(self.backbone.device).requires_grad_(False)

    def terms(self, heads: Mapping[str, tuple[RelativeHead, float]], rows: slice) -> list[GuidanceTerm]:
        """The energies of the drags of some images."""
        terms = []
        for head, weight in heads.values():
            scale = head.hparams.output_scale
            size = (scale * self.grid[0], scale * self.grid[1])
            if not isinstance(head, CorrespondenceHead):
                terms.append(GuidanceTerm(head, ReferenceTarget(), weight))
                continue
            ends = (self.drags.source[rows], self.drags.destination[rows])
            source, destination = (cells(points[:, None], self.samples.size, size) for points in ends)
            reference = ReferenceTarget(keep=partial(pick, points=source.to(head.device)))
            terms.append(GuidanceTerm(head, reference, weight, {"source": source, "destination": destination}))
        return terms

    def make(self, name: str, method: Mapping[str, Any]) -> Tensor:
        """What a method makes of every image: (B, 3, H, W) in [-1, 1], as it is saved."""
        heads = {term: (self.head(term), float(weight)) for term, weight in method["heads"].items()}
        if heads and not any(weight for _, weight in heads.values()):
            raise ValueError(f"methods.{name}.heads: expected a weight other than 0, got {method['heads']}")
        for rows in self.batches(name):
            paths = [self.run_dir / name / f"{i:05d}.png" for i in range(rows.start, rows.stop)]
            if all(path.is_file() for path in paths):
                continue
            if self.noise is None:
                self.noise = self.invert()
            for image, path in zip(self._edit(heads, method, rows), paths, strict=True):
                save_image(image, path)
        saved = [self.run_dir / name / f"{i:05d}.png" for i in range(len(self.samples))]
        return torch.stack([from_bytes(pixels(open_saved(path, self.samples.size))) for path in saved])

    def _edit(self, heads: Mapping[str, tuple[RelativeHead, float]], method: Mapping[str, Any], rows: slice) -> Tensor:
        arguments = {**self.sampling, "seeds": image_seeds(self.cfg.seed, range(rows.start, rows.stop))}
        arguments |= {"latents": self.noise[rows], **method.get("sampling", {})}
        prompts, pipe, guidance = self.samples.prompt[rows], self.backbone.pipeline, None
        if heads:
            guidance = instantiate(self.guidance, **method.get("guidance", {}))(terms=self.terms(heads, rows))
            with guidance.record(pipe):  # an inverted image comes back without text guidance alone
                generate(pipe, prompts, **{**arguments, "guidance_scale": 1.0})
        return generate(pipe, prompts, guidance=guidance, **arguments)

    def score(self, images: Tensor) -> dict[str, list[float]]:
        """Of each image (B, 3, H, W): pixels from the goal by every detector and by the usual matcher, PSNR of what
        should stay, and the share of attributes that the classifier reads as in the given image."""
        scores = {}
        for name, detector in self.detectors.items():
            points = detector.detect(images).points[:, 0]
            found = points[torch.arange(len(points)), self.drags.keypoint]
            scores[f"distance, {name}"] = (found - self.drags.destination).norm(dim=-1)
        scores["distance, matcher"] = (self.match(images) - self.drags.destination).norm(dim=-1)
        scores["PSNR outside"] = fidelity(images, self.given, self.outside)
        scores["attributes kept"] = self.kept(images)
        return {name: values.tolist() for name, values in scores.items()}

    @torch.no_grad()
    def match(self, images: Tensor) -> Tensor:
        """Where the given images' dragged points are in `images` by the nearest raw features: (B, 2) pixels."""
        found = []
        for rows in self.batches("matching"):
            latents = self.backbone.encode(images[rows])[0].cpu()
            index = self.samples.index[rows]
            maps = [
                self.raw.readout_at(
                    {"latent_mean": x, "latent_std": x * 0, "index": index, "epoch": index * 0}, MATCHED_AT
                )
                for x in (self.latents[rows], latents)
            ]
            found.append(nearest(*maps, self.drags.source[rows, None].to(maps[0]), self.samples.size)[:, 0].cpu())
        return torch.cat(found)

    def kept(self, images: Tensor) -> Tensor:
        """Share of attributes (B,) that read as in the given images."""
        pairs = zip(self.classifier.read(self.given), self.classifier.read(images), strict=True)
        return torch.tensor([sum(now.get(name) == was[name] for name in was) / len(was) for was, now in pairs])


def table(methods: Mapping[str, dict[str, list[float]]], baseline: str = "unguided") -> str:
    """Markdown: a row per method; mean of every score, and of distances the paired gain on the baseline (95 %)."""
    names = list(next(iter(methods.values())))
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method, scores in methods.items():
        row = []
        for name in names:
            values = torch.tensor(scores[name])
            text = f"{values.mean():.2f}"
            if name.startswith("distance") and method != baseline and baseline in methods and len(values) > 1:
                gain = paired_gain(torch.tensor(methods[baseline][name]), values)
                text += f" ({gain['low']:+.2f} to {gain['high']:+.2f})"
            row.append(text)
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def run(cfg: DictConfig, run_dir: Path, command_line: str) -> str:
    """Makes and scores what is missing of all methods; writes results.json, table.md, grid.png; returns the table."""
    for name, method in cfg.methods.items():
        if "heads" not in (method or {}):
            raise ValueError(f"methods.{name}: expected {{heads: {{NAME: weight}}}}, got {method}")
    with claimed(run_dir):
        bench, images = Bench(cfg, run_dir), {}
        scores = {"given": bench.score(bench.given)}
        for name, method in OmegaConf.to_container(cfg.methods, resolve=True).items():
            images[name] = bench.make(name, method)
            scores[name] = bench.score(images[name])
        text = table(scores)
        shown = {"given": bench.given[:GRID]} | {name: made[:GRID] for name, made in images.items()}
        grid = {name: draw_arrows((made + 1) / 2, bench.drags) for name, made in shown.items()}
        save_figure(image_grid(grid, side=128), run_dir / "grid.png")
        write_text(run_dir / "table.md", text)
        write_json(run_dir / "results.json", {"command": command_line, "images": len(bench.samples), "scores": scores})
    return text


GRID = 8


def draw_arrows(images: Tensor, drags: Drags, scale: int = 4) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], `scale` times as large, with each drag's arrow."""
    size = (scale * images.shape[-2], scale * images.shape[-1])
    drawn = []
    for image, *ends in zip(F.interpolate(images, size), drags.source, drags.destination, strict=False):
        canvas = np.ascontiguousarray(to_bytes(image * 2 - 1).permute(1, 2, 0).numpy())
        start, end = (tuple(int(v) for v in rescale(p, images.shape[-2:], size).round().tolist()) for p in ends)
        cv2.arrowedLine(canvas, start, end, (0, 0, 0), 4, cv2.LINE_AA, tipLength=0.3)
        cv2.arrowedLine(canvas, start, end, (255, 255, 0), 2, cv2.LINE_AA, tipLength=0.3)
        drawn.append(from_bytes(torch.from_numpy(canvas).permute(2, 0, 1)))
    return (torch.stack(drawn) + 1) / 2


@command("experiments/drags")
def main(cfg: DictConfig) -> None:
    """Measures every method of the configuration and prints the table."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    print(run(cfg, run_dir, shlex.join(["python", "-m", "experiments.applications.drags", *sys.argv[1:]])))
    print(f"{run_dir}/grid.png")


if __name__ == "__main__":
    main()
