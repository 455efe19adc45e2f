"""The parts of a marionette, their paints, and the points of its head."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from data_prep.marionette.vocabulary import CLOTHED, COLORS, EYES, HAIRS, SIDES, SKINS, Rgb
from rg.points import KEYPOINTS


class Part(NamedTuple):
    """A capsule from point `start` to point `end` (a sphere where they coincide), its average radius in world units and
    the number of the person's build that it grows with, its paint, the frame that it turns with (roll included), its
    name in label maps, and the keypoints that it shows: seen where it is the front-most part."""

    start: str
    end: str
    radius: float
    girth: str
    paint: str
    frame: str
    label: str
    keypoints: tuple[str, ...] = ()


def _limb(start: str, end: str, radius: float, paint: str, frame: str, label: str) -> Part:
    shown = tuple({name: None for name in (start, end) if name in KEYPOINTS})
    return Part(start, end, radius, "limb_girth", paint, frame, label, shown)


def _face(name: str, radius: float, paint: str, label: str, girth: str = "head_size") -> Part:
    """A part of the head: a sphere on the midline, or a bar between the two points of a pair."""
    ends = (name, name) if name in MIDLINE else (f"right_{name}", f"left_{name}")
    return Part(*ends, radius, girth, paint, "face", label, ("nose",) if name == "nose_tip" else ())


def _side(side: str) -> list[Part]:
    shoulder, elbow, wrist, hip, knee, ankle = (
        f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    )
    upper_arm, forearm, thigh, shin = (f"{side}_{name}" for name in ("upper_arm", "forearm", "thigh", "shin"))
    eye, hair = f"{side}_eye", f"{side}_lock"
    return [
        _limb(shoulder, elbow, 0.062, "shirt", upper_arm, upper_arm),
        _limb(elbow, wrist, 0.05, "skin", forearm, forearm),
        _limb(wrist, wrist, 0.06, "skin", forearm, f"{side}_hand"),
        _limb(hip, knee, 0.085, "trousers", thigh, thigh),
        _limb(knee, ankle, 0.068, "trousers", shin, shin),
        _limb(ankle, ankle, 0.075, "shoe", shin, f"{side}_foot"),
        Part(f"{side}_eyeball", f"{side}_eyeball", 0.03, "head_size", "eyeball", "face", "face", (eye,)),
        Part(f"{side}_iris", f"{side}_iris", 0.021, "head_size", "iris", "face", "face", (eye,)),
        Part(hair, f"{hair}_end", 0.05, "hair_volume", "long_hair", "face", "hair"),
    ]


# Points of the head in its own axes: on the midline, and the left one of each pair. Hair that is long hangs down.
MIDLINE = {
    "nose": (0.0, -0.01, 0.125), "nose_tip": (0.0, -0.012, 0.122), "hair": (0.0, 0.035, -0.035),
    "mane": (0.0, 0.0, -0.06), "mane_end": (0.0, 0.0, -0.075),
}  # fmt: skip
PAIRED = {
    "eye": (0.045, 0.03, 0.105), "eyeball": (0.045, 0.03, 0.098), "iris": (0.045, 0.03, 0.112),
    "ear": (0.125, 0.01, 0.0), "mouth": (0.03, -0.06, 0.108),
    "lock": (0.095, 0.03, -0.03), "lock_end": (0.11, 0.03, -0.03),
    "cap": (0.03, 0.09, 0.0), "brim": (0.06, 0.075, 0.10), "glass": (0.07, 0.03, 0.118),
}  # fmt: skip
PARTS = (
    # The hips lie inside the trunk, the neck between the shoulders: a clothed joint is seen where its clothes are.
    Part("pelvis", "neck", 0.145, "girth", "shirt", "trunk", "trunk", ("neck", "right_hip", "left_hip")),
    Part(
        "right_shoulder", "left_shoulder", 0.075, "girth", "shirt", "trunk", "trunk",
        ("neck", "right_shoulder", "left_shoulder"),
    ),
    Part("right_hip", "left_hip", 0.11, "girth", "trousers", "trunk", "hips", ("right_hip", "left_hip")),
    Part("neck", "head", 0.05, "limb_girth", "skin", "face", "face", ("neck",)),
    Part("head", "head", 0.125, "head_size", "skin", "face", "face"),
    *_side("right"),
    *_side("left"),
    _face("hair", 0.127, "hair", "hair", "hair_volume"),
    Part("mane", "mane_end", 0.085, "hair_volume", "long_hair", "face", "hair"),
    _face("nose_tip", 0.018, "nose", "face", "nose_size"),
    _face("mouth", 0.011, "mouth", "face"),
    _face("cap", 0.113, "hat", "hat"),
    _face("brim", 0.03, "hat", "hat"),
    _face("glass", 0.022, "glasses", "glasses"),
)  # fmt: skip
SOLE = 0.06  # from an ankle down to the ground
# What may touch the ground, and how far below the point: whoever crouches or sits does not sink in.
LOWEST = {"ankle": SOLE, "knee": 0.07, "wrist": 0.06, "hip": 0.12}
# An ear is a point on the side of the head without a part of its own: it is taken to be as thick as an eyeball.
EAR_RADIUS = 0.03
# Which part shows which keypoint, and the radius of a keypoint: that of its thinnest part.
SHOWS = torch.tensor([[name in part.keypoints for part in PARTS] for name in KEYPOINTS])  # (18, K) bool
KEYPOINT_RADIUS = torch.tensor(
    [min([part.radius for part in PARTS if name in part.keypoints], default=EAR_RADIUS) for name in KEYPOINTS]
)  # (18,) world units
# By the label of a limb, what may have a colour of its own there: a key of the identity.
OWN_LIMBS = {f"{side}_{part}": f"{side}_{limb}" for side in SIDES for limb, parts in CLOTHED.items() for part in parts}
# Eyes are seen through glasses.
CLEAR = torch.tensor([part.paint == "glasses" for part in PARTS])  # (K,) bool


def palette(identity: Mapping[str, Any]) -> dict[str, Rgb]:
    """RGB 0..255 of every paint that this person wears; what is not worn, and hair that is not long, is missing."""
    skin, hair = SKINS[identity["skin"]], HAIRS[identity["hair"]]
    colors: dict[str, Rgb] = {
        "shirt": COLORS[identity["shirt"]],
        "trousers": COLORS[identity["trousers"]],
        "skin": skin,
        "hair": hair,
        "iris": EYES[identity["eye"]],
        "nose": (int(0.85 * skin[0]), int(0.85 * skin[1]), int(0.85 * skin[2])),
        "eyeball": (240, 240, 240),
        "mouth": (170, 60, 60),
        "shoe": (50, 40, 35),
    }
    if identity["hair_length"] == "long":
        colors["long_hair"] = hair
    if identity["hat"]:
        colors["hat"] = COLORS[identity["hat"]]
    if identity["glasses"]:
        colors["glasses"] = (15, 15, 18)
    return colors


def worn(part: Part, colors: Mapping[str, Rgb], identity: Mapping[str, Any]) -> tuple[str, Rgb]:
    """The paint of a part and its colour, black where it is not worn.

    A sleeve and a trouser leg in a colour of their own are painted like the rest of the garment.
    """
    own = OWN_LIMBS.get(part.label)
    if own in identity:
        return "shirt" if own.endswith("sleeve") else "trousers", COLORS[identity[own]]
    return part.paint, colors.get(part.paint, (0, 0, 0))
