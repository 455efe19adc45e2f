"""Images after a reference image: python -m rg.edit +experiment=variation (Luo et al., 2024, section 4)"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageOps
from torch import Tensor

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.cli import clear_errors, point_latest
from rg.generation import generate, image_seeds, set_scheduler
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import ReferenceTarget
from rg.heads import load_head
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import RelativeHead, pick
from rg.io.figures import image_grid, save_figure
from rg.io.images import from_bytes, load_control, pixels, save_image
from rg.points import Size, box_cells, cells, inside

log = logging.getLogger(__name__)


def load_heads(cfg: DictConfig, backbone: DiffusionBackbone) -> list[tuple[RelativeHead, float]]:
    """The relative heads of `cfg.heads`, `cfg.weights` and `cfg.classes`, on the backbone's device.

    Raises:
        FileNotFoundError: there is no such head.
        ValueError: there is none, another number of weights or classes, a class that is no head, a head that is not
            relative or was made for another backbone, a correspondence head without a drag, or a drag without one.
    """
    weights = [1.0] * len(cfg.heads) if cfg.weights is None else list(cfg.weights)
    if not cfg.heads or len(weights) != len(cfg.heads):
        raise ValueError(f"heads, weights: expected one weight for each of some heads, got {cfg.heads}, {cfg.weights}")
    classes = [None] * len(cfg.heads) if cfg.classes is None else list(cfg.classes)
    if len(classes) != len(cfg.heads):
        raise ValueError(f"classes: expected one or null for each of heads={cfg.heads}, got {cfg.classes}")
    loaded = [load_head(name, class_path) for name, class_path in zip(cfg.heads, classes, strict=True)]
    heads = [(head, float(weight)) for head, weight in zip(loaded, weights, strict=True)]
    for head, _ in heads:
        if not isinstance(head, RelativeHead):
            raise ValueError(f"heads: expected heads that compare with a reference, found a {type(head).__name__}")
        head.check_taps(backbone.tap_channels, backbone.time_embed_dim, backbone.condition_dim)
        head.to(backbone.device)
    if any(isinstance(head, CorrespondenceHead) for head, _ in heads) != (cfg.drag is not None):
        raise ValueError(f"drag: expected one with a correspondence head, and none without; got drag={cfg.drag}")
    return heads


def read_places(cfg: DictConfig, image_size: Size) -> tuple[Tensor | None, Tensor | None]:
    """The drag's points (n, 2, 2) of (x, y), from and to, and the two boxes (2, 4), in pixels; None where not given.

    Raises:
        ValueError: they have another form, or leave an image of image_size (height, width).
    """
    places = []
    for name, count in (("drag", None), ("boxes", 2)):
        rows = None if cfg[name] is None else [list(row) for row in cfg[name]]
        if rows is None:
            places.append(None)
            continue
        if not rows or len(rows) != (count or len(rows)) or any(len(row) != 4 for row in rows):
            raise ValueError(f"{name}: expected {count or 'some'} lists of 4 numbers, got {rows}")
        numbers = torch.tensor(rows, dtype=torch.float32)
        corners = numbers.unflatten(1, (2, 2))
        # A box's right and bottom are exclusive.
        within = inside(corners - torch.tensor([[0.0], [1.0]]) if name == "boxes" else corners, image_size).all()
        if not within or (name == "boxes" and (corners[:, 0] >= corners[:, 1]).any()):
            raise ValueError(f"{name}: expected places inside {image_size[1]}x{image_size[0]} pixels, got {rows}")
        places.append(corners if name == "drag" else numbers)
    return places[0], places[1]


def make_term(
    head: RelativeHead, weight: float, drag: Tensor | None, boxes: Tensor | None, image_size: Size, readout_size: Size
) -> GuidanceTerm:
    """The energy of one head, with points or boxes (see `read_places`) moved to the cells of its readout."""
    if isinstance(head, CorrespondenceHead):
        source, destination = cells(drag, image_size, readout_size)[None].unbind(2)
        reference = ReferenceTarget(keep=partial(pick, points=source.to(head.device)))
        return GuidanceTerm(head, reference, weight, {"source": source, "destination": destination})
    arguments = {}
    if boxes is not None:
        arguments["boxes"] = tuple(box_cells(boxes, image_size, readout_size)[:, None])
    return GuidanceTerm(head, ReferenceTarget(), weight, arguments)


def reference_noise(cfg: DictConfig, backbone: DiffusionBackbone) -> Tensor:
    """Noise (1, C, h, w) from which the reference is sampled: an image's, by inversion, or that of the seed.

    Raises:
        FileNotFoundError, ValueError: the image is missing or cannot be read, or the scheduler cannot invert it.
    """
    if cfg.reference is None:
        generator = torch.Generator("cpu").manual_seed(image_seeds(cfg.seed, [0])[0])
        noise = torch.randn((1, backbone.latent_channels, *backbone.latent_size), generator=generator)
        return noise.to(backbone.device, backbone.denoiser.dtype)
    if cfg.scheduler != "ddim" or cfg.sampling.eta:
        raise ValueError(
            f"image: expected scheduler=ddim and sampling.eta=0, which can be inverted, got {cfg.scheduler} and "
            f"{cfg.sampling.eta}"
        )
    image = load_control(cfg.reference, backbone.resolution)
    if not isinstance(image, Image.Image):
        raise ValueError(f"reference={cfg.reference}: expected an image, found keypoints")
    height, width = backbone.resolution
    square = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    latents = backbone.encode(from_bytes(pixels(square)[None]))[0]
    return invert(backbone, latents, num_inference_steps=cfg.sampling.num_inference_steps, prompt=cfg.prompt)


def edit(cfg: DictConfig, run_dir: Path) -> Tensor:
    """Writes reference.png, new images and grid.png into run_dir; returns the images (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: see the functions above; an unknown `noise`, or fewer than one image.
    """
    if cfg.images < 1 or cfg.noise not in ("new", "reference"):
        raise ValueError(f"images, noise: expected at least 1, and new or reference; got {cfg.images} and {cfg.noise}")
    backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
    heads, (drag, boxes) = load_heads(cfg, backbone), read_places(cfg, backbone.resolution)
    pipe, sampling = backbone.pipeline, dict(cfg.sampling)
    set_scheduler(pipe, cfg.scheduler)
    noise = reference_noise(cfg, backbone)
    grid = backbone.predict(noise.float(), torch.zeros(1, device=noise.device)).features[-1].shape[-2:]
    scaled = [(head, weight, [side * head.hparams.output_scale for side in grid]) for head, weight in heads]
    terms = [make_term(head, weight, drag, boxes, backbone.resolution, (h, w)) for head, weight, (h, w) in scaled]
    guidance: ReadoutGuidance = instantiate(cfg.guidance)(terms=terms)
    pipe.set_progress_bar_config(disable=False)
    # An inverted image comes back without text guidance alone.
    plain = sampling if cfg.reference is None else {**sampling, "guidance_scale": 1.0}
    with guidance.record(pipe):
        reference = generate(pipe, [cfg.prompt], seeds=image_seeds(cfg.seed, [0]), latents=noise, **plain)
    arguments: dict[str, Any] = {"seeds": image_seeds(cfg.seed, range(1, 1 + cfg.images)), **sampling}
    if cfg.noise == "reference":
        arguments["latents"] = noise.expand(cfg.images, -1, -1, -1)
    prompts = [cfg.prompt if cfg.edit_prompt is None else cfg.edit_prompt] * cfg.images
    rows = {"reference": reference.expand(cfg.images, -1, -1, -1), "unguided": generate(pipe, prompts, **arguments)}
    rows["guided"] = generate(pipe, prompts, guidance=guidance, **arguments)
    save_image(reference[0], run_dir / "reference.png")
    for number, image in enumerate(rows["guided"]):
        save_image(image, run_dir / f"{number:05d}.png")
    save_figure(image_grid({name: (row + 1) / 2 for name, row in rows.items()}, side=128), run_dir / "grid.png")
    point_latest(run_dir)
    energies = [float(step.energy.mean()) for step in guidance.trace]
    if energies:
        log.info("mean energy: %.4f at the first guided step, %.4f at the last", energies[0], energies[-1])
    print(f"{run_dir}/grid.png")
    return rows["guided"]


@hydra.main(version_base="1.3", config_path="../conf", config_name="edit")
@clear_errors
def main(cfg: DictConfig) -> None:
    """Samples into Hydra's run folder."""
    edit(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
