"""The body: anatomy by hand, turns, builds, frames, and feet on the ground."""

import math

import pytest
import torch

from data_prep.marionette.body_parts import LOWEST, MIDLINE, PAIRED, PARTS, SHOWS, palette
from data_prep.marionette.skeleton import place_on_ground, turn
from data_prep.marionette.stage import PEOPLE_PARTS, set_stage
from data_prep.marionette.vocabulary import COLORS, HAIRS, SKINS
from rg.points import KEYPOINTS

SIDES = "right", "left"


@pytest.fixture
def joints(body, person):
    """The points of a person as lists: `joints({"girth": 1.1}, yaw=0.5)`, build and pose."""

    def place(build=None, **pose):
        return {name: point.tolist() for name, point in body(person(worn=build, **pose))[0].items()}

    return place


def test_turns_are_right_handed_about_a_frames_own_axis():
    world = torch.eye(3, dtype=torch.float64).unbind()
    quarter = torch.zeros(()).double(), torch.ones(()).double()
    x, y, z = turn(world, 1, quarter)  # about y: z goes to x
    assert (x.tolist(), y.tolist(), z.tolist()) == ([0, 0, -1], [0, 1, 0], [1, 0, 0])
    x, y, z = turn(world, 0, quarter)  # about x: y goes to z
    assert (x.tolist(), y.tolist(), z.tolist()) == ([1, 0, 0], [0, 0, 1], [0, -1, 0])
    x, y, z = turn(world, 2, quarter, -1)  # left-handed about z: y goes to x
    assert (x.tolist(), y.tolist(), z.tolist()) == ([0, -1, 0], [1, 0, 0], [0, 0, 1])
    tilted = turn(turn(world, 2, quarter), 1, quarter)  # the second turn is about the turned y
    assert tilted[1].tolist() == [-1, 0, 0] and tilted[2].tolist() == [0, 1, 0]


def test_an_upright_body_by_hand(joints):
    points = joints()
    expected = {
        "pelvis": (0, 0, 0), "neck": (0, 0.52, 0), "head": (0, 0.72, 0), "nose": (0, 0.71, 0.125),
        "right_shoulder": (-0.19, 0.49, 0), "right_elbow": (-0.19, 0.21, 0), "left_wrist": (0.19, -0.05, 0),
        "left_hip": (0.11, 0, 0), "right_knee": (-0.11, -0.42, 0), "left_ankle": (0.11, -0.82, 0),
        "right_eye": (-0.045, 0.75, 0.105), "left_ear": (0.125, 0.73, 0), "left_lock_end": (0.11, 0.5, -0.03),
    }  # fmt: skip
    for name, place in expected.items():
        assert points[name] == pytest.approx(place), name


@pytest.mark.parametrize("side", SIDES)
def test_joints_bend_the_way_their_angles_say(joints, side):
    outwards = {"right": -1, "left": 1}[side]

    def moved(point, **pose):
        return [a - b for a, b in zip(joints(**pose)[f"{side}_{point}"], joints()[f"{side}_{point}"], strict=True)]

    half = math.pi / 2
    assert moved("elbow", **{f"{side}_arm_spread": half}) == pytest.approx([outwards * 0.28, 0.28, 0])
    assert moved("elbow", **{f"{side}_arm_swing": -half}) == pytest.approx([0, 0.28, 0.28])  # to the front
    assert moved("wrist", **{f"{side}_elbow": half}) == pytest.approx([0, 0.26, 0.26])  # elbows bend to the front
    assert moved("knee", **{f"{side}_leg_spread": half}) == pytest.approx([outwards * 0.42, 0.42, 0])
    assert moved("knee", **{f"{side}_leg_swing": -half}) == pytest.approx([0, 0.42, 0.42])
    assert moved("ankle", **{f"{side}_knee": half}) == pytest.approx([0, 0.40, -0.40])  # knees bend to the back
    twisted = {f"{side}_elbow": half, f"{side}_elbow_twist": 0.5}
    sideways = outwards * 0.26 * math.sin(0.5)
    assert moved("wrist", **twisted) == pytest.approx([sideways, 0.26, 0.26 * math.cos(0.5)])


