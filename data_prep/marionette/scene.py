"""What a marionette scene is made of: the attribute vocabularies, the ranges, and the draw of one scene from a seed.

Lengths are in world units: the picture spans [-1, 1] in x (right) and y (up); z grows towards the camera.
Angles are in radians. The shipped diffusion model was trained on exactly this distribution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

Rgb = tuple[int, int, int]
Range = tuple[float, float]


@dataclass(frozen=True)
class Sky:
    """A sky: RGB at the top of the picture and at the horizon, and the brightness of everything lit under it."""

    top: Rgb
    bottom: Rgb
    brightness: float


@dataclass(frozen=True)
class Spot:
    """Where one person may stand: world units per body unit, and the place of the feet (in a portrait: of the head)."""

    scale: Range
    x: Range
    y: Range


# The colours of shirts, trousers and hats. The words of all vocabularies are the words of prompts and identities.
COLORS: dict[str, Rgb] = {
    "red": (200, 40, 40), "blue": (45, 80, 190), "green": (50, 150, 60), "yellow": (225, 195, 50),
    "white": (230, 230, 230), "black": (40, 40, 45), "orange": (230, 125, 35), "purple": (125, 60, 160),
}  # fmt: skip
SKINS: dict[str, Rgb] = {"pale": (245, 205, 175), "tan": (215, 160, 120), "brown": (150, 100, 70), "dark": (95, 62, 45)}
HAIRS: dict[str, Rgb] = {"black": (30, 22, 18), "brown": (95, 60, 30), "blond": (205, 165, 85), "ginger": (160, 65, 30)}
EYES: dict[str, Rgb] = {"blue": (60, 110, 190), "green": (60, 140, 80), "brown": (85, 50, 25)}
GROUNDS: dict[str, Rgb] = {
    "grass": (80, 140, 60), "sand": (215, 190, 140), "snow": (235, 240, 245), "road": (90, 90, 95),
}  # fmt: skip
SKIES: dict[str, Sky] = {
    "day": Sky((135, 190, 235), (215, 232, 245), 1.0),
    "dusk": Sky((70, 60, 120), (240, 150, 90), 0.75),
    "night": Sky((12, 14, 40), (45, 50, 90), 0.5),
    "studio": Sky((170, 170, 175), (200, 200, 205), 0.95),
}

# How often each kind of scene is drawn, and who stands where in it.
KINDS: dict[str, float] = {"one": 0.68, "two": 0.17, "portrait": 0.15}
SPOTS: dict[str, tuple[Spot, ...]] = {
    "one": (Spot((0.85, 1.08), (-0.3, 0.3), (-0.93, -0.87)),),
    "two": (
        Spot((0.62, 0.85), (-0.57, -0.33), (-0.93, -0.87)),
        Spot((0.62, 0.85), (0.33, 0.57), (-0.93, -0.87)),
    ),
    "portrait": (Spot((2.6, 3.4), (-0.15, 0.15), (-0.05, 0.25)),),
}
MAX_PEOPLE = max(len(spots) for spots in SPOTS.values())

# Every angle of a pose and its range; "spread" lifts a limb sideways, "swing" turns it about the axis through the hips.
POSE: dict[str, Range] = {
    "yaw": (-1.2, 1.2), "lean_roll": (-0.15, 0.15), "lean_pitch": (-0.2, 0.2),
    "head_roll": (-0.25, 0.25), "head_pitch": (-0.2, 0.3), "head_yaw": (-0.6, 0.6),
} | {
    f"{side}_{angle}": limits
    for side in ("right", "left")
    for angle, limits in {
        "arm_spread": (0.1, 2.6), "arm_swing": (-1.2, 0.6), "elbow": (0.0, 1.9), "elbow_twist": (-0.4, 0.4),
        "leg_spread": (0.0, 0.6), "leg_swing": (-1.1, 0.6), "knee": (0.0, 1.3),
    }.items()
}  # fmt: skip
PORTRAIT_YAW: Range = (-0.9, 0.9)
HORIZON: Range = (-0.45, -0.05)
LIGHT_X: Range = (-0.7, 0.7)
BACK_VIEW_SHARE, HAT_SHARE, GLASSES_SHARE = 0.15, 0.3, 0.25


@dataclass(frozen=True)
class Person:
    """One person: identity (words of the vocabularies), pose (the angles of POSE), scale and place as in Spot."""

    identity: dict[str, Any]
    pose: dict[str, float]
    scale: float
    place: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One scene: words for kind, sky and ground, the y of the horizon, the x of the light (x, 0.7, 0.7), the people."""

    kind: str
    sky: str
    ground: str
    horizon: float
    light_x: float
    people: tuple[Person, ...]

    @property
    def prompt(self) -> str:
        """The caption: clothes of every person and the surroundings, never the pose."""
        if self.kind == "portrait":
            return f"a portrait of {_clothes(self.people[0].identity, ('shirt',))} at {self.sky}"
        people = " and ".join(_clothes(person.identity, ("shirt", "trousers")) for person in self.people)
        return f"{people} on {self.ground} at {self.sky}"


def _clothes(identity: Mapping[str, Any], garments: tuple[str, ...]) -> str:
    words = [f"{'a ' if garment == 'shirt' else ''}{identity[garment]} {garment}" for garment in garments]
    return "a person in " + " and ".join(words + ([f"a {identity['hat']} hat"] if identity["hat"] else []))


def _word(rng: Generator, vocabulary: Mapping[str, Any]) -> str:
    return list(vocabulary)[rng.integers(len(vocabulary))]


def _draw_identity(rng: Generator) -> dict[str, Any]:
    words = {"shirt": COLORS, "trousers": COLORS, "skin": SKINS, "hair": HAIRS, "eye": EYES}
    identity: dict[str, Any] = {attribute: _word(rng, vocabulary) for attribute, vocabulary in words.items()}
    identity["hat"] = _word(rng, COLORS) if rng.random() < HAT_SHARE else None
    identity["glasses"] = bool(rng.random() < GLASSES_SHARE)
    return identity


def _draw_person(rng: Generator, kind: str, spot: Spot) -> Person:
    low, high = np.array(list(POSE.values())).T
    pose = dict(zip(POSE, rng.uniform(low, high).tolist(), strict=True))
    if kind == "portrait":
        pose["yaw"] = rng.uniform(*PORTRAIT_YAW)
    elif rng.random() < BACK_VIEW_SHARE:
        pose["yaw"] += math.pi
    return Person(_draw_identity(rng), pose, rng.uniform(*spot.scale), (rng.uniform(*spot.x), rng.uniform(*spot.y)))


def draw_scene(seed: tuple[int, ...], kinds: Mapping[str, float]) -> Scene:
    """Draws one scene from `seed` alone.

    Args:
        seed: non-negative integers below 2**32, the entropy of numpy's SeedSequence. SeedSequence pads with zeros, so
            only seeds of one length are sure to differ from each other.
        kinds: probability of each kind, as KINDS.
    """
    rng = default_rng(SeedSequence(seed))
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    return Scene(
        kind=kind,
        sky=_word(rng, SKIES),
        ground=_word(rng, GROUNDS),
        horizon=rng.uniform(*HORIZON),
        light_x=rng.uniform(*LIGHT_X),
        people=tuple(_draw_person(rng, kind, spot) for spot in SPOTS[kind]),
    )
