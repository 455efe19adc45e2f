"""Where joints are in the image and which of them are visible: by hand, and the rule by brute force."""

import math

import numpy as np
import pytest
import torch

from data_prep.marionette.body_parts import CLEAR, KEYPOINT_RADIUS, PARTS
from data_prep.marionette.scene import Camera, Thing
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import (
    CAPSULE_INSTANCE,
    CAPSULE_LABEL,
    LABELS,
    PEOPLE_PARTS,
    first_depth,
    keypoints,
    set_stage,
)
from rg.points import KEYPOINTS

PELVIS = 0.06 + 0.82  # of an average person who stands upright
OPEN = {"right_arm_spread": 0.3, "left_arm_spread": 0.3}  # arms that hang straight down dip into the hips


def pixel(x, y, z=0.0, resolution=64):
    """Where a camera at (0, 0.9, 3) sees a place."""
    scale = 3 / (3 - z)
    return (x * scale + 1) * resolution / 2 - 0.5, (1 - (y - 0.9) * scale) * resolution / 2 - 0.5


def keypoints_of(one, resolution=64):
    return keypoints(set_stage([one]), resolution)[0]


def seen(found, who=0):
    return {name for name, point in zip(KEYPOINTS, found[who], strict=True) if point[2] > 0}


def test_a_person_standing_upright_projects_where_anatomy_says(scene, person):
    found = keypoints_of(scene(person()))
    expected = {
        "nose": (0, 0.71, 0.125), "neck": (0, 0.52, 0), "right_shoulder": (-0.19, 0.49, 0),
        "right_elbow": (-0.19, 0.21, 0), "left_wrist": (0.19, -0.05, 0), "left_hip": (0.11, 0, 0),
        "right_knee": (-0.11, -0.42, 0), "left_ankle": (0.11, -0.82, 0), "right_eye": (-0.045, 0.75, 0.105),
        "left_ear": (0.125, 0.73, 0),
    }  # fmt: skip
    for name, (x, y, z) in expected.items():
        place = found[0, KEYPOINTS.index(name), :2].tolist()
        assert place == pytest.approx(pixel(x, PELVIS + y, z), abs=1e-4), name
    assert not found[1].any()


def test_a_person_with_open_arms_shows_every_joint(scene, person):
    assert seen(keypoints_of(scene(person(**OPEN)))) == set(KEYPOINTS)


def test_keypoints_grow_with_the_image(scene, person):
    small, large = (keypoints_of(scene(person(yaw=0.5)), resolution) for resolution in (64, 192))
    torch.testing.assert_close((small[0, :, :2] + 0.5) * 3 - 0.5, large[0, :, :2])
    assert torch.equal(small[..., 2], large[..., 2])


def test_a_person_facing_away_hides_the_face(scene, person):
    found = keypoints_of(scene(person(yaw=math.pi, **OPEN)))
    assert set(KEYPOINTS) - seen(found) == {"nose", "right_eye", "left_eye"}
    assert found[0, KEYPOINTS.index("right_hip"), 0] > found[0, KEYPOINTS.index("left_hip"), 0]


def test_turning_the_camera_is_turning_the_person_the_other_way(scene, person):
    turned, around = keypoints_of(scene(person(yaw=-0.7))), keypoints_of(scene(person(), camera=Camera(yaw=0.7)))
    torch.testing.assert_close(turned, around, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("yaw", "near", "far"), [(math.pi / 2, "right", "left"), (-math.pi / 2, "left", "right")])
def test_a_person_in_profile_hides_the_far_side_and_a_hand_hides_the_near_hip(scene, person, yaw, near, far):
    hidden = set(KEYPOINTS) - seen(keypoints_of(scene(person(yaw=yaw))))
    far_side = {name for name in KEYPOINTS if name.startswith(far)}
    # One bar joins both shoulders, and its near end is in sight; perspective may uncover what is far and large.
    assert f"{near}_hip" in hidden and hidden - {f"{near}_hip"} <= far_side
    assert {f"{far}_{name}" for name in ("elbow", "wrist", "hip", "eye", "ear")} <= hidden


def test_glasses_and_hats_hide_no_eyes_of_an_upright_head(scene, person, shoot):
    dressed = scene(person(worn={"glasses": True, "hat": "red"}))
    assert {"right_eye", "left_eye"} <= seen(keypoints_of(dressed))
    assert {LABELS.index("glasses"), LABELS.index("hat")} <= set(shoot(dressed).parts.unique().tolist())


def test_a_hand_before_the_face_hides_the_nose(scene, person):
    raised = {"right_arm_swing": -1.4, "right_elbow": 2.1, "right_elbow_twist": -0.5}
    aside = Camera(yaw=-0.75)
    assert {"nose", "right_eye", "right_wrist"} <= seen(keypoints_of(scene(person(**OPEN), camera=aside)))
    shown = seen(keypoints_of(scene(person(**raised), camera=aside)))
    assert "nose" not in shown and {"right_wrist", "right_ear"} <= shown


