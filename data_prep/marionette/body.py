"""The body of a marionette: its parts and paints, and the way from joint angles and build to points and frames.

A body is measured in world units with its pelvis at the origin, x to the person's left, y up, z forward. Points are
(3, ...) tensors, coordinate first. Nothing here sums over an axis or multiplies matrices: element-wise arithmetic gives
each person the same bits whoever shares the batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.marionette.words import COLORS, EYES, HAIRS, SKINS, Rgb
from rg.points import KEYPOINTS

Frame = tuple[Tensor, Tensor, Tensor]  # a body part's own x, y and z axes, each (3, ...)
Turn = tuple[Tensor, Tensor]  # cosine and sine of an angle, each (...)


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


def turn(frame: Frame, axis: int, angle: Turn, sign: int = 1) -> Frame:
    """Turns a frame about its own axis 0, 1 or 2, right-handed for sign 1 and left-handed for sign -1."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cosine, sine = angle[0], sign * angle[1]
    axes = list(frame)
    axes[first] = cosine * frame[first] + sine * frame[second]
    axes[second] = cosine * frame[second] - sine * frame[first]
    return axes[0], axes[1], axes[2]


def _head_points(head: Tensor, face: Frame, shape: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Points of MIDLINE and PAIRED, (3, ...), moved by the face's build."""

    def place(name: str, sign: int, offset: tuple[float, float, float]) -> Tensor:
        x, y, z = (shape["head_size"] * value for value in offset)
        if name in ("eye", "eyeball", "iris"):
            x, y = x * shape["eye_spacing"], y + shape["eye_height"]
        elif name == "glass":
            y = y + shape["eye_height"]
        elif name == "mouth":
            x, y = x * shape["mouth_width"], y + shape["mouth_height"]
        elif name in ("mane_end", "lock_end"):
            y = y - shape["hair_fall"]
        return head + sign * x * face[0] + y * face[1] + z * face[2]

    midline = {name: place(name, 1, offset) for name, offset in MIDLINE.items()}
    sides = (("right", -1), ("left", 1))
    return midline | {
        f"{side}_{name}": place(name, sign, offset) for side, sign in sides for name, offset in PAIRED.items()
    }


def body_points(pose: Mapping[str, Turn], shape: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Frame]]:
    """Forward kinematics.

    Args:
        pose: cosine and sine (...) of every angle of scene.POSE.
        shape: every number of scene.SHAPE, (...).

    Returns:
        every point that PARTS and KEYPOINTS name, (3, ...) world units, pelvis at the origin, and every frame that
        PARTS name.
    """
    one, zero = torch.ones_like(pose["yaw"][0]), torch.zeros_like(pose["yaw"][0])
    world = (torch.stack([one, zero, zero]), torch.stack([zero, one, zero]), torch.stack([zero, zero, one]))
    trunk = turn(turn(turn(world, 1, pose["yaw"]), 2, pose["lean_roll"]), 0, pose["lean_pitch"])
    face = turn(turn(turn(trunk, 2, pose["head_roll"]), 0, pose["head_pitch"]), 1, pose["head_yaw"])
    frames = {"trunk": trunk, "face": face}
    size, arm, leg = shape["height"], shape["height"] * shape["arm_length"], shape["height"] * shape["leg_length"]
    points = {"pelvis": torch.stack([zero, zero, zero]), "neck": 0.52 * size * trunk[1]}
    points["head"] = points["neck"] + 0.2 * size * face[1]
    points |= _head_points(points["head"], face, shape)
    for side, sign in (("right", -1), ("left", 1)):
        upper_arm = turn(turn(trunk, 2, pose[f"{side}_arm_spread"], sign), 0, pose[f"{side}_arm_swing"])
        forearm = turn(turn(upper_arm, 0, pose[f"{side}_elbow"], -1), 2, pose[f"{side}_elbow_twist"], sign)
        thigh = turn(turn(trunk, 2, pose[f"{side}_leg_spread"], sign), 0, pose[f"{side}_leg_swing"])
        shin = turn(thigh, 0, pose[f"{side}_knee"])
        shoulder = points["neck"] + size * (sign * 0.19 * shape["shoulder_width"] * trunk[0] - 0.03 * trunk[1])
        points[f"{side}_shoulder"] = shoulder
        points[f"{side}_elbow"] = shoulder - 0.28 * arm * upper_arm[1]
        points[f"{side}_wrist"] = points[f"{side}_elbow"] - 0.26 * arm * forearm[1]
        points[f"{side}_hip"] = sign * 0.11 * size * trunk[0]
        points[f"{side}_knee"] = points[f"{side}_hip"] - 0.42 * leg * thigh[1]
        points[f"{side}_ankle"] = points[f"{side}_knee"] - 0.40 * leg * shin[1]
        bones = {"upper_arm": upper_arm, "forearm": forearm, "thigh": thigh, "shin": shin}
        frames |= {f"{side}_{name}": frame for name, frame in bones.items()}
    return points, frames


def stand(points: Mapping[str, Tensor], place: Tensor) -> dict[str, Tensor]:
    """Sets a body down with its lowest joint on the ground.

    Args:
        points: of `body_points`, (3, ...).
        place: (2, ...), x and z of the pelvis.
    """
    lowest = torch.full_like(place[0], torch.inf)
    for name, reach in LOWEST.items():
        for side in ("right", "left"):
            lowest = torch.minimum(lowest, points[f"{side}_{name}"][1] - reach)
    shift = torch.stack([place[0], -lowest, place[1]])
    return {name: point + shift for name, point in points.items()}
