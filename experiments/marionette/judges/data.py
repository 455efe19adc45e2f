"""What the judges learn from: labelled renders, renders through the autoencoder, and images without a person."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm import tqdm, trange

from data_prep.marionette.render import render, render_scenes
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.vocabulary import ATTRIBUTES
from experiments.marionette.renders import world_id
from experiments.marionette.trainer import mixed_precision
from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.keypoints import crop, to_crops
from rg.io.files import atomic
from rg.io.images import from_bytes, to_bytes
from rg.points import MIRROR

KINDS = {"one": 0.55, "two": 0.3, "portrait": 0.15}
SPLITS = {"train": 0, "threshold": 1, "quality": 2}
LATENT_NOISE = 0.15  # largest standard deviation added to scaled latents, whose own is 1
CHUNK = 100
# Every so many images have colours that the embedded model never sees together: a judge sees all pairs alike.
UNSEEN_EVERY = 8
OUT_OF_SIGHT = (1e6, 1e6)  # a place on the ground that no camera sees
SECOND_PERSON = 32  # more than there are LABELS


class Renders(NamedTuple):
    """What judges are trained on and measured by.

    image: (N, 3, H, W) uint8, with people. keypoints: (N, P, 18, 3), (x, y, visible) in pixels, all 0 if absent.
    classes: (N, A) int64, the number of each attribute's class in ATTRIBUTES, -1 where it does not apply.
    parts: (N, H, W) uint8, numbers in LABELS, those of the second person from SECOND_PERSON on.
    """

    image: Tensor
    keypoints: Tensor
    classes: Tensor
    parts: Tensor


def class_numbers(attributes: Sequence[Mapping[str, str]]) -> Tensor:
    """Attributes in words as numbers of their classes in ATTRIBUTES, -1 for those that do not apply: (N, A) int64."""
    return torch.tensor(
        [[names.index(row[name]) if name in row else -1 for name, names in ATTRIBUTES.items()] for row in attributes]
    )


def make_renders(
    seed: int, split: str, count: int, *, side: int, kinds: Mapping[str, float], device: str | torch.device = "cpu"
) -> Renders:
    """Renders the first `count` images of a split, every UNSEEN_EVERY-th of colours that are never seen together."""
    parts = []
    for start in trange(0, count, CHUNK, desc=f"rendering {split}", unit_scale=CHUNK):
        indices = torch.arange(start, min(start + CHUNK, count))
        unseen = indices % UNSEEN_EVERY == UNSEEN_EVERY - 1
        for chosen, pairs in ((indices[~unseen], "seen"), (indices[unseen], "unseen")):
            if len(chosen):
                seeds = [(seed, SPLITS[split], index) for index in chosen.tolist()]
                stills = render(seeds, resolution=side, kinds=kinds, pairs=pairs, device=device)
                shown = stills.parts + SECOND_PERSON * (stills.instances == 2).to(torch.uint8)
                parts.append((chosen, stills.image, stills.keypoints, class_numbers(stills.attributes), shown))
    order, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return Renders(*(column[order.argsort()] for column in columns))


def through_autoencoder(images: Tensor, backbone: DiffusionBackbone, generator: Generator | None = None) -> Tensor:
    """Encodes and decodes images (N, 3, H, W) uint8: the mean of their latents.

    With a generator it is a sample of them, and noise of a random strength up to LATENT_NOISE.
    """
    parts = []
    for chunk in tqdm(images.split(CHUNK), desc="autoencoder", unit_scale=CHUNK):
        with mixed_precision(backbone.device):
            latents, std = (x.float().cpu() for x in backbone.encode(from_bytes(chunk)))
            if generator is not None:
                strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
                std = (std**2 + strength**2).sqrt()
                latents = latents + std * torch.randn(latents.shape, generator=generator)
            parts.append(to_bytes(backbone.decode(latents)))
    return torch.cat(parts)


def make_empty(seed: int, split: str, people: Tensor, backbone: DiffusionBackbone, generator: Generator) -> Tensor:
    """Renders without a person, as many as `people` (N, 3, H, W) uint8 and of each kind in turn.

    They are backgrounds, `people` cut into tiles that are shuffled, and decoded latents of noise, smooth or not.
    """
    n, side, few = len(people), people.shape[-1], -(-len(people) // 3)
    scenes = [draw_scene((seed, SPLITS[split], index), {"one": 1.0}) for index in range(few)]
    scenes = [
        replace(scene, people=tuple(replace(person, place=OUT_OF_SIGHT) for person in scene.people)) for scene in scenes
    ]
    alone = [render_scenes(scenes[i : i + 8], resolution=side, supersampling=1).image for i in range(0, few, 8)]
    tiles = F.unfold(people[:few].float(), side // 8, stride=side // 8)
    order = torch.rand(len(tiles), 1, tiles.shape[-1], generator=generator).argsort(-1).expand_as(tiles)
    shuffled = F.fold(tiles.gather(-1, order), people.shape[-2:], side // 8, stride=side // 8)
    h, w = backbone.latent_size
    noise = torch.randn(few, backbone.latent_channels, h, w, generator=generator)
    noise[::2] = 3 * F.avg_pool2d(noise[::2], 3, 1, 1)  # neighbours share noise: blobs in place of grain
    decoded = torch.cat([to_bytes(backbone.decode(chunk)) for chunk in noise.split(CHUNK)])
    return torch.stack([torch.cat(alone), shuffled.to(torch.uint8), decoded], 1).flatten(0, 1)[:n]


def make_training_renders(backbone: DiffusionBackbone, seed: int, count: int) -> tuple[Renders, Tensor]:
    """`count` renders, every second one through the autoencoder, and an eighth as many without a person (uint8)."""
    generator = Generator().manual_seed(seed)
    renders = make_renders(seed, "train", count, side=backbone.resolution[0], kinds=KINDS, device=backbone.device)
    empty = make_empty(seed, "train", renders.image[: max(3, count // 8)], backbone, generator)
    for images in (renders.image, empty):
        images[1::2] = through_autoencoder(images[1::2], backbone, generator)
    return renders, empty


def load_training_renders(backbone: DiffusionBackbone, settings: Mapping[str, Any]) -> tuple[Renders, Tensor]:
    """`make_training_renders`, kept in a file: both judges, and a run that goes on, need the same ones.

    Args:
        settings: seed, images (how many) and cache (a folder); other renders get other files.
    """
    seed, count = settings["seed"], settings["images"]
    name = repr((Renders._fields, seed, count, KINDS, LATENT_NOISE, world_id(seed), backbone.autoencoder_id))
    path = Path(settings["cache"]) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        renders, empty = make_training_renders(backbone, seed, count)
        with atomic(path) as temporary:
            save_file({**renders._asdict(), "empty": empty}, temporary)
    columns = load_file(path)
    empty = columns.pop("empty")
    return Renders(**columns), empty


def uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """(count,) numbers in [low, high)."""
    return torch.rand(count, generator=generator) * (high - low) + low


def jitter(count: int, generator: Generator, *, turn: float, zoom: float, shift: float) -> Tensor:
    """Random similarities, half of them mirrored, from output to input (see rg.detectors.keypoints.crop_matrices).

    Args:
        turn: largest angle. zoom: largest change of scale. shift: along each axis, in halves of the image.
    """
    angle, scale = uniform(count, -turn, turn, generator), uniform(count, 1 - zoom, 1 + zoom, generator)
    side = 1 - 2 * (uniform(count, -1, 1, generator) < 0).float()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    x, y = (uniform(count, -shift, shift, generator) for _ in range(2))
    rows = (torch.stack([side * cosine, -side * sine, x], -1), torch.stack([sine, cosine, y], -1))
    return torch.stack(rows, 1)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that first does `inner`, then `outer`: (N, 2, 3) each."""
    product = outer[..., :2] @ inner
    product[..., 2] += outer[..., 2]
    return product