def test_another_person_in_front_hides_every_joint(scene, person):
    small, giant = person(worn={"height": 0.8}, **OPEN), person(worn={"girth": 4.0}, place=(0.0, 1.0))
    assert seen(keypoints_of(scene(small))) == set(KEYPOINTS)
    found = keypoints_of(scene(small, giant, kind="two"))
    assert seen(found, 0) <= {"right_ankle", "left_ankle"}
    assert {"neck", "right_hip", "left_hip"} <= seen(found, 1)


def test_a_thing_hides_what_is_behind_it(scene, person):
    before, behind = (scene(person(**OPEN), things=(Thing("ball", 0.12, (-0.1, z)),)) for z in (0.5, -0.5))
    assert set(KEYPOINTS) - seen(keypoints_of(before)) == {"right_ankle"}
    assert seen(keypoints_of(behind)) == set(KEYPOINTS)


@pytest.mark.parametrize(("capsule", "gap", "visible"), [(0, 0.02, 1), (0, 0.04, 0), (len(PARTS), 0.02, 0)])
def test_an_own_part_hides_a_joint_only_from_its_radius_on_and_another_persons_always(
    scene, person, capsule, gap, visible
):
    """The front of a ball comes to lie `gap` before an ear, which has no part of its own: once an own part is the ball,
    once one of the other person's."""
    stage = set_stage([scene(person(), person(place=(3.0, 0.0)), kind="two")])
    ear = stage.joints[:, 0, 0, KEYPOINTS.index("left_ear")]
    stage.seen.start[:, 0, capsule] = stage.seen.end[:, 0, capsule] = ear * (1 - (gap - 0.05) / -ear[2])
    stage.seen.radius[0, capsule] = 0.05
    assert keypoints(stage, 64)[0, 0, KEYPOINTS.index("left_ear"), 2] == visible


def test_a_joint_outside_of_the_image_keeps_its_place_and_is_not_visible(scene, person):
    found = keypoints_of(scene(person(place=(0.85, 0.0), right_arm_spread=0.3)))
    x, y, visible = found[0, KEYPOINTS.index("left_wrist")].tolist()
    assert (x, y, visible) == pytest.approx((*pixel(0.85 + 0.19, PELVIS - 0.05), 0), abs=1e-4)
    assert "right_wrist" in seen(found)


def test_a_camera_that_looks_away_sees_nobody(scene, person, shoot):
    away = scene(person(place=(0.0, 6.0)))  # behind the camera
    assert seen(keypoints_of(away)) == set() and not shoot(away).instances.any()


def test_front_most_depths_by_hand(scene, person):
    stage = set_stage([scene(person(worn={"glasses": True}))])
    # Through the middle of the chest, and through the bridge of the nose.
    chest = stage.views.to_camera(torch.tensor([[0.0, PELVIS + 0.3, 0.0]]).double().T)
    depth, capsule = first_depth(stage, chest)
    slope = (0.9 - PELVIS - 0.3) / 3
    assert depth.item() == pytest.approx(3 - 0.145, abs=0.145 * slope**2 + 1e-3)
    assert LABELS[CAPSULE_LABEL[capsule]] == "trunk" and CAPSULE_INSTANCE[capsule] == 1
    bridge = stage.views.to_camera(torch.tensor([[0.0, PELVIS + 0.75, 0.118]]).double().T)
    with_glasses, without = first_depth(stage, bridge, glasses=True), first_depth(stage, bridge)
    assert LABELS[CAPSULE_LABEL[with_glasses[1]]] == "glasses" and LABELS[CAPSULE_LABEL[without[1]]] == "face"
    assert with_glasses[0] < without[0]
    nothing = stage.views.to_camera(torch.tensor([[0.9, 1.5, 0.0]]).double().T)
    assert first_depth(stage, nothing)[0].item() == math.inf


def test_the_world_and_the_view_hold_the_same_capsules(drawn):
    stage = set_stage(drawn[:20])
    for seen_ends, world_ends in ((stage.seen.start, stage.world.start), (stage.seen.end, stage.world.end)):
        back = sum(stage.views.axes[i, :, :, None] * seen_ends[i] for i in range(3)) + stage.views.position[..., None]
        torch.testing.assert_close(back, world_ends)
    assert stage.world.radius.shape == (20, len(CAPSULE_LABEL)) == (20, len(CAPSULE_INSTANCE))
    assert torch.equal(stage.present.sum(1), torch.tensor([len(one.people) for one in drawn[:20]]))
    absent = stage.world.radius[:, len(PARTS) : PEOPLE_PARTS].amax(1) == 0
    assert torch.equal(absent, ~stage.present[:, 1])


