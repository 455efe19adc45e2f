"""How surfaces look: paints and textures, ground and sky, light and shadow. Colours are RGB 0..255."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from data_prep.marionette.body_parts import Part, worn
from data_prep.marionette.raycast import NEAR, Capsules, Views, box, directions, dot, fragments, intersect
from data_prep.marionette.scene import FOCAL, Person, Scene, Thing
from data_prep.marionette.vocabulary import COLORS, GROUNDS, SKIES, Rgb

TEXTURES = ("plain", "stripes", "checks", "patches")
CLOTH_CONTRAST, BODY_CONTRAST = 0.3, 0.12  # of shirts and trousers; of skin and hair
SHADOWLESS = 0.035  # radius in world units up to which a part casts no shadow
HAZE = 14.0  # distance in world units at which the ground's texture has faded


class Material(NamedTuple):
    """The paint of one capsule: colour, texture, its periods per world unit, contrast in [0, 1] and shift."""

    color: Rgb
    texture: str = "plain"
    frequency: float = 1.0
    contrast: float = 0.0
    phase: float = 0.0


UNUSED = Material((0, 0, 0))  # of capsules that are not drawn


@dataclass(frozen=True)
class Paint:
    """The paints of (...) surfaces: color (3,...), texture (index in TEXTURES), frequency, contrast, phase (...)."""

    color: Tensor
    texture: Tensor
    frequency: Tensor
    contrast: Tensor
    phase: Tensor

    @classmethod
    def stack(cls, materials: Sequence[Sequence[Material]]) -> Self:
        """The materials of B scenes of N surfaces each."""
        color = torch.tensor([[material.color for material in row] for row in materials], dtype=torch.float32)
        texture = torch.tensor([[TEXTURES.index(material.texture) for material in row] for row in materials])
        numbers = torch.tensor([[material[2:] for material in row] for row in materials], dtype=torch.float32)
        return cls(color.movedim(-1, 0), texture, *numbers.unbind(-1))

    def color_at(self, points: Tensor, where: Tensor | None = None) -> Tensor:
        """Colours (3,...) of surfaces at points (3,...) of their own axes; `where` picks among the flattened ones."""
        color, texture, frequency, contrast, phase = (
            getattr(self, name) if where is None else getattr(self, name).flatten(-2)[..., where]
            for name in ("color", "texture", "frequency", "contrast", "phase")
        )
        amount = contrast * pattern(texture, frequency * points + phase)
        return color + amount * (50 + 0.5 * color)


def _wave(x: Tensor) -> Tensor:
    """A smooth wave of period 1 between -1 and 1, in arithmetic whose bits do not depend on the place in a batch."""
    triangle = 4 * (x - x.floor() - 0.5).abs() - 1
    return triangle * (1.5 - 0.5 * triangle * triangle)


def pattern(texture: Tensor, point: Tensor) -> Tensor:
    """Values in [-1, 1] of textures (...), indices in TEXTURES, at points (3,...) in periods."""
    x, y, z = point
    stripes = (2.5 * _wave(y)).clamp(-1, 1)
    checks = (3 * _wave(x + 0.25) * _wave(y) * torch.where(_wave(z + 0.25) < 0, -1.0, 1.0)).clamp(-1, 1)
    patches = (
        _wave(0.61 * x + 0.36 * y + 0.29 * z) + _wave(0.83 * y - 0.41 * x + 0.2) + _wave(0.71 * z + 0.33 * x - 0.47 * y)
    ) / 2
    values = torch.stack([torch.zeros_like(x), stripes, checks, patches.clamp(-1, 1)])
    return values.gather(0, texture.expand(values.shape[1:])[None])[0]


def paint_part(part: Part, colors: dict[str, Rgb], person: Person) -> Material:
    """The material of a body part; what is not worn is plain black. A sleeve in its own colour reaches to the wrist."""
    paint, color = worn(part, colors, person.identity)
    if paint in ("shirt", "trousers"):
        texture = person.identity[f"{paint}_pattern"]
        return Material(color, texture, 4.5 if texture == "stripes" else 4.0, CLOTH_CONTRAST, person.phase)
    if paint in ("skin", "hair", "long_hair", "hat"):
        return Material(color, "stripes" if "hair" in paint else "patches", 5.0, BODY_CONTRAST, person.phase)
    return Material(color)


def paint_thing(thing: Thing) -> list[Material]:
    """The materials of a thing's capsules."""
    leaves, wood = Material((55, 110, 50), "patches", 3.0, 0.35), Material((95, 70, 45), "stripes", 4.0, 0.25)
    if thing.kind == "ball":
        return [Material(COLORS[thing.color], "stripes", 1.2 / thing.size, 0.3), UNUSED]
    if thing.kind == "rock":
        return [Material((120, 115, 110), "patches", 4.0, 0.25)] * 2
    return {"bush": [leaves, leaves], "post": [wood, UNUSED], "tree": [wood, leaves]}[thing.kind]


def light_directions(scenes: Sequence[Scene]) -> Tensor:
    """Unit vectors (3,B) towards the light, in the world."""
    rows = []
    for scene in scenes:
        turn, height = torch.tensor(scene.light, dtype=torch.float64).unbind()
        rows.append(torch.stack([height.cos() * turn.sin(), height.sin(), height.cos() * turn.cos()]))
    return torch.stack(rows, -1)


