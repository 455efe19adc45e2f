"""All that stands in a batch of scenes, seen from their cameras: capsules, frames, paints, and visible joints."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.marionette.body_parts import CLEAR, KEYPOINT_RADIUS, PARTS, SHOWS, palette
from data_prep.marionette.materials import UNUSED, Paint, paint_part, paint_thing
from data_prep.marionette.raycast import Capsules, Views, intersect, place_cameras, to_pixels
from data_prep.marionette.scene import MAX_PEOPLE, MAX_THINGS, POSE, SHAPE, Scene, Thing
from data_prep.marionette.skeleton import Turn, body_points, place_on_ground
from rg.points import KEYPOINTS, inside

THING_PARTS = 2
PEOPLE_PARTS = MAX_PEOPLE * len(PARTS)
# Label maps of parts: their values index this.
LABELS = ("sky", "ground", "thing", *dict.fromkeys(part.label for part in PARTS))
# The label and the instance (0 nobody, i the i-th person) of every capsule of a scene.
CAPSULE_LABEL = torch.tensor(
    [LABELS.index(part.label) for part in PARTS] * MAX_PEOPLE + [LABELS.index("thing")] * MAX_THINGS * THING_PARTS
)
CAPSULE_INSTANCE = torch.tensor(
    [person + 1 for person in range(MAX_PEOPLE) for _ in PARTS] + [0] * MAX_THINGS * THING_PARTS
)


@dataclass(frozen=True)
class Stage:
    """Everything in B scenes, float64, N capsules per scene: P people's parts, then things.

    world, seen: the capsules in the world and in the cameras' axes. frames: (3,3,B,N) axes of every capsule, axis
    first, in the cameras' axes. paint: of every capsule. joints: (3,B,P,18) in the cameras' axes. present: (B,P) bool.
    views: the cameras.
    """

    world: Capsules
    seen: Capsules
    frames: Tensor
    paint: Paint
    joints: Tensor
    present: Tensor
    views: Views


def _turns(angles: np.ndarray) -> dict[str, Turn]:
    """Cosine and sine, (B,P) each, of the angles (B,P,number of POSE)."""
    cosine, sine = np.ones_like(angles), np.zeros_like(angles)
    for place in np.ndindex(angles.shape[:2]):
        # Person by person: a vectorised cosine may depend in its last bit on the length of the array.
        cosine[place], sine[place] = np.cos(angles[place]), np.sin(angles[place])
    turns = zip(torch.from_numpy(cosine).unbind(-1), torch.from_numpy(sine).unbind(-1), strict=True)
    return dict(zip(POSE, turns, strict=True))


def set_stage(scenes: Sequence[Scene]) -> Stage:
    """Builds, poses, places and paints everything in `scenes`."""
    shape = (len(scenes), MAX_PEOPLE)
    angles, builds = np.zeros((*shape, len(POSE))), np.ones((*shape, len(SHAPE)))
    place, present = torch.zeros(2, *shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    worn = torch.zeros(*shape, len(PARTS), dtype=torch.float64)
    paints = [[UNUSED] * (PEOPLE_PARTS + MAX_THINGS * THING_PARTS) for _ in scenes]
    for b, scene in enumerate(scenes):
        for p, person in enumerate(scene.people):
            angles[b, p] = [person.pose[name] for name in POSE]
            builds[b, p] = [person.identity[name] for name in SHAPE]
            place[:, b, p], present[b, p] = torch.tensor(person.place), True
            colors = palette(person.identity)
            worn[b, p] = torch.tensor([part.paint in colors for part in PARTS])
            first = p * len(PARTS)
            paints[b][first : first + len(PARTS)] = [paint_part(part, colors, person) for part in PARTS]
        for i, thing in enumerate(scene.things):
            first = PEOPLE_PARTS + i * THING_PARTS
            paints[b][first : first + THING_PARTS] = paint_thing(thing)
    build = dict(zip(SHAPE, torch.from_numpy(builds).unbind(-1), strict=True))
    points, frames = body_points(_turns(angles), build)
    points = place_on_ground(points, place)
    views = place_cameras(scenes, points["head"][:, :, 0])
    growth = torch.stack([build[part.girth] for part in PARTS], -1)
    radius = worn * growth * torch.tensor([part.radius for part in PARTS], dtype=torch.float64)
    things = thing_capsules(scenes)
    world = Capsules(
        start=torch.cat([torch.stack([points[part.start] for part in PARTS], -1).flatten(2), things.start], -1),
        end=torch.cat([torch.stack([points[part.end] for part in PARTS], -1).flatten(2), things.end], -1),
        radius=torch.cat([radius.flatten(1), things.radius], -1),
    )
    axes = torch.stack([torch.stack([frames[part.frame][i] for part in PARTS], -1) for i in range(3)])
    upright = torch.eye(3, dtype=torch.float64)[..., None, None].expand(
        *things.start.shape[:1], 3, *things.radius.shape
    )
    axes = torch.cat([axes.flatten(3), upright], -1)
    return Stage(
        world=world,
        seen=Capsules(views.to_camera(world.start), views.to_camera(world.end), world.radius),
        frames=torch.stack([views.turn(axis) for axis in axes]),
        paint=Paint.stack(paints),
        joints=views.to_camera(torch.stack([points[name] for name in KEYPOINTS], -1)),
        present=present,
        views=views,
    )


def first_depth(stage: Stage, points: Tensor, *, glasses: bool = False) -> tuple[Tensor, Tensor]:
    """What rays from the cameras through points (3,B,...) meet first: its depth and its capsule, each (B,...).

    Args:
        glasses: whether glasses count, or are looked through.
    """
    shape = (len(stage.present), *[1] * (points.ndim - 2), -1)
    start, end = (ends.view(3, *shape) for ends in (stage.seen.start, stage.seen.end))
    direction = points / -points[2]
    depth = intersect(
        torch.zeros_like(points)[..., None], direction[..., None], start, end, stage.seen.radius.view(shape)
    )
    clear = torch.zeros(stage.seen.radius.shape[-1], dtype=torch.bool)
    clear[:PEOPLE_PARTS] = CLEAR.repeat(MAX_PEOPLE) & (not glasses)
    gone = clear | (stage.seen.radius.view(shape) <= 0) | (depth <= 0)
    return depth.masked_fill(gone, torch.inf).min(-1)


def visible(stage: Stage) -> Tensor:
    """Which joints the camera would see in an endless image: bool (B,P,18).

    On the ray through the joint itself, the front-most part must show the joint, or be a part of the same person that
    lies less than the joint's radius in front of it. Another person or a thing in front always hides it; glasses hide
    nothing.
    """
    front, capsule = first_depth(stage, stage.joints)
    own = CAPSULE_INSTANCE[capsule] == torch.arange(1, MAX_PEOPLE + 1)[:, None]
    shown = own & SHOWS[torch.arange(len(KEYPOINTS)), capsule % len(PARTS)]
    return shown | (-stage.joints[2] - front < own * KEYPOINT_RADIUS)


def keypoints(stage: Stage, resolution: int) -> Tensor:
    """The joints as (B,P,18,3) float32 (x, y, visible) in pixels of an image of side `resolution`."""
    points = to_pixels(stage.joints, resolution)
    seen = visible(stage) & inside(points, (resolution, resolution)) & (stage.joints[2] < 0)
    return (torch.cat([points, seen[..., None]], -1) * stage.present[..., None, None]).float()


Shape = tuple[float, float, float, float, float]  # x, lower y, upper y, z, radius


def _shapes(thing: Thing) -> tuple[Shape, ...]:
    (x, z), size = thing.place, thing.size
    if thing.kind == "ball":
        return ((x, size, size, z, size),)
    if thing.kind == "rock":
        return ((x, 0.3 * size, 0.3 * size, z, size), (x + 0.8 * size, 0.1 * size, 0.1 * size, z, 0.7 * size))
    if thing.kind == "bush":
        return ((x, 0.6 * size, 0.6 * size, z, size), (x + 0.9 * size, 0.4 * size, 0.4 * size, z, 0.8 * size))
    if thing.kind == "post":
        return ((x, 0.0, size, z, 0.05),)
    return ((x, 0.0, 0.7 * size, z, 0.08), (x, 0.8 * size, 0.95 * size, z, 0.25 * size))


def thing_capsules(scenes: Sequence[Scene]) -> Capsules:
    """The things of B scenes, THING_PARTS capsules for each of MAX_THINGS, float64."""
    numbers = torch.zeros(5, len(scenes), MAX_THINGS * THING_PARTS, dtype=torch.float64)
    for b, scene in enumerate(scenes):
        for i, thing in enumerate(scene.things):
            for j, shape in enumerate(_shapes(thing)):
                numbers[:, b, i * THING_PARTS + j] = torch.tensor(shape, dtype=torch.float64)
    x, low, high, z, radius = numbers
    return Capsules(torch.stack([x, low, z]), torch.stack([x, high, z]), radius)
