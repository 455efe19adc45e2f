"""The objects that lie and stand around: each a few capsules, in the world's axes."""

from collections.abc import Sequence

import torch

from data_prep.marionette.rays import Capsules
from data_prep.marionette.scene import MAX_THINGS, Scene, Thing

THING_PARTS = 2
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