def shade(normal: Tensor, light: Tensor) -> Tensor:
    """Lambert's law over an ambient share, for vectors (3,...)."""
    return dot(normal, light).clamp(0, 1) * 0.62 + 0.42


@dataclass(frozen=True)
class Backdrop:
    """Ground and sky on B x side x side rays, flattened: color (3,R), depth (R,) (inf in the sky), ground (R,) bool."""

    color: Tensor
    depth: Tensor
    ground: Tensor


def backdrop(scenes: Sequence[Scene], views: Views, shadows: Tensor, side: int) -> Backdrop:
    """Paints ground and sky; shadows: bool (R,), the rays whose place on the ground lies in a shadow."""
    device = shadows.device

    def per_scene(rows: Sequence[float] | Sequence[Rgb]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=device).movedim(0, -1)[..., None]

    skies, grounds = [SKIES[scene.sky] for scene in scenes], [GROUNDS[scene.ground] for scene in scenes]
    brightness = per_scene([sky.brightness for sky in skies])
    ray = directions(torch.arange(side * side, device=device), side, FOCAL)[:, None]  # (3,1,R/B)
    axes, position = views.axes.float().to(device)[..., None], views.position.float().to(device)[..., None]
    x, y, z = (axes[0, i] * ray[0] + axes[1, i] * ray[1] - axes[2, i] for i in range(3))
    ground = y < 0
    depth = torch.where(ground, position[1] / (-y).clamp_min(1e-6), torch.inf)
    below = ground & (depth < 200)  # farther off, the ground is a line of the horizon's colour

    phase = per_scene([scene.phase for scene in scenes])
    paint = Paint.stack(
        [[Material(g.color, g.texture, g.frequency, g.contrast, s.phase)] for g, s in zip(grounds, scenes, strict=True)]
    )
    reach = torch.where(below, depth, 0.0)
    spot_x, spot_z = position[0] + reach * x, position[2] + reach * z
    fade = (1 - reach / HAZE).clamp_min(0)
    frequency, contrast = paint.frequency.to(device), paint.contrast.to(device) * fade
    # Sand is striped, roads are paved along z: textures lie in the plane of x and z.
    flat = torch.stack([spot_x, spot_z, torch.full_like(spot_x, 0.1)])
    color = paint.color.to(device)
    amount = contrast * pattern(paint.texture.to(device), frequency * flat + phase)
    light = (0.8 + 0.2 * fade) * brightness
    shadow = per_scene([sky.shadow for sky in skies]) * shadows.view(len(scenes), -1)
    on_ground = (color + amount * (50 + 0.5 * color)) * light * (1 - shadow)

    top, bottom = (per_scene([getattr(sky, name) for sky in skies]) for name in ("top", "bottom"))
    rise = (y / 0.42).clamp(0, 1)
    lift = y.clamp_min(0) + 0.15
    clouds = per_scene([sky.clouds for sky in skies]) * rise
    puff = pattern(torch.full_like(depth, 3, dtype=torch.int64), torch.stack([x / lift, z / lift, lift]) * 0.55 + phase)
    in_sky = top * rise + bottom * (1 - rise)
    in_sky = in_sky + clouds * puff * (50 + 0.5 * in_sky)
    return Backdrop(
        torch.where(below, on_ground, in_sky).flatten(1),
        torch.where(below, depth, torch.inf).flatten(),
        below.flatten(),
    )


def cast_shadows(world: Capsules, views: Views, light: Tensor, side: int) -> Tensor:
    """Which of B x side x side rays, flattened, meet the ground where a capsule stands between it and the light: bool.

    Args:
        world: capsules in the world. light: (3,B), towards the light.
    """
    lean = (light / light[1])[..., None]
    reach = torch.where(world.radius > SHADOWLESS, world.radius / light[1][:, None], 0.0)
    spots = [end - lean * end[1] for end in (world.start, world.end)]
    corners = []
    for spot in spots:
        for dx, dz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            corner = torch.stack([spot[0] + dx * reach, torch.zeros_like(reach), spot[2] + dz * reach])
            corners.append(torch.stack(box(views.to_camera(corner), torch.zeros_like(reach), FOCAL)))
    left, _, bottom, _ = torch.stack(corners).amin(0)
    _, right, _, top = torch.stack(corners).amax(0)
    ray, capsule = fragments(left, torch.where(reach > 0, right, left - 3), bottom, top, side)
    scene = ray // side**2
    axes, position = views.axes.float()[:, :, scene], views.position.float()[:, scene]
    direction = directions(ray, side, FOCAL)
    x, y, z = (axes[0, i] * direction[0] + axes[1, i] * direction[1] - axes[2, i] for i in range(3))
    depth = position[1] / (-y).clamp_min(1e-6)
    ground = torch.stack([position[0] + depth * x, torch.zeros_like(x), position[2] + depth * z])
    start, end = (ends.float().flatten(1)[:, capsule] for ends in (world.start, world.end))
    hit = intersect(ground, light.float()[:, scene], start, end, world.radius.float().flatten()[capsule])
    shadowed = (y < 0) & (depth > NEAR) & (hit < torch.inf) & (hit > -0.01)
    return torch.zeros(len(world.radius) * side * side, dtype=torch.bool, device=ray.device).index_fill(
        0, ray[shadowed], True
    )
