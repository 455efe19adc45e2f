"""The people of a batch of scenes: their capsules, their joints, and which joints the camera sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.marionette.body import CLEAR, KEYPOINT_RADIUS, PARTS, SHOWS, body_points, palette, place_body
from data_prep.marionette.rays import Capsules, surface
from data_prep.marionette.scene import MAX_PEOPLE, POSE, Scene
from rg.points import KEYPOINTS, inside


@dataclass(frozen=True)
class People:
    """Everybody in B scenes of at most P people, in float64.

    capsules: N = P x parts per scene, person by person. color: (3,B,N) RGB 0..255. joints: (3,B,P,18) world units.
    scale: (B,P) world units per body unit, 0 for an absent person.
    """

    capsules: Capsules
    color: Tensor
    joints: Tensor
    scale: Tensor


def stage(scenes: Sequence[Scene]) -> People:
    """Poses, places and paints everybody in `scenes`."""
    shape = (len(scenes), MAX_PEOPLE)
    cosine, sine = np.ones((*shape, len(POSE))), np.zeros((*shape, len(POSE)))
    scale, place = np.zeros(shape), np.zeros((3, *shape))
    worn, color = np.zeros((*shape, len(PARTS))), np.zeros((*shape, len(PARTS), 3))
    for b, scene in enumerate(scenes):
        for p, person in enumerate(scene.people):
            # Person by person: a vectorised cosine may depend in its last bit on the length of the array.
            angles = np.array([person.pose[name] for name in POSE])
            cosine[b, p], sine[b, p] = np.cos(angles), np.sin(angles)
            scale[b, p], place[:2, b, p] = person.scale, person.place
            colors = palette(person.identity)
            worn[b, p] = [part.paint in colors for part in PARTS]
            color[b, p] = [colors.get(part.paint, (0, 0, 0)) for part in PARTS]
    turns = zip(torch.from_numpy(cosine).unbind(-1), torch.from_numpy(sine).unbind(-1), strict=True)
    portrait = torch.tensor([[scene.kind == "portrait"] for scene in scenes])
    sizes = torch.from_numpy(scale)
    points = place_body(body_points(dict(zip(POSE, turns, strict=True))), sizes, torch.from_numpy(place), portrait)
    radius = torch.from_numpy(worn) * torch.tensor([part.radius for part in PARTS]).double()
    bodies = Capsules(
        start=torch.stack([points[part.start] for part in PARTS], -1).flatten(2),
        end=torch.stack([points[part.end] for part in PARTS], -1).flatten(2),
        radius=(sizes[..., None] * radius).flatten(1),
    )
    joints = torch.stack([points[name] for name in KEYPOINTS], -1)
    return People(bodies, torch.from_numpy(color).movedim(-1, 0).flatten(2), joints, sizes)


def visible(people: People) -> Tensor:
    """Which joints the camera would see in an endless picture: bool (B,P,18).

    On the ray through the joint itself, the front-most part must show the joint, or be a part of the same person that
    lies less than the joint's radius in front of it. Another person in front always hides it; glasses hide nothing.
    """
    x, y, z = people.joints
    start, end = (ends[:, :, None, None] for ends in (people.capsules.start, people.capsules.end))
    heights, _ = surface(start, end, people.capsules.radius[:, None, None], x[..., None], y[..., None])
    front, part = heights.masked_fill(CLEAR.repeat(MAX_PEOPLE), -torch.inf).max(-1)
    own = part // len(PARTS) == torch.arange(MAX_PEOPLE)[:, None]
    shown = own & SHOWS[torch.arange(len(KEYPOINTS)), part % len(PARTS)]
    return shown | (front - z < own * KEYPOINT_RADIUS * people.scale[..., None])


def keypoints(people: People, resolution: int) -> Tensor:
    """The joints as (B,P,18,3) float32 (x, y, visible) in pixels of a picture of side `resolution`."""
    x, y, _ = people.joints
    points = torch.stack([(x + 1) / 2 * resolution - 0.5, (1 - y) / 2 * resolution - 0.5], -1)
    seen = visible(people) & inside(points, (resolution, resolution))
    present = (people.scale > 0)[..., None, None]
    return (torch.cat([points, seen[..., None]], -1) * present).float()
