"""Renders marionettes: people made of capsules on a ground under a sky, with labels that are right by construction.

Scenes are drawn one by one from their seeds; geometry and rays are one batch, in which a seed keeps its bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from data_prep.marionette.body import PARTS
from data_prep.marionette.people import keypoints, stage
from data_prep.marionette.rays import cast
from data_prep.marionette.scene import (
    COLORS,
    EYES,
    GROUNDS,
    HAIRS,
    KINDS,
    MAX_PEOPLE,
    SKIES,
    SKINS,
    Scene,
    draw_scene,
)

__all__ = ["COLORS", "EYES", "GROUNDS", "HAIRS", "KINDS", "SKIES", "SKINS", "Stills", "render", "render_scenes"]

CHUNK_RAYS = 8 * 128 * 128  # rays computed at once: what stays in a core's cache


@dataclass(frozen=True)
class Stills:
    """B square pictures of H = W = resolution pixels and their labels; P = 2 people at most.

    image: (B,3,H,W) uint8 RGB.
    keypoints: (B,P,18,3) float32 (x, y, visible) in pixels, ordered as rg.points.KEYPOINTS; an absent person is all 0.
        A keypoint outside of the picture keeps its coordinates and is not visible.
    depth: (B,H,W) float32 world z averaged over the pixel's area: LARGER IS NEARER. The picture is 2 world units high;
        people are around 0, the ground goes from -1.2 at the horizon to 0 at the lower border, the sky is at -3.
    instances: (B,H,W) uint8: 0 background, i the i-th person: whoever has the largest share of the pixel's area, on a
        tie the higher number.
    identity: per picture and person, words for shirt, trousers, skin, hair, eye, hat (or None), and glasses (bool).
    prompt: the captions. kind: keys of KINDS.
    """

    image: Tensor
    keypoints: Tensor
    depth: Tensor
    instances: Tensor
    identity: list[list[dict[str, Any]]]
    prompt: list[str]
    kind: list[str]


def background(scenes: Sequence[Scene], side: int) -> tuple[Tensor, Tensor]:
    """Sky and ground of each row of rays: color (3,B,side) 0..255 and depth (B,side), float64."""
    skies, grounds = [SKIES[scene.sky] for scene in scenes], [GROUNDS[scene.ground] for scene in scenes]
    top, bottom, ground = (
        torch.tensor(colors).double().T[..., None]
        for colors in ([sky.top for sky in skies], [sky.bottom for sky in skies], grounds)
    )
    brightness = torch.tensor([[sky.brightness] for sky in skies]).double()
    horizon = torch.tensor([[scene.horizon] for scene in scenes]).double()
    y = 1 - (torch.arange(side).double() + 0.5) / side * 2
    fall = ((1 - y) / (1 - horizon)).clamp(0, 1)
    near = (horizon - y) / (horizon + 1.0001)
    below = y < horizon
    color = torch.where(below, ground * brightness * (0.75 + 0.25 * near), top * (1 - fall) + bottom * fall)
    return color, torch.where(below, 1.2 * near - 1.2, -3.0)


def _area_mean(cells: Tensor, factor: int) -> Tensor:
    """Averages blocks of `factor` x `factor` cells of (..., H, W), added one by one: a sum whose order is known."""
    corners = [(i, j) for i in range(factor) for j in range(factor)]
    return sum(cells[..., i::factor, j::factor] for i, j in corners) / factor**2


def render_scenes(scenes: Sequence[Scene], *, resolution: int, supersampling: int) -> Stills:
    """Renders given scenes in one batch; arguments and result as of `render`."""
    side = resolution * supersampling
    people = stage(scenes)
    hits = cast(people.capsules, side)
    light = torch.tensor([[scene.light_x, 0.7, 0.7] for scene in scenes]).double().T
    light = light / (light[0] * light[0] + light[1] * light[1] + light[2] * light[2]).sqrt()
    brightness = torch.tensor([SKIES[scene.sky].brightness for scene in scenes])
    scene = hits.ray // side**2
    nx, ny, nz = hits.normal * light.float()[:, scene]
    # Lambert's law over an ambient share.
    shade = ((nx + ny + nz).clamp(0, 1) * 0.65 + 0.4) * brightness[scene]

    rows, row_depth = background(scenes, side)
    image = rows.float()[..., None].repeat(1, 1, 1, side).flatten(1)
    depth = row_depth.float()[..., None].repeat(1, 1, side).flatten()
    owner = torch.zeros_like(depth)
    image[:, hits.ray] = people.color.float().flatten(1)[:, hits.capsule] * shade
    depth[hits.ray] = hits.z
    owner[hits.ray] = (hits.capsule % people.color.shape[2] // len(PARTS) + 1).float()
    image, depth, owner = (cells.unflatten(-1, (len(scenes), side, side)) for cells in (image, depth, owner))
    shares = torch.stack([_area_mean((owner == i).float(), supersampling) for i in range(MAX_PEOPLE, -1, -1)])
    return Stills(
        image=_area_mean(image, supersampling).clamp(0, 255).to(torch.uint8).movedim(0, 1),
        keypoints=keypoints(people, resolution),
        depth=_area_mean(depth, supersampling),
        instances=(MAX_PEOPLE - shares.argmax(0)).to(torch.uint8),
        identity=[[person.identity for person in scene.people] for scene in scenes],
        prompt=[scene.prompt for scene in scenes],
        kind=[scene.kind for scene in scenes],
    )


def render(
    seeds: Sequence[tuple[int, ...]],
    *,
    resolution: int = 64,
    supersampling: int = 2,
    kinds: Mapping[str, float] = KINDS,
) -> Stills:
    """Draws and renders one picture per seed; a seed gives the same bits in any batch.

    Args:
        seeds: B >= 1 tuples of non-negative integers below 2**32, all of one length (see `draw_scene`).
        resolution: side of the pictures in pixels.
        supersampling: rays per pixel along each axis; picture and depth are averages over the pixel's area.
        kinds: probabilities of the kinds of scene, keys of KINDS, 1 in sum.

    Raises:
        ValueError: no seed, a size below 1, an unknown kind, or probabilities that are none.
    """
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    if resolution < 1 or supersampling < 1:
        raise ValueError(f"expected resolution and supersampling of at least 1, got {resolution} and {supersampling}")
    if not kinds or not set(kinds) <= set(KINDS) or min(kinds.values()) < 0 or not math.isclose(sum(kinds.values()), 1):
        raise ValueError(f"expected kinds to give {sorted(KINDS)} probabilities that sum to 1, got {dict(kinds)}")
    scenes = [draw_scene(seed, kinds) for seed in seeds]
    chunk = max(1, CHUNK_RAYS // (resolution * supersampling) ** 2)
    stills = [
        render_scenes(scenes[i : i + chunk], resolution=resolution, supersampling=supersampling)
        for i in range(0, len(scenes), chunk)
    ]
    columns = {field.name: [getattr(still, field.name) for still in stills] for field in fields(Stills)}
    return Stills(**{n: torch.cat(c) if isinstance(c[0], Tensor) else [*chain(*c)] for n, c in columns.items()})
