"""The draw of a marionette scene from a seed."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

from data_prep.marionette.scene import (
    BACK_VIEW_SHARE,
    ELEVATION,
    FOCAL,
    FRONT_SHARE,
    GLASSES_SHARE,
    HAT_SHARE,
    KINDS,
    LIGHT_HEIGHT,
    LIGHT_TURN,
    NAMED_FACING_SHARE,
    NAMED_HAIR_SHARE,
    OWN_LIMB_SHARE,
    PATTERNS,
    PORTRAIT_YAW,
    POSE,
    SCALES,
    SHAPE,
    THING_COUNTS,
    THINGS,
    Camera,
    Pairs,
    Person,
    Scene,
    Thing,
)
from data_prep.marionette.vocabulary import COLORS, EYES, GROUNDS, HAIRS, LENGTHS, SIDES, SKIES, SKINS, UNSEEN_PAIRS

SIDED_STREAM = 0x51DE5  # keeps what only sided scenes draw apart from all other draws of a seed


def _word(rng: Generator, vocabulary: Mapping[str, Any] | tuple[str, ...]) -> str:
    return list(vocabulary)[rng.integers(len(vocabulary))]


def _choice(rng: Generator, shares: Mapping[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def draw_identity(rng: Generator, pairs: Pairs) -> dict[str, Any]:
    """Words, build and patterns of one person."""
    words = {"shirt": COLORS, "trousers": COLORS, "skin": SKINS, "hair": HAIRS, "hair_length": LENGTHS, "eye": EYES}
    identity: dict[str, Any] = {attribute: _word(rng, vocabulary) for attribute, vocabulary in words.items()}
    unseen = UNSEEN_PAIRS[identity["shirt"]]
    while pairs == "seen" and identity["trousers"] == unseen:
        identity["trousers"] = _word(rng, COLORS)
    if pairs == "unseen":
        identity["trousers"] = unseen
    identity["hat"] = _word(rng, COLORS) if rng.random() < HAT_SHARE else None
    identity["glasses"] = bool(rng.random() < GLASSES_SHARE)
    low, high = np.array(list(SHAPE.values())).T
    identity |= zip(SHAPE, rng.uniform(low, high).tolist(), strict=True)
    return identity | {f"{garment}_pattern": _choice(rng, PATTERNS) for garment in ("shirt", "trousers")}


def draw_pose(rng: Generator, kind: str, yaw: float) -> dict[str, float]:
    """The angles of a pose seen from a camera of this yaw."""
    low, high = np.array(list(POSE.values())).T
    pose = dict(zip(POSE, rng.uniform(low, high).tolist(), strict=True))
    if kind == "portrait":
        pose["yaw"] = rng.uniform(*PORTRAIT_YAW)
    elif rng.random() < BACK_VIEW_SHARE:
        pose["yaw"] += math.pi
    return pose | {"yaw": pose["yaw"] + yaw}


def _ground_place(camera: Camera, right: float, back: float) -> tuple[float, float]:
    """(x, z) of a place on the ground so far to the right of the origin, seen from the camera, and so far behind it."""
    cosine, sine = math.cos(camera.yaw), math.sin(camera.yaw)
    return right * cosine - back * sine, -right * sine - back * cosine


def _draw_thing(rng: Generator, kind: str, camera: Camera) -> Thing:
    thing = _word(rng, THINGS)
    front = thing in ("ball", "rock") and kind != "portrait" and rng.random() < FRONT_SHARE
    back = rng.uniform(-0.8, -0.4) if front else rng.uniform(0.7, 5.0)
    reach = 1.05 * (camera.distance + back) / FOCAL
    place = _ground_place(camera, rng.uniform(-reach, reach), back)
    return Thing(thing, rng.uniform(*THINGS[thing]), place, _word(rng, COLORS))


def _draw_side(rng: Generator, person: Person) -> Person:
    """The same person in a sided scene: a sleeve and a trouser leg of one side may get a colour of their own."""
    worn = person.identity
    side, names_facing = _word(rng, SIDES), bool(rng.random() < NAMED_FACING_SHARE)
    # Neither the garment's colour nor one that would show a pair of colours that is never seen.
    hidden = {shirt: trousers for shirt, trousers in UNSEEN_PAIRS.items() if trousers == worn["trousers"]}
    own = {
        "sleeve": [color for color in COLORS if color != worn["shirt"] and color not in hidden],
        "leg": [color for color in COLORS if color not in (worn["trousers"], UNSEEN_PAIRS[worn["shirt"]])],
    }
    limbs = {
        f"{side}_{limb}": _word(rng, tuple(colors)) for limb, colors in own.items() if rng.random() < OWN_LIMB_SHARE
    }
    return replace(person, identity=worn | limbs, names_facing=names_facing)


def _draw_sides(seed: tuple[int, ...], people: tuple[Person, ...]) -> tuple[Person, ...]:
    """The same people in a sided scene."""
    rng = default_rng(SeedSequence((SIDED_STREAM, *seed)))
    return tuple(_draw_side(rng, person) for person in people)


def draw_scene(
    seed: tuple[int, ...], kinds: Mapping[str, float] = KINDS, pairs: Pairs = "seen", *, sided: bool = False
) -> Scene:
    """Draws one scene from `seed` alone.

    Args:
        seed: non-negative integers below 2**32, the entropy of numpy's SeedSequence. SeedSequence pads with zeros, so
            only seeds of one length are sure to differ from each other.
        kinds: probability of each kind, as KINDS.
        pairs: "seen" leaves out UNSEEN_PAIRS, "unseen" draws them alone.
        sided: prompts say which way people face, and the clothes of a left and a right limb may differ; all else is
            drawn as without.
    """
    rng = default_rng(SeedSequence(seed))
    kind = _choice(rng, kinds)
    scale, yaw = rng.uniform(*SCALES[kind]), rng.uniform(-math.pi, math.pi)
    # The soles, or in a portrait the head, come to stand at about the same height of every image.
    right, up = (rng.uniform(-0.15, 0.15), rng.uniform(-0.25, 0.05)) if kind == "portrait" else (
        rng.uniform(-0.3, 0.3) if kind == "one" else rng.uniform(-0.1, 0.1), rng.uniform(0.87, 0.93)
    )  # fmt: skip
    camera = Camera(yaw, rng.uniform(*ELEVATION), FOCAL / scale, (right / scale, up / scale))
    places = [(0.0, 0.0)]
    if kind == "two":
        gaps = rng.uniform(0.28, 0.5, 2) / scale
        places = [
            _ground_place(camera, side * gap, rng.uniform(-0.35, 0.35)) for side, gap in zip((-1, 1), gaps, strict=True)
        ]
    people = tuple(
        Person(
            draw_identity(rng, pairs),
            draw_pose(rng, kind, yaw),
            place,
            rng.uniform(0, 1),
            bool(rng.random() < NAMED_HAIR_SHARE),
        )
        for place in places
    )
    return Scene(
        kind=kind,
        sky=_word(rng, SKIES),
        ground=_word(rng, GROUNDS),
        people=_draw_sides(seed, people) if sided else people,
        camera=camera,
        light=(yaw + rng.uniform(*LIGHT_TURN), rng.uniform(*LIGHT_HEIGHT)),
        things=tuple(_draw_thing(rng, kind, camera) for _ in range(rng.choice(len(THING_COUNTS), p=THING_COUNTS))),
        phase=rng.uniform(0, 1),
    )
