"""The way of a marionette from joint angles and build to points and frames; its parts are in parts.py.

A body is measured in world units with its pelvis at the origin, x to the person's left, y up, z forward. Points are
(3, ...) tensors, coordinate first. Nothing here sums over an axis or multiplies matrices: element-wise arithmetic gives
each person the same bits whoever shares the batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from data_prep.marionette.body_parts import LOWEST, MIDLINE, PAIRED

Frame = tuple[Tensor, Tensor, Tensor]  # a body part's own x, y and z axes, each (3, ...)
Turn = tuple[Tensor, Tensor]  # cosine and sine of an angle, each (...)


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


def place_on_ground(points: Mapping[str, Tensor], place: Tensor) -> dict[str, Tensor]:
    """Moves a body so that its lowest joint is on the ground.

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