def test_parts_are_labelled_where_they_are(scene, person, shoot):
    stills = shoot(scene(person(worn={"hat": "red"}, right_arm_spread=1.2, left_arm_spread=1.2)), supersampling=1)
    found, parts = stills.keypoints[0, 0], stills.parts[0]
    names = dict(zip(KEYPOINTS, found[:, :2].round().long().tolist(), strict=True))

    def label(x, y):
        return LABELS[parts[y, x]]

    for side in ("right", "left"):
        assert label(*names[f"{side}_wrist"]) == f"{side}_hand"
        assert label(*names[f"{side}_ankle"]) == f"{side}_foot"
        shin = [(a + b) // 2 for a, b in zip(names[f"{side}_knee"], names[f"{side}_ankle"], strict=True)]
        arm = [(a + b) // 2 for a, b in zip(names[f"{side}_shoulder"], names[f"{side}_elbow"], strict=True)]
        assert label(*shin) == f"{side}_shin" and label(*arm) == f"{side}_upper_arm"
    assert label(*names["nose"]) == "face" and label(*names["neck"]) in ("trunk", "face")
    top = (parts > 2).nonzero()[0]
    assert label(int(top[1]), int(top[0])) == "hat"
    assert label(0, 0) == "sky" and label(0, 63) == "ground"


def front_by_brute_force(direction, start, end, radius):
    """Depth of the nearest of 401 spheres along a capsule on the ray from the origin through (x, y, -1)."""
    centers = start + np.linspace(0, 1, 401)[:, None] * (end - start)
    square, across = direction @ direction, centers @ direction
    root = across**2 - square * ((centers**2).sum(1) - radius**2)
    first = (across[root > 0] - np.sqrt(root[root > 0])) / square
    return min(first[first > 0], default=np.inf)


def test_visibility_follows_the_rule_in_a_brute_force_image():
    scenes = [draw_scene((4, 0, index), {"one": 0.3, "two": 0.6, "portrait": 0.1}) for index in range(6)]
    stage = set_stage(scenes)
    ends, radius = [ends.numpy() for ends in (stage.seen.start, stage.seen.end)], stage.seen.radius.numpy()
    solid = [n for n in range(radius.shape[1]) if n >= PEOPLE_PARTS or not CLEAR[n % len(PARTS)]]
    wrong, hidden = [], 0
    found = keypoints(stage, 64)
    for b, one in enumerate(scenes):
        worn = [n for n in solid if radius[b, n] > 0]
        for p in range(len(one.people)):
            for k, name in enumerate(KEYPOINTS):
                joint = stage.joints[:, b, p, k].numpy()
                direction = joint / -joint[2]
                fronts = [front_by_brute_force(direction, *(e[:, b, n] for e in ends), radius[b, n]) for n in worn]
                n = worn[int(np.argmin(fronts))]
                own = n // len(PARTS) == p and n < PEOPLE_PARTS
                shown = own and name in PARTS[n % len(PARTS)].keypoints
                near = -joint[2] - min(fronts) < (KEYPOINT_RADIUS[k] if own else 0)
                inside = max(abs(3 * direction[0]), abs(3 * direction[1])) <= 1
                hidden += not (shown or near)
                if found[b, p, k, 2] != float((shown or near) and inside):
                    wrong.append((b, p, name))
    assert not wrong and hidden > 20


def test_visible_joints_are_seen_in_a_large_image(shoot):
    """The same rule read from label and depth maps of 512 pixels, where a pixel is a quarter of a centimetre wide."""
    for index in range(3):
        stills = shoot(draw_scene((14, 0, index), {"one": 1.0}), resolution=512, supersampling=1)
        stage = set_stage([draw_scene((14, 0, index), {"one": 1.0})])
        for k, (x, y, visible) in enumerate(stills.keypoints[0, 0].tolist()):
            if not (0 <= x <= 511 and 0 <= y <= 511):
                continue
            column, row = round(x), round(y)
            front = 1 / stills.depth[0, row, column].clamp_min(1e-6)
            before = -stage.joints[2, 0, 0, k] - front
            if visible == 0:  # something is clearly in front
                assert before > KEYPOINT_RADIUS[k] - 0.02 or stills.instances[0, row, column] == 0, (
                    index,
                    KEYPOINTS[k],
                )
            elif KEYPOINTS[k] not in ("right_ear", "left_ear"):
                labels = {part.label for part in PARTS if KEYPOINTS[k] in part.keypoints} | {"glasses"}
                assert before < KEYPOINT_RADIUS[k] + 0.02 or LABELS[stills.parts[0, row, column]] in labels
