"""The body of a marionette: its parts and paints, and the way from joint angles to points.

A body is measured in body units with its pelvis at the origin (a person who stands upright is 1.7 units tall), x to the
person's left, y up, z forward. Points are (3, ...) tensors, coordinate first. Nothing here sums over an axis or
multiplies matrices: element-wise arithmetic gives each person the same bits whoever shares the batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.marionette.scene import COLORS, EYES, HAIRS, SKINS, Rgb
from rg.points import KEYPOINTS

Frame = tuple[Tensor, Tensor, Tensor]  # a body part's own x, y and z axes, each (3, ...)
Turn = tuple[Tensor, Tensor]  # cosine and sine of an angle, each (...)


class Part(NamedTuple):
    """A capsule from point `start` to point `end` (a sphere where they coincide), its radius in body units, its paint,
    and the keypoints that it shows: seen where it is the front-most part."""

    start: str
    end: str
    radius: float
    paint: str
    keypoints: tuple[str, ...] = ()


def _limb(start: str, end: str, radius: float, paint: str) -> Part:
    return Part(start, end, radius, paint, tuple({name: None for name in (start, end) if name in KEYPOINTS}))


def _side(side: str) -> list[Part]:
    shoulder, elbow, wrist, hip, knee, ankle = (
        f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    )
    return [
        _limb(shoulder, elbow, 0.062, "shirt"),
        _limb(elbow, wrist, 0.05, "skin"),
        _limb(wrist, wrist, 0.06, "skin"),
        _limb(hip, knee, 0.085, "trousers"),
        _limb(knee, ankle, 0.068, "trousers"),
        _limb(ankle, ankle, 0.075, "shoe"),
        Part(f"{side}_eyeball", f"{side}_eyeball", 0.03, "eyeball", (f"{side}_eye",)),
        Part(f"{side}_iris", f"{side}_iris", 0.021, "iris", (f"{side}_eye",)),
    ]


PARTS = (
    # The hips lie inside the trunk, the neck between the shoulders: a clothed joint is seen where its clothes are.
    Part("pelvis", "neck", 0.145, "shirt", ("neck", "right_hip", "left_hip")),
    Part("right_shoulder", "left_shoulder", 0.075, "shirt", ("neck", "right_shoulder", "left_shoulder")),
    _limb("right_hip", "left_hip", 0.11, "trousers"),
    _limb("neck", "head", 0.05, "skin"),
    _limb("head", "head", 0.125, "skin"),
    *_side("right"),
    *_side("left"),
    Part("hair", "hair", 0.127, "hair"),
    Part("nose_tip", "nose_tip", 0.018, "nose", ("nose",)),
    Part("right_mouth", "left_mouth", 0.011, "mouth"),
    Part("right_cap", "left_cap", 0.105, "hat"),
    Part("right_brim", "left_brim", 0.03, "hat"),
    Part("right_glass", "left_glass", 0.014, "glasses"),
)

# Points of the head in its own axes: on the midline, and the left one of each pair.
MIDLINE = {"nose": (0.0, -0.01, 0.125), "nose_tip": (0.0, -0.012, 0.122), "hair": (0.0, 0.035, -0.035)}
PAIRED = {
    "eye": (0.045, 0.03, 0.105), "eyeball": (0.045, 0.03, 0.098), "iris": (0.045, 0.03, 0.112),
    "ear": (0.125, 0.01, 0.0), "mouth": (0.03, -0.06, 0.108),
    "cap": (0.03, 0.09, 0.0), "brim": (0.06, 0.075, 0.10), "glass": (0.08, 0.03, 0.125),
}  # fmt: skip
SOLE = 0.06  # from the lower ankle down to the ground
# An ear is a point on the side of the head without a part of its own: it is taken to be as thick as an eyeball.
EAR_RADIUS = 0.03

# Which part shows which keypoint, and the radius of a keypoint: that of its thinnest part.
SHOWS = torch.tensor([[name in part.keypoints for part in PARTS] for name in KEYPOINTS])  # (18, K) bool
KEYPOINT_RADIUS = torch.tensor(
    [min([part.radius for part in PARTS if name in part.keypoints], default=EAR_RADIUS) for name in KEYPOINTS]
)  # (18,) body units
# Eyes are seen through glasses.
CLEAR = torch.tensor([part.paint == "glasses" for part in PARTS])  # (K,) bool


def palette(identity: Mapping[str, Any]) -> dict[str, Rgb]:
    """RGB 0..255 of every paint that this person wears; a hat or glasses that are not worn are missing."""
    skin = SKINS[identity["skin"]]
    colors: dict[str, Rgb] = {
        "shirt": COLORS[identity["shirt"]],
        "trousers": COLORS[identity["trousers"]],
        "skin": skin,
        "hair": HAIRS[identity["hair"]],
        "iris": EYES[identity["eye"]],
        "nose": (int(0.85 * skin[0]), int(0.85 * skin[1]), int(0.85 * skin[2])),
        "eyeball": (240, 240, 240),
        "mouth": (170, 60, 60),
        "shoe": (50, 40, 35),
    }
    if identity["hat"]:
        colors["hat"] = COLORS[identity["hat"]]
    if identity["glasses"]:
        colors["glasses"] = (15, 15, 18)
    return colors


def turn(frame: Frame, axis: int, angle: Turn, sign: int = 1) -> Frame:
    """Turns a frame about its own axis 0, 1 or 2, right-handed for sign 1 and left-handed for sign -1."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cosine, sine = angle[0], sign * angle[1]
    axes = list(frame)
    axes[first] = cosine * frame[first] + sine * frame[second]
    axes[second] = cosine * frame[second] - sine * frame[first]
    return axes[0], axes[1], axes[2]