def test_trunk_and_head_turn_the_way_their_angles_say(joints):
    assert joints(yaw=math.pi / 2)["nose"] == pytest.approx([0.125, 0.71, 0])  # to the body's left
    assert joints(lean_pitch=math.pi / 2)["neck"] == pytest.approx([0, 0, 0.52])  # bows
    assert joints(lean_roll=math.pi / 2)["neck"] == pytest.approx([-0.52, 0, 0])
    nodding = joints(head_pitch=math.pi / 2)
    assert nodding["head"] == pytest.approx([0, 0.52, 0.2]) and nodding["nose"][1] < nodding["head"][1]
    looking = joints(head_yaw=math.pi / 2)
    assert looking["head"] == pytest.approx([0, 0.72, 0]) and looking["nose"] == pytest.approx([0.125, 0.71, 0])


@pytest.mark.parametrize(
    ("name", "value", "start", "end", "length"),
    [
        ("height", 1.06, "pelvis", "neck", 0.52 * 1.06),
        ("height", 1.06, "left_hip", "left_knee", 0.42 * 1.06),
        ("arm_length", 0.9, "left_shoulder", "left_elbow", 0.28 * 0.9),
        ("arm_length", 0.9, "left_hip", "left_knee", 0.42),
        ("leg_length", 1.1, "right_knee", "right_ankle", 0.40 * 1.1),
        ("leg_length", 1.1, "right_elbow", "right_wrist", 0.26),
        ("shoulder_width", 1.1, "right_shoulder", "left_shoulder", 0.38 * 1.1),
        ("head_size", 1.1, "right_ear", "left_ear", 0.25 * 1.1),
        ("eye_spacing", 1.2, "right_eye", "left_eye", 0.09 * 1.2),
        ("mouth_width", 1.5, "right_mouth", "left_mouth", 0.06 * 1.5),
        ("hair_fall", 0.3, "mane", "mane_end", math.hypot(0.3, 0.015)),
    ],
)
def test_the_build_changes_what_it_names(joints, name, value, start, end, length):
    points = joints({name: value}, left_arm_spread=0.3, left_leg_swing=-0.5)
    assert math.dist(points[start], points[end]) == pytest.approx(length)


def test_eyes_and_mouth_move_up_with_their_heights(joints):
    high, average = joints({"eye_height": 0.01, "mouth_height": -0.01}), joints()
    rise = {name: high[name][1] - average[name][1] for name in average}
    assert {name for name in rise if rise[name] > 0.009} == {
        f"{side}_{name}" for side in SIDES for name in ("eye", "eyeball", "iris", "glass")
    }
    assert {name for name in rise if rise[name] < -0.009} == {"right_mouth", "left_mouth"}


def test_frames_turn_rigidly_and_lie_along_their_bones(body, drawn):
    people = [one.people[0] for one in drawn[:40]]
    for someone in people:
        points, frames = body(someone)
        for name, (x, y, z) in frames.items():
            torch.testing.assert_close(torch.linalg.cross(x, y), z, msg=name)
            assert x.norm().item() == pytest.approx(1) and y.norm().item() == pytest.approx(1)
        for part in PARTS:
            if part.frame in ("right_upper_arm", "left_forearm", "right_thigh", "left_shin") and part.start != part.end:
                bone = points[part.start] - points[part.end]
                torch.testing.assert_close(bone / bone.norm(), frames[part.frame][1])


