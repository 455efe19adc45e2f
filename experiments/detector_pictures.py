"""What the keypoint detector learns from: renders, renders through the autoencoder, and pictures without a person."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm, trange

from data_prep.marionette import render, render_scenes
from data_prep.marionette.scene import draw_scene
from rg.backbone import DiffusionBackbone
from rg.detectors import MIRROR
from rg.metrics import box_side
from rg.points import Size, rescale

KINDS = {"one": 0.8, "two": 0.1, "portrait": 0.1}
SPLITS = {"train": 0, "threshold": 1, "quality": 2}
LATENT_NOISE = 0.15  # largest standard deviation added to scaled latents, whose own is 1
CHUNK = 100


class Pictures(NamedTuple):
    """What one step of training draws from.

    image: (N, 3, H, W) uint8, with a person. keypoints: (N, 18, 3), (x, y, visible) of the largest person in pixels.
    empty: (M, 3, H, W) uint8, without a person.
    """

    image: Tensor
    keypoints: Tensor
    empty: Tensor


def render_people(seed: int, split: str, count: int, *, side: int, kinds: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Renders the first `count` pictures of a split: (count, 3, side, side) uint8, keypoints (count, 18, 3)."""
    parts = []
    for start in trange(0, count, CHUNK, desc=f"rendering {split}", unit_scale=CHUNK):
        seeds = [(seed, SPLITS[split], index) for index in range(start, min(start + CHUNK, count))]
        stills = render(seeds, resolution=side, kinds=kinds)
        parts.append((stills.image, largest_person(stills.keypoints)))
    images, keypoints = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(keypoints)


def through_autoencoder(
    images: Tensor, backbone: DiffusionBackbone, generator: Generator, noise: float = 0.0
) -> Tensor:
    """Encodes and decodes images (N, 3, H, W) uint8, with noise of a random strength up to `noise` on the latents."""
    parts = []
    for chunk in tqdm(images.split(CHUNK), desc="autoencoder", unit_scale=CHUNK):
        latents = backbone.encode(from_bytes(chunk))[0].cpu()
        strength = noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
        parts.append(to_bytes(backbone.decode(latents + strength * torch.randn(latents.shape, generator=generator))))
    return torch.cat(parts)


def make_empty(seed: int, split: str, people: Tensor, backbone: DiffusionBackbone, generator: Generator) -> Tensor:
    """Pictures without a person, as many as `people` (N, 3, H, W) uint8 and of each kind in turn.

    They are backgrounds, `people` cut into tiles that are shuffled, and decoded latents of noise, smooth or not.
    """
    n, side, few = len(people), people.shape[-1], -(-len(people) // 3)
    scenes = [replace(draw_scene((seed, SPLITS[split], index), {"one": 1.0}), people=()) for index in range(few)]
    alone = render_scenes(scenes, resolution=side, supersampling=1).image
    tiles = F.unfold(people[:few].float(), side // 8, stride=side // 8)
    order = torch.rand(len(tiles), 1, tiles.shape[-1], generator=generator).argsort(-1).expand_as(tiles)
    shuffled = F.fold(tiles.gather(-1, order), people.shape[-2:], side // 8, stride=side // 8)
    h, w = backbone.latent_size
    noise = torch.randn(few, backbone.latent_channels, h, w, generator=generator)
    noise[::2] = 3 * F.avg_pool2d(noise[::2], 3, 1, 1)  # neighbours share noise: blobs in place of grain
    decoded = torch.cat([to_bytes(backbone.decode(chunk)) for chunk in noise.split(CHUNK)])
    return torch.stack([alone, shuffled.to(torch.uint8), decoded], 1).flatten(0, 1)[:n]


def make_training_pictures(backbone: DiffusionBackbone, seed: int, count: int) -> Pictures:
    """`count` renders, every second one through the autoencoder with noise, and an eighth as many without a person."""
    generator = Generator().manual_seed(seed)
    image, keypoints = render_people(seed, "train", count, side=backbone.resolution[0], kinds=KINDS)
    empty = make_empty(seed, "train", image[: max(3, count // 8)], backbone, generator)
    image[1::2] = through_autoencoder(image[1::2], backbone, generator, LATENT_NOISE)
    return Pictures(image, keypoints, empty)


def largest_person(keypoints: Tensor) -> Tensor:
    """Of people (B, P, 18, 3) the one with the largest box (absent people are all 0): (B, 18, 3)."""
    everything = torch.ones_like(keypoints[..., 2], dtype=torch.bool)
    sides = torch.stack([box_side(keypoints[:, p, :, :2], everything[:, p]) for p in range(keypoints.shape[1])], 1)
    return keypoints[torch.arange(len(keypoints)), sides.argmax(1)]


def augment(images: Tensor, keypoints: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Changes images (B, 3, H, W) in place, light, sharpness and noise, and moves their keypoints (B, 18, 3) along."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    size: Size = (images.shape[-2], images.shape[-1])
    angle, scale, mirrored = uniform(-0.15, 0.15), uniform(0.85, 1.15), uniform(-1, 1) < 0
    side = 1 - 2 * mirrored.float()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    turn = torch.stack([torch.stack([side * cosine, -side * sine], -1), torch.stack([sine, cosine], -1)], -2)
    shift = torch.stack([uniform(-0.1, 0.1), uniform(-0.1, 0.1)], -1)
    # affine_grid maps output to input in coordinates -1..1 over the picture's borders: a picture of size 2, less 0.5.
    grid = F.affine_grid(torch.cat([turn, shift[..., None]], -1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    unit = rescale(keypoints[..., :2], size, (2, 2)) - 0.5
    points = torch.linalg.solve(turn[:, None], (unit - shift[:, None])[..., None])[..., 0]
    points = rescale(points + 0.5, (2, 2), size)
    keypoints = torch.cat([points, keypoints[..., 2:]], -1)
    keypoints = torch.where(mirrored[:, None, None], keypoints[:, list(MIRROR)], keypoints)

    blur, light, offset, noise = (
        uniform(low, high).view(-1, 1, 1, 1) for low, high in ((0, 1), (0.8, 1.2), (-0.15, 0.15), (0, 0.1))
    )
    moved = moved.lerp(F.avg_pool2d(moved, 3, 1, 1, count_include_pad=False), blur) * light + offset
    return (moved + noise * torch.randn(moved.shape, generator=generator)).clamp(-1, 1), keypoints


def draw_batch(pictures: Pictures, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A batch of `size` images in [-1, 1] with their keypoints; an eighth has no person, and keypoints far outside."""
    chosen = torch.randint(len(pictures.image), (size - size // 8,), generator=generator)
    nobody = torch.randint(len(pictures.empty), (size // 8,), generator=generator)
    images = torch.cat([pictures.image[chosen], pictures.empty[nobody]])
    outside = torch.full((len(nobody), *pictures.keypoints.shape[1:]), -1e4)
    return augment(from_bytes(images), torch.cat([pictures.keypoints[chosen], outside]), generator)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
