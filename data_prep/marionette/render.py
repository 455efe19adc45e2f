"""Renders marionettes: people made of capsules among a few things on a ground under a sky, with exact labels.

Scenes are drawn one by one from their seeds; geometry and rays are one batch, in which a seed keeps its bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from data_prep.marionette.materials import Backdrop, backdrop, cast_shadows, light_directions, shade
from data_prep.marionette.raycast import Hits, cast, dot
from data_prep.marionette.scene import FOCAL, KINDS, Pairs, Scene
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import CAPSULE_INSTANCE, CAPSULE_LABEL, Stage, keypoints, set_stage
from data_prep.marionette.vocabulary import SKIES

CHUNK_RAYS = 8 * 128 * 128  # rays computed at once: what stays in a core's cache

# A tensor, or a dataclass of tensors.
Part = TypeVar("Part")


@dataclass(frozen=True)
class Stills:
    """B square images of H = W = resolution pixels and their labels; P = 2 people at most.

    image: (B,3,H,W) uint8 RGB.
    keypoints: (B,P,18,3) float32 (x, y, visible) in pixels, ordered as rg.points.KEYPOINTS; an absent person is all 0.
        A keypoint outside of the image keeps its coordinates and is not visible.
    depth: (B,H,W) float32 inverse depth, 1 / world units, averaged over the pixel's area: LARGER IS NEARER, the sky 0.
    instances: (B,H,W) uint8: 0 background, i the i-th person: whoever has the largest share of the pixel's area, on a
        tie the higher number.
    parts: (B,H,W) uint8 indices in stage.LABELS, by the same rule.
    edges: (B,H,W) bool: of two neighbouring pixels of different parts or people, or with a jump in depth, the nearer.
    identity: per image and person, see scene.Person.
    attributes: what can be read from the image, see vocabulary.ATTRIBUTES.
    prompt: the captions. kind: keys of KINDS.
    """

    image: Tensor
    keypoints: Tensor
    depth: Tensor
    instances: Tensor
    parts: Tensor
    edges: Tensor
    identity: list[list[dict[str, Any]]]
    attributes: list[dict[str, str]]
    prompt: list[str]
    kind: list[str]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Many batches of one size as one."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(**{n: torch.cat(c) if isinstance(c[0], Tensor) else [*chain(*c)] for n, c in columns.items()})


def _color_hits(stage: Stage, hits: Hits, light: Tensor, brightness: Tensor, side: int) -> Tensor:
    """The colours (3,H) of what the rays hit."""
    scene = hits.ray // side**2
    start = stage.seen.start.float().flatten(1)[:, hits.capsule]
    axes = stage.frames.float().flatten(2)[:, :, hits.capsule]
    offset = hits.point - start
    own = torch.stack([dot(axis, offset) for axis in axes])
    return stage.paint.color_at(own, hits.capsule) * shade(hits.normal, light[:, scene]) * brightness[scene]


def _move(value: Part, device: torch.device) -> Part:
    """A tensor, or a dataclass of tensors, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(**{field.name: _move(getattr(value, field.name), device) for field in fields(value)})


def render_scenes(
    scenes: Sequence[Scene], *, resolution: int, supersampling: int, device: str | torch.device = "cpu"
) -> Stills:
    """Renders given scenes in one batch; arguments and result as of `render`."""
    side = resolution * supersampling
    stage = set_stage(scenes)
    joints = keypoints(stage, resolution)
    light = light_directions(scenes)
    brightness = torch.tensor([SKIES[scene.sky].brightness for scene in scenes], device=device)
    stage, light = _move(stage, torch.device(device)), light.to(device)
    scenery: Backdrop = backdrop(scenes, stage.views, cast_shadows(stage.world, stage.views, light, side), side)
    hits = cast(stage.seen, side, FOCAL)
    # Of what stands in the ground (rocks, bushes, soles) the part above it is seen.
    above = hits.depth < scenery.depth[hits.ray]
    hits = Hits(*(getattr(hits, field.name)[..., above] for field in fields(hits)))
    kind, instance = (table.to(device)[hits.capsule % len(table)] for table in (CAPSULE_LABEL, CAPSULE_INSTANCE))

    image, inverse = scenery.color, 1 / scenery.depth
    owner = torch.zeros_like(inverse, dtype=torch.uint8)
    part = scenery.ground.to(torch.uint8)
    image[:, hits.ray] = _color_hits(stage, hits, stage.views.turn(light).float(), brightness, side)
    inverse[hits.ray], owner[hits.ray], part[hits.ray] = 1 / hits.depth, instance.to(torch.uint8), kind.to(torch.uint8)
    image, inverse, owner, part = (
        cells.unflatten(-1, (len(scenes), side, side)).cpu() for cells in (image, inverse, owner, part)
    )
    depth, instances, parts = (
        area_mean(inverse, supersampling), majority(owner, supersampling), majority(part, supersampling)
    )  # fmt: skip
    return Stills(
        image=(area_mean(image, supersampling).clamp(0, 255) + 0.5).to(torch.uint8).movedim(0, 1),
        keypoints=joints,
        depth=depth,
        instances=instances,
        parts=parts,
        edges=edges(depth, parts.int() + 256 * instances.int()),
        identity=[[person.identity for person in scene.people] for scene in scenes],
        attributes=[scene.attributes for scene in scenes],
        prompt=[scene.prompt for scene in scenes],
        kind=[scene.kind for scene in scenes],
    )