def _move(origin: Tensor, frame: Frame, offset: tuple[float, float, float]) -> Tensor:
    return origin + offset[0] * frame[0] + offset[1] * frame[1] + offset[2] * frame[2]


def body_points(pose: Mapping[str, Turn]) -> dict[str, Tensor]:
    """Forward kinematics.

    Args:
        pose: cosine and sine (...) of every angle of scene.POSE.

    Returns:
        every point that PARTS and KEYPOINTS name, (3, ...) in body units, pelvis at the origin, the camera along +z.
    """
    one, zero = torch.ones_like(pose["yaw"][0]), torch.zeros_like(pose["yaw"][0])
    world = (torch.stack([one, zero, zero]), torch.stack([zero, one, zero]), torch.stack([zero, zero, one]))
    trunk = turn(turn(turn(world, 1, pose["yaw"]), 2, pose["lean_roll"]), 0, pose["lean_pitch"])
    points = {"pelvis": torch.stack([zero, zero, zero]), "neck": 0.52 * trunk[1]}
    face = turn(turn(turn(trunk, 2, pose["head_roll"]), 0, pose["head_pitch"]), 1, pose["head_yaw"])
    points["head"] = points["neck"] + 0.2 * face[1]
    for name, offset in MIDLINE.items():
        points[name] = _move(points["head"], face, offset)
    for side, sign in (("right", -1), ("left", 1)):
        for name, (x, y, z) in PAIRED.items():
            points[f"{side}_{name}"] = _move(points["head"], face, (sign * x, y, z))
        points[f"{side}_shoulder"] = _move(points["neck"], trunk, (sign * 0.19, -0.03, 0.0))
        upper_arm = turn(turn(trunk, 2, pose[f"{side}_arm_spread"], sign), 0, pose[f"{side}_arm_swing"])
        forearm = turn(turn(upper_arm, 0, pose[f"{side}_elbow"], -1), 2, pose[f"{side}_elbow_twist"], sign)
        points[f"{side}_elbow"] = points[f"{side}_shoulder"] - 0.28 * upper_arm[1]
        points[f"{side}_wrist"] = points[f"{side}_elbow"] - 0.26 * forearm[1]
        points[f"{side}_hip"] = sign * 0.11 * trunk[0]
        thigh = turn(turn(trunk, 2, pose[f"{side}_leg_spread"], sign), 0, pose[f"{side}_leg_swing"])
        points[f"{side}_knee"] = points[f"{side}_hip"] - 0.42 * thigh[1]
        points[f"{side}_ankle"] = points[f"{side}_knee"] - 0.40 * turn(thigh, 0, pose[f"{side}_knee"])[1]
    return points


def place_body(points: Mapping[str, Tensor], scale: Tensor, place: Tensor, portrait: Tensor) -> dict[str, Tensor]:
    """Scales a body and sets it down with its soles at `place`, or in a portrait with its head there.

    Args:
        points: of `body_points`, (3, ...).
        scale: world units per body unit, (...).
        place: (3, ...) in world units.
        portrait: bool (...).
    """
    ankles = torch.minimum(points["right_ankle"][1], points["left_ankle"][1])
    soles = torch.stack([torch.zeros_like(ankles), ankles - SOLE, torch.zeros_like(ankles)])
    anchor = torch.where(portrait, points["head"], soles)
    return {name: (point - anchor) * scale + place for name, point in points.items()}
