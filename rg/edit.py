"""Images after a reference image: python -m rg.edit +experiment=variation (Luo et al., 2024, section 4)"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from torch import Tensor

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.cli import command, link_latest
from rg.generation import (
    Watch,
    check_sampling,
    crop_box,
    generate,
    generate_in_batches,
    image_seeds,
    image_size,
    set_scheduler,
    show_progress,
    watched,
)
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.step import StepTrace
from rg.guidance.targets import ReferenceTarget
from rg.heads import load_head
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import RelativeHead, pick
from rg.io.figures import image_grid, save_figure
from rg.io.images import from_bytes, load_control, pixels, save_image
from rg.points import Size, box_cells, cells, inside, rescale

log = logging.getLogger(__name__)


def parse_terms(terms: Any) -> list[tuple[str, float, str | None]]:
    """(head, weight, class) of each of `terms`: a head's name or folder alone, or a mapping of these keys.

    Raises:
        ValueError: there is no term, one is something else, or all weights are 0.
    """
    if not OmegaConf.is_list(terms) or not len(terms):
        raise ValueError(f"terms: expected a list such as [{{head: appearance, weight: 1.0}}], got {terms}")
    found = []
    for number, term in enumerate(terms):
        given = {"head": term} if isinstance(term, str) else dict(term) if OmegaConf.is_dict(term) else {}
        unknown = set(given) - {"head", "weight", "class"}
        if unknown or not isinstance(given.get("head"), str):
            raise ValueError(f"terms[{number}]: expected {{head: NAME, weight: 1.0, class: null}}, got {term}")
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"terms[{number}].weight: expected a number, got {weight!r}")
        found.append((given["head"], float(weight), given.get("class")))
    if not any(weight for _, weight, _ in found):
        raise ValueError(f"terms: expected a weight other than 0, got {terms}")
    return found


def load_heads(cfg: DictConfig, backbone: DiffusionBackbone) -> list[tuple[RelativeHead, float]]:
    """The relative heads of `cfg.terms` and their weights, on the backbone's device.

    Raises:
        FileNotFoundError: there is no such head.
        ValueError: see `parse_terms`; a class that is no head, a head that is not relative or was made for another
            backbone, a correspondence head without a drag, or a drag without one.
    """
    heads = [(load_head(name, class_path), weight) for name, weight, class_path in parse_terms(cfg.terms)]
    for number, (head, _) in enumerate(heads):
        if not isinstance(head, RelativeHead):
            raise ValueError(
                f"terms[{number}].head: expected one that compares with a reference, got a {type(head).__name__}"
            )
        head.check_taps(backbone.tap_channels, backbone.time_embed_dim, backbone.condition_dim)
        head.to(backbone.device)
    if any(isinstance(head, CorrespondenceHead) for head, _ in heads) != (cfg.drag is not None):
        raise ValueError(f"drag: expected one with a correspondence head, and none without; got drag={cfg.drag}")
    return heads


@dataclass(frozen=True)
class Frame:
    """The part of an image of `given` (height, width) that is seen, of the shape of the images of `made` pixels."""

    given: Size
    made: Size

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of the given image, the last two exclusive."""
        return crop_box(self.given, self.made)

    @property
    def size(self) -> Size:
        """(height, width) of the box."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    def __str__(self) -> str:
        seen = "" if self.size == self.given else f", in {list(self.box)}, the centre that is used"
        return f"inside {self.given[1]}x{self.given[0]} pixels{seen}"


def parse_drag(rows: Any, frame: Frame) -> Tensor | None:
    """The points (n, 2, 2) of a drag, (x, y) from and to, in pixels of the images that are made.

    Args:
        rows: the points in pixels of the image that was given.

    Raises:
        ValueError: rows are no lists of 4 numbers, or leave the part of the image that is seen.
    """
    if rows is None:
        return None
    points = _numbers("drag", rows, "a list of [from x, from y, to x, to y]").unflatten(1, (2, 2))
    seen = points - torch.tensor(frame.box[:2])
    if not inside(seen, frame.size).all():
        raise ValueError(f"drag: expected places {frame}, got {rows}")
    return rescale(seen, frame.size, frame.made)


def parse_boxes(rows: Any, frame: Frame) -> Tensor | None:
    """The boxes (2, 4) of the reference and of the new images, in pixels of the images that are made.

    Args:
        rows: left, top, right and bottom, the last two exclusive, in pixels of the image that was given.

    Raises:
        ValueError: rows are not two lists of 4 numbers, have no area, or leave the part of the image that is seen.
    """
    if rows is None:
        return None
    boxes = _numbers("boxes", rows, "2 lists of [left, top, right, bottom]")
    if len(boxes) != 2:
        raise ValueError(f"boxes: expected 2 lists of [left, top, right, bottom], got {rows}")
    corners = boxes.unflatten(1, (2, 2)) - torch.tensor(frame.box[:2])
    within = inside(corners - torch.tensor([[0.0], [1.0]]), frame.size).all()
    if not within or (corners[:, 0] >= corners[:, 1]).any():
        raise ValueError(f"boxes: expected places {frame} left of and above their ends, got {rows}")
    scale = torch.tensor([frame.made[1] / frame.size[1], frame.made[0] / frame.size[0]])
    return (corners * scale).flatten(1)


def _numbers(name: str, rows: Any, expected: str) -> Tensor:
    """(n, 4) float32; raises ValueError where rows are no lists of 4 numbers."""
    try:
        numbers = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected {expected}, got {rows}") from error
    if numbers.ndim != 2 or numbers.shape[1] != 4:
        raise ValueError(f"{name}: expected {expected}, got {rows}")
    return numbers


def make_term(
    head: RelativeHead, weight: float, drag: Tensor | None, boxes: Tensor | None, image_size: Size, readout_size: Size
) -> GuidanceTerm:
    """The energy of one head, with the points of `parse_drag` or the boxes of `parse_boxes` in cells of its readout."""
    if isinstance(head, CorrespondenceHead):
        source, destination = cells(drag, image_size, readout_size)[None].unbind(2)
        reference = ReferenceTarget(keep=partial(pick, points=source.to(head.device)))
        return GuidanceTerm(head, reference, weight, {"source": source, "destination": destination})
    arguments = {}
    if boxes is not None:
        arguments["boxes"] = tuple(box_cells(boxes, image_size, readout_size)[:, None])
    return GuidanceTerm(head, ReferenceTarget(), weight, arguments)


class Edit:
    """Images after a reference: its readouts are recorded once, then steer the new images.

    Args:
        cfg: as of conf/edit.yaml.
        run_dir: gets reference.png, the new images as 00000.png, ..., and grid.png.
        backbone: the one of `cfg.world` where it is loaded already.
        noise: what `reference_noise` gave for the same reference, prompt and steps, where that is known already.
        watch: see rg.generation.watched.

    Attributes:
        trace: of the guided images, step by step, once `run` is through; see rg.guidance.ReadoutGuidance.
        noise: of the reference, once `run` is through.
        rows: all images by name, (B, 3, H, W) in [-1, 1] each, once `run` is through.

    Raises:
        FileNotFoundError: there is no such head.
        ValueError: an unknown `noise`, fewer than one image, or one at once, or see `load_heads`, `parse_drag` and
            `parse_boxes`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run_dir: Path,
        *,
        backbone: DiffusionBackbone | None = None,
        noise: Tensor | None = None,
        watch: Watch | None = None,
    ) -> None:
        for name in ("images", "batch_size"):
            if cfg[name] < 1:
                raise ValueError(f"{name}: expected at least 1, got {cfg[name]}")
        if cfg.noise not in ("new", "reference"):
            raise ValueError(f"noise: expected new or reference, got {cfg.noise}")
        self.cfg, self.run_dir, self.prompt = cfg, run_dir, cfg.prompt or ""
        self.trace: list[StepTrace] = []
        self.rows: dict[str, Tensor] = {}
        self.backbone: DiffusionBackbone = instantiate(cfg.world.backbone) if backbone is None else backbone
        self.noise, self.watch = noise, watch
        self.heads = load_heads(cfg, self.backbone)
        self.sampling = check_sampling(self.backbone, cfg.sampling)
        self.size = image_size(self.backbone, cfg.sampling)
        self.image = None if cfg.reference is None else self.read_reference()
        frame = Frame(self.size if self.image is None else (self.image.height, self.image.width), self.size)
        self.drag = parse_drag(cfg.drag, frame)
        self.boxes = parse_boxes(cfg.boxes, frame)
        if frame.size != frame.made:
            crop = f"{list(frame.box)} of {frame.given[1]}x{frame.given[0]} pixels"
            log.info("reference: %s: %s, resized to %dx%d", cfg.reference, crop, self.size[1], self.size[0])
        set_scheduler(self.backbone.pipeline, cfg.scheduler)

    def read_reference(self) -> Image.Image:
        """The image that `cfg.reference` names, as it is.

        Raises:
            FileNotFoundError, ValueError: it is missing or cannot be read, or the scheduler cannot invert it.
        """
        cfg = self.cfg
        if cfg.scheduler != "ddim" or cfg.sampling.eta:
            raise ValueError(
                f"reference: expected scheduler=ddim and sampling.eta=0, which can be inverted, got {cfg.scheduler} "
                f"and {cfg.sampling.eta}"
            )
        image = load_control(cfg.reference, self.size, "reference")
        if not isinstance(image, Image.Image):
            raise ValueError(f"reference={cfg.reference}: expected an image, found keypoints")
        return image

    def reference_noise(self) -> Tensor:
        """Noise (1, C, h, w) from which the reference is sampled: an image's, by inversion, or that of the seed."""
        cfg, backbone = self.cfg, self.backbone
        if self.image is None:
            generator = torch.Generator("cpu").manual_seed(image_seeds(cfg.seed, [0])[0])
            side = backbone.pipeline.vae_scale_factor
            shape = (1, backbone.latent_channels, self.size[0] // side, self.size[1] // side)
            return torch.randn(shape, generator=generator).to(backbone.device, backbone.denoiser.dtype)
        height, width = self.size
        part = ImageOps.fit(self.image, (width, height), Image.Resampling.LANCZOS)
        latents = backbone.encode(from_bytes(pixels(part)[None]))[0]
        return invert(backbone, latents, num_inference_steps=cfg.sampling.num_inference_steps, prompt=self.prompt)

    def terms(self, noise: Tensor) -> list[GuidanceTerm]:
        """The energies of all heads, on the grid of the readouts that latents like `noise` give."""
        backbone = self.backbone
        taps = backbone.predict(noise.float(), torch.zeros(1, device=noise.device)).features
        grid = taps[-1].shape[-2:]
        return [
            make_term(
                head,
                weight,
                self.drag,
                self.boxes,
                self.size,
                (grid[0] * head.hparams.output_scale, grid[1] * head.hparams.output_scale),
            )
            for head, weight in self.heads
        ]

    def reference(self, noise: Tensor, guidance: ReadoutGuidance) -> Tensor:
        """The reference (1, 3, H, W) in [-1, 1], sampled from its noise while guidance records its readouts."""
        arguments = dict(self.sampling)
        if self.image is not None:
            # An inverted image comes back without text guidance alone, and both branches run with a little of it.
            arguments["guidance_scale"] = 1.0001 if guidance.branch == "both" else 1.0
        if not isinstance(arguments.get("negative_prompt"), str):  # a list is of the new images
            arguments.pop("negative_prompt", None)
        show_progress(self.backbone.pipeline, "reference")
        with watched(self.backbone.pipeline, self.watch, "reference"), guidance.record(self.backbone.pipeline):
            seeds = image_seeds(self.cfg.seed, [0])
            return generate(self.backbone.pipeline, [self.prompt], seeds=seeds, latents=noise, **arguments)

    def run(self) -> Tensor:
        """Writes everything; returns the new images (B, 3, H, W) in [-1, 1]."""
        cfg, pipe = self.cfg, self.backbone.pipeline
        noise = self.noise = self.reference_noise() if self.noise is None else self.noise
        guidance: ReadoutGuidance = instantiate(cfg.guidance)(terms=self.terms(noise))
        guidance.check_noise(cfg.sampling.get("eta"))
        reference = self.reference(noise, guidance)
        arguments = {"seeds": image_seeds(cfg.seed, range(1, 1 + cfg.images)), **self.sampling}
        arguments["batch_size"] = cfg.batch_size
        if cfg.noise == "reference":
            arguments["latents"] = noise.expand(cfg.images, -1, -1, -1)
        prompts = [self.prompt if cfg.edit_prompt is None else cfg.edit_prompt] * cfg.images
        show_progress(pipe, "unguided")
        with watched(pipe, self.watch, "unguided"):
            unguided, _ = generate_in_batches(pipe, prompts, **arguments)
        show_progress(pipe, "guided")
        with watched(pipe, self.watch, "guided"):
            guided, self.trace = generate_in_batches(pipe, prompts, guide=lambda _: guidance, **arguments)
        self.rows = {"reference": reference.expand(cfg.images, -1, -1, -1), "unguided": unguided, "guided": guided}
        self.write(self.rows)
        energies = [float(step.energy.mean()) for step in self.trace]
        if energies:
            log.info("mean energy: %.4f at the first guided step, %.4f at the last", energies[0], energies[-1])
        return guided

    def write(self, rows: dict[str, Tensor]) -> None:
        """Writes the images of rows, (B, 3, H, W) in [-1, 1] each, and the grid of them all."""
        save_image(rows["reference"][0], self.run_dir / "reference.png")
        for number, image in enumerate(rows["guided"]):
            save_image(image, self.run_dir / f"{number:05d}.png")
        grid = image_grid({name: (row + 1) / 2 for name, row in rows.items()}, side=128)
        save_figure(grid, self.run_dir / "grid.png")
        link_latest(self.run_dir)
        print(f"{self.run_dir}/grid.png")


@command("edit", stopped="nothing is kept; the same command begins again")
def main(cfg: DictConfig) -> None:
    """Samples into Hydra's run folder."""
    Edit(cfg, Path(HydraConfig.get().runtime.output_dir)).run()


if __name__ == "__main__":
    main()