def is_mirrored(matrices: Tensor) -> Tensor:
    """Which of matrices (N, 2, 3) exchange left and right: (N,) bool."""
    return torch.linalg.det(matrices[..., :2]) < 0


def warp(images: Tensor, keypoints: Tensor, matrices: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Moves images (N, 3, H, W) and keypoints (N, P, 18, 3) to squares of `side` pixels, by matrices (N, 2, 3)."""
    size = (images.shape[-2], images.shape[-1])
    points = to_crops(keypoints[..., :2].flatten(1, 2), matrices, size, side).view_as(keypoints[..., :2])
    keypoints = torch.cat([points, keypoints[..., 2:]], -1)
    mirrored = is_mirrored(matrices)[:, None, None, None]
    return crop(images, matrices, side), torch.where(mirrored, keypoints[:, :, list(MIRROR)], keypoints)


def degrade(images: Tensor, generator: Generator, *, blur: float, light: float, offset: float, noise: float) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] with random sharpness, brightness and noise.

    Args:
        blur: largest weight of the mean of 3x3 pixels. light: largest change of contrast. offset: of brightness.
        noise: largest standard deviation.
    """
    weight, gain, shift, grain = (
        uniform(len(images), low, high, generator).view(-1, 1, 1, 1)
        for low, high in ((0, blur), (1 - light, 1 + light), (-offset, offset), (0, noise))
    )
    smooth = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(smooth, weight) * gain + shift
    return (images + grain * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def is_present(keypoints: Tensor) -> Tensor:
    """Which people (..., 18, 3) there are: (...) bool."""
    return (keypoints != 0).flatten(-2).any(-1)
