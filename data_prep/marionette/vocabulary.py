"""The words of the marionette world: vocabularies and their colours, prompts, and what can be read from an image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Sky:
    """A sky: RGB overhead and at the horizon, brightness of all that is lit under it, and in shares of 1 the contrast
    of its clouds and how much of the light a shadow takes away."""

    top: Rgb
    bottom: Rgb
    brightness: float
    clouds: float
    shadow: float


@dataclass(frozen=True)
class Ground:
    """A ground: its RGB and its texture (a key of materials.TEXTURES, periods per world unit, contrast in [0, 1])."""

    color: Rgb
    texture: str
    frequency: float
    contrast: float


# The colours of shirts, trousers and hats.
COLORS: dict[str, Rgb] = {
    "red": (200, 40, 40), "blue": (45, 80, 190), "green": (50, 150, 60), "yellow": (225, 195, 50),
    "white": (230, 230, 230), "black": (40, 40, 45), "orange": (230, 125, 35), "purple": (125, 60, 160),
}  # fmt: skip
SKINS: dict[str, Rgb] = {"pale": (245, 205, 175), "tan": (215, 160, 120), "brown": (150, 100, 70), "dark": (95, 62, 45)}
HAIRS: dict[str, Rgb] = {"black": (30, 22, 18), "brown": (95, 60, 30), "blond": (205, 165, 85), "ginger": (160, 65, 30)}
LENGTHS: tuple[str, ...] = ("short", "long")
EYES: dict[str, Rgb] = {"blue": (60, 110, 190), "green": (60, 140, 80), "brown": (85, 50, 25)}
GROUNDS: dict[str, Ground] = {
    "grass": Ground((80, 140, 60), "patches", 1.6, 0.22),
    "sand": Ground((215, 190, 140), "stripes", 1.4, 0.10),
    "snow": Ground((235, 240, 245), "patches", 0.9, 0.07),
    "road": Ground((90, 90, 95), "checks", 0.7, 0.16),
}
SKIES: dict[str, Sky] = {
    "day": Sky((135, 190, 235), (215, 232, 245), 1.0, 0.18, 0.35),
    "dusk": Sky((70, 60, 120), (240, 150, 90), 0.75, 0.12, 0.3),
    "night": Sky((12, 14, 40), (45, 50, 90), 0.5, 0.08, 0.25),
    "studio": Sky((170, 170, 175), (200, 200, 205), 0.95, 0.0, 0.25),
}
# Shirt and trousers that are never drawn together unless asked for: what a model learns of colours without them tells
# whether it puts words together or remembers pairs.
UNSEEN_PAIRS: dict[str, str] = dict(zip(COLORS, [*list(COLORS)[3:], *list(COLORS)[:3]], strict=True))
_PERSON: dict[str, tuple[str, ...]] = {
    "shirt": tuple(COLORS), "trousers": tuple(COLORS), "hat": ("none", *COLORS), "glasses": ("no", "yes"),
    "hair": tuple(HAIRS), "hair_length": LENGTHS,
}  # fmt: skip
# What can be read from an image: every attribute and its values. In a scene of two people the plain names are the
# left one's.
ATTRIBUTES: dict[str, tuple[str, ...]] = (
    {"people": ("one", "two"), "portrait": ("no", "yes"), "sky": tuple(SKIES), "ground": tuple(GROUNDS)}
    | _PERSON
    | {f"second_{name}": values for name, values in _PERSON.items()}
)
_WORDS = "a", "person", "people", "portrait", "of", "with", "in", "and", "on", "at", "two"
_THINGS = "hair", "shirt", "trousers", "hat", "glasses"
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys([*_WORDS, *_THINGS, *COLORS, *HAIRS, *LENGTHS, *GROUNDS, *SKIES]))
SIDES = "right", "left"
# Limbs that may be clothed in a colour of their own, by the word for it.
CLOTHED = {"sleeve": ("upper_arm", "forearm"), "leg": ("thigh", "shin")}
FACINGS = "front", "right", "back", "left"  # by quarter turns, right-handed about y, from the camera on
SIDED_VOCABULARY: tuple[str, ...] = (*VOCABULARY, "facing", *FACINGS, *CLOTHED)  # of scenes that are `sided`


def facing(turn: float) -> str:
    """The word of FACINGS whose quarter holds a turn of the body against the camera's (radians, right-handed about y).

    Left and right are those of the image: who faces left looks towards its left edge.
    """
    return FACINGS[round(turn / (math.pi / 2)) % len(FACINGS)]


def _own_limb(identity: Mapping[str, Any], limb: str) -> str:
    """What is said of a sleeve or a trouser leg in a colour of its own; nothing where there is none."""
    found = [(identity[f"{side}_{limb}"], side) for side in SIDES if f"{side}_{limb}" in identity]
    return "".join(f" with a {color} {side} {limb}" for color, side in found)


def describe_person(
    identity: Mapping[str, Any], *, portrait: bool, glasses: bool, hair: bool, facing: str | None = None
) -> str:
    """A person in words: clothes always, glasses, hair and a word of FACINGS where asked for."""
    words = [f"a {identity['shirt']} shirt{_own_limb(identity, 'sleeve')}"]
    words += [] if portrait else [f"{identity['trousers']} trousers{_own_limb(identity, 'leg')}"]
    words += [f"a {identity['hat']} hat"] if identity["hat"] else []
    words += ["glasses"] if glasses else []
    head = f" with {identity['hair_length']} {identity['hair']} hair" if hair else ""
    turned = f" facing {facing}" if facing else ""
    return f"a person{turned}{head} in {' and '.join(words)}"


def describe_scene(people: Sequence[str], *, kind: str, ground: str, sky: str) -> str:
    """The prompt of a scene whose people are described by `people`."""
    if kind == "portrait":
        return f"a portrait of {people[0]} at {sky}"
    if kind == "two":
        return f"two people on {ground} at {sky} {people[0]} and {people[1]}"
    return f"{people[0]} on {ground} at {sky}"


def read_person(identity: Mapping[str, Any], *, portrait: bool, glasses: bool) -> dict[str, str]:
    """The attributes of one person, values as in ATTRIBUTES; a portrait shows no trousers."""
    values = {name: identity[name] for name in ("shirt", "trousers", "hair", "hair_length")}
    values |= {"hat": identity["hat"] or "none", "glasses": "yes" if glasses else "no"}
    return {name: values[name] for name in _PERSON if not (portrait and name == "trousers")}