def render(
    seeds: Sequence[tuple[int, ...]],
    *,
    resolution: int = 64,
    supersampling: int = 2,
    kinds: Mapping[str, float] = KINDS,
    pairs: Pairs = "seen",
    sided: bool = False,
    device: str | torch.device = "cpu",
) -> Stills:
    """Draws and renders one image per seed; a seed gives the same bits in any batch.

    Args:
        seeds: B >= 1 tuples of non-negative integers below 2**32, all of one length (see `draw_scene`).
        resolution: side of the images in pixels.
        supersampling: rays per pixel along each axis; image and depth are averages over the pixel's area.
        kinds: probabilities of the kinds of scene, keys of KINDS, 1 in sum.
        pairs: "seen" leaves out the pairs of colours in vocabulary.UNSEEN_PAIRS, "unseen" draws them alone.
        sided: prompts say which way people face, and the clothes of a left and a right limb may differ.
        device: where rays are cast; the result is on the CPU, and the same on every device up to rounding.

    Raises:
        ValueError: no seed, a size below 1, an unknown kind or pairs, or probabilities that are none.
    """
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    if resolution < 1 or supersampling < 1:
        raise ValueError(f"expected resolution and supersampling of at least 1, got {resolution} and {supersampling}")
    if not kinds or not set(kinds) <= set(KINDS) or min(kinds.values()) < 0 or not math.isclose(sum(kinds.values()), 1):
        raise ValueError(f"expected kinds to give {sorted(KINDS)} probabilities that sum to 1, got {dict(kinds)}")
    if pairs not in ("seen", "unseen"):
        raise ValueError(f"expected pairs to be seen or unseen, got {pairs}")
    scenes = [draw_scene(seed, kinds, pairs, sided=sided) for seed in seeds]
    chunk = max(1, CHUNK_RAYS // (resolution * supersampling) ** 2)
    stills = [
        render_scenes(scenes[i : i + chunk], resolution=resolution, supersampling=supersampling, device=device)
        for i in range(0, len(scenes), chunk)
    ]
    return Stills.join(stills)


STEP = 0.08  # relative jump of inverse depth from one pixel to the next that makes an edge
FLOOR = 0.02  # and the absolute one, 1 / world units, that keeps a level ground free of edges


def area_mean(cells: Tensor, factor: int) -> Tensor:
    """Averages blocks of `factor` x `factor` cells of (..., H, W), added one by one: a sum whose order is known."""
    return sum(_corners(cells, factor)) / factor**2


def majority(cells: Tensor, factor: int) -> Tensor:
    """The most frequent value of blocks of `factor` x `factor` cells of (..., H, W), uint8; on a tie the highest."""
    corners = [corner.int() for corner in _corners(cells, factor)]
    counts = [sum((corner == other).int() for other in corners) for corner in corners]
    best = torch.stack([count * 256 + corner for count, corner in zip(counts, corners, strict=True)]).amax(0)
    return (best % 256).to(torch.uint8)


def _corners(cells: Tensor, factor: int) -> list[Tensor]:
    return [cells[..., i::factor, j::factor] for i in range(factor) for j in range(factor)]


def edges(depth: Tensor, labels: Tensor) -> Tensor:
    """Where depth or labels jump, one pixel wide: of two neighbours that differ, the nearer one is the edge.

    Args:
        depth: (B,H,W) inverse depth, LARGER IS NEARER. labels: (B,H,W), equal within one part of one instance.

    Returns:
        (B,H,W) bool.
    """
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (1, 2):
        size = depth.shape[axis] - 1
        first, second = depth.narrow(axis, 0, size), depth.narrow(axis, 1, size)
        jump = (first - second).abs() > STEP * torch.maximum(first, second) + FLOOR
        jump |= labels.narrow(axis, 0, size) != labels.narrow(axis, 1, size)
        marked.narrow(axis, 0, size).logical_or_(jump & (first >= second))
        marked.narrow(axis, 1, size).logical_or_(jump & (first < second))
    return marked
