"""The scenes that the model card asks for: held-out ones, and pairs that differ in one colour word."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from numpy.random import Generator, SeedSequence, default_rng
from torch import Tensor
from tqdm import trange

from data_prep.marionette import COLORS, HAIRS, UNSEEN_PAIRS, Stills, render, render_scenes
from data_prep.marionette.draw import draw_scene
from data_prep.marionette.scene import Scene

SPLITS = {"samples": 0, "reference": 1, "unseen": 2, "changed": 3}
CHUNK = 100
# What a word may be changed in, and to.
CHANGED: dict[str, tuple[str, ...]] = {name: tuple(COLORS) for name in ("shirt", "trousers", "hat")}
CHANGED["hair"] = tuple(HAIRS)


class Pairs(NamedTuple):
    """N scenes of one person, the same with one colour changed, and the number of each scene in its split."""

    before: list[Scene]
    after: list[Scene]
    indices: list[int]


def held_out(seed: int, split: str, count: int, *, resolution: int, **arguments: Any) -> Stills:
    """The first renders of a split; further arguments as of `render`."""
    seeds = [(seed, SPLITS[split], i) for i in range(count)]
    starts = trange(0, count, CHUNK, desc=f"rendering {split}", unit_scale=CHUNK)
    return Stills.join([render(seeds[i : i + CHUNK], resolution=resolution, **arguments) for i in starts])


def render_chunks(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """Renders of given scenes: (N, 3, H, W) uint8."""
    starts = range(0, len(scenes), 8)
    return torch.cat([render_scenes(scenes[i : i + 8], resolution=resolution, supersampling=2).image for i in starts])


def recolored_pairs(seed: int, name: str, count: int) -> Pairs:
    """The first `count` scenes of one person whose prompt tells the colour of `name`, and the same recoloured."""
    pairs, index = Pairs([], [], []), 0
    while len(pairs.indices) < count:
        entropy = (seed, SPLITS["changed"], index)
        scene = draw_scene(entropy, {"one": 1.0})
        changed = recolor(scene, name, default_rng(SeedSequence((*entropy, list(CHANGED).index(name)))))
        if changed is not None:
            for column, value in zip(pairs, (scene, changed, index), strict=True):
                column.append(value)
        index += 1
    return pairs


def recolor(scene: Scene, name: str, rng: Generator) -> Scene | None:
    """The scene with another colour for attribute `name` of its first person; None where its prompt tells none.

    Shirt and trousers do not become a pair that training leaves out.
    """
    person = scene.people[0]
    if not person.identity[name] or (name == "hair" and not person.names_hair):
        return None
    choices = [{**person.identity, name: word} for word in CHANGED[name] if word != person.identity[name]]
    choices = [identity for identity in choices if not is_unseen(identity)]
    identity = choices[rng.integers(len(choices))]
    return replace(scene, people=(replace(person, identity=identity), *scene.people[1:]))


def is_unseen(identity: Mapping[str, Any]) -> bool:
    """Whether shirt and trousers are of colours that are never together in training."""
    return UNSEEN_PAIRS[identity["shirt"]] == identity["trousers"]