def test_limbs_roll_with_the_joints_above_them(body, person):
    """Poses that leave a bone where it is and turn it about itself."""
    half = math.pi / 2
    for pose, bone in (
        ({"yaw": 0.4}, "trunk"),
        ({"head_yaw": 0.4}, "face"),
        ({"yaw": 0.4}, "left_thigh"),
        ({"yaw": 0.4}, "right_forearm"),
    ):
        _, frames = body(person(**pose))
        assert frames[bone][1].tolist() == pytest.approx([0, 1, 0])
        assert frames[bone][2].tolist() == pytest.approx([math.sin(0.4), 0, math.cos(0.4)])
    # A forearm that points to the front is turned sideways by its twist, and the pattern on it with it.
    _, frames = body(person(left_elbow=half, left_elbow_twist=0.4))
    assert frames["left_forearm"][1].tolist() == pytest.approx([-math.sin(0.4), 0, -math.cos(0.4)])


def test_whoever_stands_crouches_or_sits_touches_the_ground_and_does_not_sink(drawn):
    world = set_stage(drawn[:600]).world
    there = world.radius[:, :PEOPLE_PARTS] > 0
    low = torch.minimum(world.start[1], world.end[1])[:, :PEOPLE_PARTS]
    axis, skin = (values.masked_fill(~there, 9.0).amin(1) for values in (low, low - world.radius[:, :PEOPLE_PARTS]))
    assert axis.min() >= min(LOWEST.values()) - 1e-9  # every bone is as far above the ground as a sole is thick
    assert skin.min() > -0.031 and skin.max() < 0.02  # flesh yields: half of a foot at most


@pytest.mark.parametrize(
    ("pose", "name"),
    [
        ({}, "ankle"),
        ({"leg_swing": -1.2, "knee": 1.5}, "ankle"),
        ({"knee": 1.5, "leg_swing": 0.2}, "knee"),
        ({"leg_swing": -math.pi / 2}, "hip"),
    ],
)
def test_a_body_is_set_down_on_its_lowest_joint(body, person, pose, name):
    points, _ = body(person(**{f"{side}_{angle}": value for side in SIDES for angle, value in pose.items()}))
    placed = place_on_ground(points, torch.tensor([2.0, -3.0], dtype=torch.float64))
    assert placed["pelvis"][[0, 2]].tolist() == [2, -3]
    heights = {joint: placed[f"right_{joint}"][1].item() - reach for joint, reach in LOWEST.items()}
    assert min(heights, key=heights.get) == name and heights[name] == pytest.approx(0)
    shift = placed["pelvis"] - points["pelvis"]
    assert all(torch.allclose(placed[name] - points[name], shift) for name in points)


def test_paints_are_what_is_worn(person):
    plain = palette(person().identity)
    assert plain["shirt"] == COLORS["red"] and plain["trousers"] == COLORS["blue"] and plain["skin"] == SKINS["tan"]
    assert {"hat", "glasses", "long_hair"}.isdisjoint(plain)
    dressed = palette(person(worn={"hat": "green", "glasses": True, "hair_length": "long"}).identity)
    assert set(dressed) - set(plain) == {"hat", "glasses", "long_hair"}
    assert dressed["hat"] == COLORS["green"] and dressed["long_hair"] == dressed["hair"] == HAIRS["black"]
    assert {part.paint for part in PARTS} == set(dressed)


def test_every_joint_but_the_ears_is_shown_by_parts_that_they_lie_on_or_in(joints):
    shown = {name for name, parts in zip(KEYPOINTS, SHOWS, strict=True) if parts.any()}
    assert set(KEYPOINTS) - shown == {"right_ear", "left_ear"}
    points = joints()
    for part in PARTS:
        for name in part.keypoints:
            start, end, joint = (torch.tensor(points[point]) for point in (part.start, part.end, name))
            axis = end - start
            share = ((joint - start) @ axis / (axis @ axis).clamp_min(1e-9)).clamp(0, 1)
            assert (joint - start - share * axis).norm() <= part.radius + 0.01, (part.label, name)


def test_the_face_is_symmetric_about_its_midline(joints):
    points = joints()
    for name in PAIRED:
        right, left = points[f"right_{name}"], points[f"left_{name}"]
        assert right == pytest.approx([-left[0], *left[1:]]) and left[0] > 0
    assert all(points[name][0] == 0 for name in MIDLINE)
