"""Where joints are and which of them are visible: anatomy by hand, and the rule by brute force."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from data_prep.marionette import render_scenes
from data_prep.marionette.body import PARTS
from data_prep.marionette.people import stage
from data_prep.marionette.scene import POSE, Person, Scene, draw_scene
from rg.points import KEYPOINTS

PLAIN = {
    "shirt": "red",
    "trousers": "blue",
    "skin": "tan",
    "hair": "black",
    "eye": "green",
    "hat": None,
    "glasses": False,
}


def person(*, scale=1.0, place=(0.0, -0.9), identity=PLAIN, **pose):
    return Person(identity, dict.fromkeys(POSE, 0.0) | pose, scale, place)


def scene(*people, kind="one"):
    return Scene(kind, "day", "grass", -0.2, 0.0, people)


def shoot(*scenes, resolution=64, supersampling=2):
    return render_scenes(scenes, resolution=resolution, supersampling=supersampling)


def seen(stills, who=0):
    return {name for name, point in zip(KEYPOINTS, stills.keypoints[0, who], strict=True) if point[2] > 0}


def test_a_person_standing_upright_projects_where_anatomy_says():
    stills = shoot(scene(person()))
    pelvis, pixel = -0.9 + 0.06 + 0.82, lambda x, y: ((x + 1) * 32 - 0.5, (1 - y) * 32 - 0.5)
    expected = {
        "nose": (0, pelvis + 0.71), "neck": (0, pelvis + 0.52), "right_shoulder": (-0.19, pelvis + 0.49),
        "right_elbow": (-0.19, pelvis + 0.21), "left_wrist": (0.19, pelvis - 0.05), "left_hip": (0.11, pelvis),
        "right_knee": (-0.11, pelvis - 0.42), "left_ankle": (0.11, pelvis - 0.82), "right_eye": (-0.045, pelvis + 0.75),
        "left_ear": (0.125, pelvis + 0.73),
    }  # fmt: skip
    for name, place in expected.items():
        x, y, _ = stills.keypoints[0, 0, KEYPOINTS.index(name)].tolist()
        assert (x, y) == pytest.approx(pixel(*place), abs=1e-4), name
    assert seen(stills) == set(KEYPOINTS)
    assert not stills.keypoints[0, 1].any()


def test_joints_bend_the_way_their_angles_say():
    bent = person(right_elbow=math.pi / 2, left_arm_spread=math.pi / 2, left_knee=math.pi / 2)
    joints = dict(zip(KEYPOINTS, stage([scene(bent)]).joints[:, 0, 0].T.tolist(), strict=True))
    assert joints["right_wrist"][2] == pytest.approx(0.26)  # an elbow bends forwards, a knee backwards
    assert joints["left_ankle"][2] == pytest.approx(-0.40)
    assert joints["left_elbow"][0] - joints["left_shoulder"][0] == pytest.approx(0.28)  # a spread arm points outwards


def test_a_person_facing_away_hides_the_face():
    stills = shoot(scene(person(yaw=math.pi)))
    assert set(KEYPOINTS) - seen(stills) == {"nose", "right_eye", "left_eye"}
    x = stills.keypoints[0, 0, :, 0]
    assert x[KEYPOINTS.index("right_hip")] > x[KEYPOINTS.index("left_hip")]


@pytest.mark.parametrize(("yaw", "near", "far"), [(math.pi / 2, "right", "left"), (-math.pi / 2, "left", "right")])
def test_a_person_in_profile_hides_the_far_side_and_a_hand_hides_the_near_hip(yaw, near, far):
    hidden = set(KEYPOINTS) - seen(shoot(scene(person(yaw=yaw))))
    # One bar joins both shoulders, and its near end is in sight.
    assert hidden == {name for name in KEYPOINTS if name.startswith(far)} - {f"{far}_shoulder"} | {f"{near}_hip"}


def test_glasses_and_hats_hide_no_eyes_of_an_upright_head():
    worn = PLAIN | {"glasses": True, "hat": "red"}
    assert {"right_eye", "left_eye"} <= seen(shoot(scene(person(identity=worn))))
    assert not torch.equal(shoot(scene(person(identity=worn))).image, shoot(scene(person())).image)


def test_another_person_in_front_hides_every_joint():
    small, giant = person(scale=0.6, place=(0.0, -0.5)), person(scale=2.0, place=(0.0, -2.3))
    assert seen(shoot(scene(small))) == set(KEYPOINTS)
    stills = shoot(scene(small, giant, kind="two"))
    assert seen(stills, 0) == set()
    assert {"neck", "right_hip", "left_hip"} <= seen(stills, 1)
    assert stills.instances.unique().tolist() == [0, 2]


def test_another_persons_hand_hides_an_ear_however_close_it_is():
    # The small hand's front is 0.018 before the ear: an own part so close would leave the ear visible.
    ear = -0.9 + 0.06 + 0.82 + 0.73
    hand = person(scale=0.3, place=(0.125 - 0.3 * 0.19, ear - 0.3 * (0.06 + 0.82 - 0.05)))
    assert seen(shoot(scene(person(), hand, kind="two")), 0) == set(KEYPOINTS) - {"left_ear"}


def test_a_joint_outside_of_the_picture_keeps_its_place_and_is_not_visible():
    stills = shoot(scene(person(place=(0.85, -0.9))))
    x, y, visible = stills.keypoints[0, 0, KEYPOINTS.index("left_wrist")].tolist()
    assert (x, y, visible) == pytest.approx(((0.85 + 0.19 + 1) * 32 - 0.5, (1 + 0.07) * 32 - 0.5, 0), abs=1e-4)
    assert "right_wrist" in seen(stills)


def front_by_brute_force(start, end, radius, x, y):
    centers = start + np.linspace(0, 1, 1001)[:, None] * (end - start)
    square = radius**2 - (x - centers[:, 0]) ** 2 - (y - centers[:, 1]) ** 2
    return max(centers[square > 0, 2] + np.sqrt(square[square > 0]), default=-np.inf)


def test_visibility_follows_the_rule_in_a_brute_force_picture():
    scenes = [draw_scene((4, 0, index), {"one": 0.3, "two": 0.7}) for index in range(8)]
    people = stage(scenes)
    ends, radius = [getattr(people.capsules, name).numpy() for name in ("start", "end")], people.capsules.radius.numpy()
    expected = torch.zeros(8, 2, 18)
    for b, p, k in product(range(8), range(2), range(18)):
        if p >= len(scenes[b].people):
            continue
        x, y, z = people.joints[:, b, p, k].tolist()
        fronts = [
            -np.inf
            if radius[b, n] == 0 or PARTS[n % len(PARTS)].paint == "glasses"
            else front_by_brute_force(ends[0][:, b, n], ends[1][:, b, n], radius[b, n], x, y)
            for n in range(2 * len(PARTS))
        ]
        n = int(np.argmax(fronts))
        own, name = n // len(PARTS) == p, KEYPOINTS[k]
        thickness = min([part.radius for part in PARTS if name in part.keypoints], default=0.03) * people.scale[b, p]
        shown = own and name in PARTS[n % len(PARTS)].keypoints
        expected[b, p, k] = (shown or fronts[n] - z < (thickness if own else 0)) and max(abs(x), abs(y)) <= 1
    visible = shoot(*scenes, resolution=16).keypoints[..., 2]
    assert 20 < (expected == 0).sum() - 18 * sum(len(one.people) == 1 for one in scenes) < 200
    assert torch.equal(visible, expected)
